#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
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
constexpr auto kSpin = std::chrono::microseconds(30);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
  for (auto end = Clock::now() + kSpin; Clock::now() < end;)
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  return ready();
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  void set_threads(int count) { threads_.store(count, std::memory_order_relaxed); }

  void run(int64_t count, Item item, void* context) {
    const int helpers = static_cast<int>(std::min<int64_t>(threads(), count)) - 1;
    if (helpers < 1 || !callers_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) item(context, i);
      return;
    }
    std::lock_guard<std::mutex> caller(callers_, std::adopt_lock);
    while (started_ < helpers && start_worker()) {
    }
    item_ = item;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    places_.store(helpers, std::memory_order_relaxed);
    gate_.store(kOpen, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      wake_.notify_all();
    }
    take_items();
    // Nobody may enter from here on; wait for those inside.
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto left = [this] { return gate_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(left)) std::this_thread::yield();
  }

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  // False where the system has no more threads to give: the loop then runs on those there are.
  bool start_worker() {
    try {
      std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      return false;
    }
    ++started_;
    return true;
  }

  void take_items() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      item_(context_, i);
  }

  // True if the gate was open: the caller then waits for this worker to leave.
  bool enter() {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    while (gate & kOpen)
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return epoch_.load(std::memory_order_seq_cst) != seen; };
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = epoch_.load(std::memory_order_seq_cst);
      if (!enter()) continue;
      if (places_.fetch_sub(1, std::memory_order_relaxed) > 0) take_items();
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::atomic<int> threads_;
  std::mutex callers_;
  int started_ = 0;

  Item item_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int> places_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// Physical cores among the CPUs this process may use: two threads of one core share its FMA units.
int available_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
    return std::max(1u, std::thread::hardware_concurrency());
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

thread_local bool inside = false;

struct Nested {
  Item item;
  void* context;
};

void run_inside(void* context, int64_t index) {
  const auto* nested = static_cast<Nested*>(context);
  const bool before = std::exchange(inside, true);
  nested->item(nested->context, index);
  inside = before;
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
  Nested nested{item, context};
  pool().run(count, run_inside, &nested);
}

int threads() { return pool().threads(); }

void set_threads(int count) {
  asked_threads.store(count);
  pool().set_threads(count);
}

void* scratch(int slot, std::size_t bytes) {
  static thread_local Buffer buffers[2];
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
