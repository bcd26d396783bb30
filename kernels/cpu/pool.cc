#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace moeserve {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kMostNodes = 64;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
  for (int i = 0; i < 256; ++i) {  // a clock costs more than most waits
    if (ready()) return true;
    relax();
  }
  for (auto end = Clock::now() + kSpin; Clock::now() < end;)
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  return ready();
}

// True on whoever is within a loop: workers always, a caller while it takes part.
thread_local bool inside = false;

cpu_set_t allowed_cpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  sched_getaffinity(0, sizeof allowed, &allowed);
  return allowed;
}

// Threads take turns over the nodes and stay on theirs, so that all memory channels are used and
// what a thread touched first remains near. Within a node the system may move them: pinned to one
// core, a worker would wait there behind another process while this one's cores lie idle.
void stay_on_node(int thread) {
  const auto nodes = cpus_of_nodes();
  if (nodes.size() < 2) return;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  for (int cpu : nodes[thread % nodes.size()]) CPU_SET(cpu, &mine);
  sched_setaffinity(0, sizeof mine, &mine);
}

// A loop in one word, so that finding work, learning its size and claiming an item is one atomic
// addition: helpers (10 bits), count (27), and the next item (27), which runs past count by one
// for each thread that came too late.
struct Ticket {
  uint64_t word;
  static constexpr int kBits = 27;
  static constexpr uint64_t kMask = (1u << kBits) - 1;
  static constexpr int64_t kMostItems = 1 << (kBits - 1);
  static constexpr int kMostHelpers = 1023;

  static uint64_t of(int64_t helpers, int64_t count) {
    return static_cast<uint64_t>(helpers) << 2 * kBits | static_cast<uint64_t>(count) << kBits;
  }
  int64_t next() const { return static_cast<int64_t>(word & kMask); }
  int64_t count() const { return static_cast<int64_t>(word >> kBits & kMask); }
  bool wants(int worker) const {
    return next() < count() && worker < static_cast<int>(word >> 2 * kBits);
  }
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // May be called while a loop runs, which ends with the threads that it has. Workers beyond the
  // number rest until it grows again: nobody wakes them for loops that they have no part in.
  void set_threads(int count) {
    threads_.store(count, std::memory_order_seq_cst);
    resizes_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &resizes_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  void wake() {
    if (threads() > 1 && asleep_.load(std::memory_order_seq_cst)) wake_all();
  }

  // At most Ticket::kMostItems.
  void run(int64_t count, Item item, void* context) {
    const int helpers =
        static_cast<int>(std::min<int64_t>({threads(), count, Ticket::kMostHelpers + 1})) - 1;
    if (helpers < 1 || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) item(context, i);
      return;
    }
    while (started_ < helpers && start_worker()) {
    }
    // The loop before is used up and nobody is in it, so nobody reads these.
    item_ = item;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(Ticket::of(helpers, count), std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) wake_all();
    inside = true;
    const int64_t others = count - take_items();
    inside = false;
    const auto finished = [&] { return done_.load(std::memory_order_acquire) == others; };
    // Past the spin a worker has lost its core: perhaps to us.
    while (!spin_until(finished)) std::this_thread::yield();
    busy_.store(false, std::memory_order_release);
  }

 private:
  // False where the system has no more threads to give: the loop then runs on those there are.
  bool start_worker() {
    try {
      std::thread([this, worker = started_] {
        stay_on_node(worker + 1);
        work(worker);
      }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++started_;
    return true;
  }

  // How many this thread ran. Whoever claimed an item keeps the loop open until it says so in
  // `done_`; until then `item_` and `context_` are those of the claim.
  int64_t take_items() {
    int64_t taken = 0;
    for (;; ++taken) {
      const Ticket claimed{ticket_.fetch_add(1, std::memory_order_acq_rel)};
      if (claimed.next() >= claimed.count()) return taken;
      item_(context_, claimed.next());
    }
  }

  void work(int worker) {
    inside = true;
    const auto called = [&] {
      return Ticket{ticket_.load(std::memory_order_acquire)}.wants(worker);
    };
    for (;;) {
      if (rest(worker)) continue;
      if (!spin_until(called)) {
        const uint32_t seen = wakes_.load(std::memory_order_seq_cst);
        asleep_.store(true, std::memory_order_seq_cst);
        if (!Ticket{ticket_.load(std::memory_order_seq_cst)}.wants(worker))
          syscall(SYS_futex, &wakes_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        continue;
      }
      if (const int64_t taken = take_items()) done_.fetch_add(taken, std::memory_order_release);
    }
  }

  // False where the worker is one of those that share loops. A number that is set too late to be
  // seen here has been counted in `resizes_` too late for it to be `seen`.
  bool rest(int worker) {
    if (worker + 1 < threads()) return false;
    const uint32_t seen = resizes_.load(std::memory_order_seq_cst);
    if (worker + 1 < threads_.load(std::memory_order_seq_cst)) return false;
    syscall(SYS_futex, &resizes_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    return true;
  }

  // A worker that set `asleep_` too late to be seen here has read `wakes_` too early to sleep.
  void wake_all() {
    asleep_.store(false, std::memory_order_seq_cst);
    wakes_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &wakes_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // What a loop needs, in one cache line.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  Item item_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> asleep_{false};
  std::atomic<uint32_t> wakes_{0};
  alignas(64) std::atomic<bool> busy_{false};
  int started_ = 0;
  std::atomic<int> threads_;
  std::atomic<uint32_t> resizes_{0};
};

// Physical cores among the CPUs this process may use: two threads of one core share its FMA units.
int available_cores() {
  const cpu_set_t allowed = allowed_cpus();
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::string siblings = std::to_string(cpu);
    std::ifstream file("/sys/devices/system/cpu/cpu" + siblings + "/topology/thread_siblings_list");
    std::getline(file, siblings);
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

int default_threads() {
  const int cores = available_cores();
  const char* asked = std::getenv("MOESERVE_THREADS");
  const int limit = asked ? std::atoi(asked) : 0;
  return limit > 0 ? std::min(cores, limit) : cores;
}

// Never destroyed: its workers sleep in it until the process is gone. A forked child has no
// workers, so it forgets its parent's pool and makes one of its own.
std::atomic<Pool*> the_pool{nullptr};
std::atomic<int> asked_threads{0};

Pool& pool() {
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found) return *found;
  const int asked = asked_threads.load();
  auto fresh = std::make_unique<Pool>(asked > 0 ? asked : default_threads());
  if (the_pool.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
    return *fresh.release();
  }
  return *found;
}

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void run_items(int64_t count, Item item, void* context) {
  if (inside || count == 1) {
    for (int64_t i = 0; i < count; ++i) item(context, i);
    return;
  }
  struct Shifted {
    Item item;
    void* context;
    int64_t first;
  };
  if (count <= Ticket::kMostItems) return pool().run(count, item, context);
  for (int64_t first = 0; first < count; first += Ticket::kMostItems) {
    Shifted shifted{item, context, first};
    pool().run(
        std::min(count - first, Ticket::kMostItems),
        [](void* of, int64_t i) {
          const auto* s = static_cast<Shifted*>(of);
          s->item(s->context, s->first + i);
        },
        &shifted);
  }
}

Alone::Alone() : before_(std::exchange(inside, true)) {}

Alone::~Alone() { inside = before_; }

void wake_threads() { pool().wake(); }

std::vector<std::vector<int>> cpus_of_nodes() {
  const cpu_set_t allowed = allowed_cpus();
  std::vector<std::vector<int>> nodes;
  for (int node = 0; node < kMostNodes; ++node) {
    std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
    std::vector<int> cpus;
    int first, last;
    for (char after = ','; after == ',' && file >> first;) {
      last = first;
      if (file.peek() == '-') file.get(), file >> last;
      for (int cpu = first; cpu <= last && cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
      after = 0;
      file >> after;
    }
    if (!cpus.empty()) nodes.push_back(cpus);
  }
  return nodes;
}

int threads() { return pool().threads(); }

void set_threads(int count) {
  asked_threads.store(count);
  pool().set_threads(count);
}

void* scratch(int slot, std::size_t bytes) {
  static thread_local Buffer buffers[4];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(std::exchange(buffer.data, nullptr));
    buffer.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.data) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

}  // namespace moeserve
