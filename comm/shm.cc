// Segments between ranks of one host, written straight into the memory of the rank they are for.
//
// Every rank owns one block of shared memory, zeroed at first and mapped by all:
//
//   64 B              identity, checked by moeserve/comm/exchange/shm.py
//   Waiting           whether the owner has waited for a while; it writes, anybody may read
//   Sleep             what the owner sleeps for, 0 while it is awake; a futex
//   Count[lane][2]    segments that have arrived, since ever, in rounds of this parity
//   Flag[lane][2][s]  the last round of this parity announced by source s, and its length
//   area[lane][2][s]  the bytes, page-aligned; pages exist from the first touch on
//
// Why two areas per source and lane suffice, and why Count needs no round number. A rank calls, per
// lane, begin(n), send(n), receive(n), begin(n + 1)...; begin(n) ends the life of what receive(n-1)
// gave. Let rank a be in begin(n + 2) or beyond, about to write into rank b's area of parity n.
// Then a has returned from receive(n + 1), so b has called send(n + 1), so b is past begin(n + 1),
// where its segments of round n ended: the area is free. Likewise no source can count itself into
// round n + 2 before all have counted themselves into round n: its receive(n + 1) needed
// everybody's send(n + 1), which follows everybody's send(n). So Count of a parity reaches world * k
// exactly when the k-th round of this parity is complete.
//
// Waking. The receiver stores what it sleeps for in Sleep and then looks at Count once more; a sender
// adds to Count and then looks at Sleep. All four are sequentially consistent, so one of them sees
// the other. Only the sender whose segment completes the round looks: one wake-up a round.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

#include "module.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;
constexpr int kParities = 2;

static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct alignas(kLine) Waiting {
  std::atomic<uint32_t> waiting;  // for a round, since a while; stays so when it gives up
};
struct alignas(kLine) Sleep {
  std::atomic<uint32_t> waits_for;
};
struct alignas(kLine) Count {
  std::atomic<uint64_t> arrived;
};
struct alignas(kLine) Flag {
  std::atomic<uint64_t> round;
  uint64_t length;
};

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value, int64_t ns) {
#ifdef __linux__
  timespec span{ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &span, nullptr, 0);
#else
  (void)word, (void)value;
  std::this_thread::sleep_for(std::chrono::nanoseconds(std::min<int64_t>(ns, 100000)));
#endif
}

void wake(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

// Where everything lies in a rank's block.
struct BlockLayout {
  size_t world;
  std::vector<size_t> bytes_L;   // most of a segment, by lane
  std::vector<size_t> areas_L;   // where a lane's areas begin
  size_t total;

  BlockLayout(size_t world, const std::vector<size_t>& lane_bytes) : world(world), bytes_L(lane_bytes) {
    size_t at = kLine + sizeof(Waiting) + sizeof(Sleep);
    at += lane_bytes.size() * kParities * (sizeof(Count) + world * sizeof(Flag));
    for (size_t bytes : lane_bytes) {
      at = round_up(at, kPage);
      areas_L.push_back(at);
      at += kParities * world * round_up(bytes, kPage);
    }
    total = round_up(at, kPage);
  }

  Waiting& waiting(char* block) const { return *reinterpret_cast<Waiting*>(block + kLine); }
  Sleep& sleep(char* block) const {
    return *reinterpret_cast<Sleep*>(block + kLine + sizeof(Waiting));
  }
  Count& count(char* block, size_t lane, size_t parity) const {
    auto counts = reinterpret_cast<Count*>(block + kLine + sizeof(Waiting) + sizeof(Sleep));
    return counts[lane * kParities + parity];
  }
  Flag& flag(char* block, size_t lane, size_t parity, size_t source) const {
    auto flags = reinterpret_cast<Flag*>(&count(block, bytes_L.size(), 0));
    return flags[(lane * kParities + parity) * world + source];
  }
  size_t area(size_t lane, size_t parity, size_t source) const {
    return areas_L[lane] + (parity * world + source) * round_up(bytes_L[lane], kPage);
  }
};

class Mailboxes {
 public:
  // ``blocks``: the address of every rank's block, zeroed but for the identity. ``receive`` spins
  // for ``spin_ns``, then yields between looks for ``yield_ns``.
  Mailboxes(size_t rank, const std::vector<uintptr_t>& blocks,
            const std::vector<size_t>& lane_bytes, int64_t spin_ns, int64_t yield_ns)
      : layout_(blocks.size(), lane_bytes), rank_(rank), spin_ns_(spin_ns), yield_ns_(yield_ns),
        round_L_(lane_bytes.size(), 0) {
    for (uintptr_t block : blocks) blocks_.push_back(reinterpret_cast<char*>(block));
    if (rank >= blocks_.size()) throw std::out_of_range("rank");
  }

  // The lane's next round: its parity.
  int begin(size_t lane) { return static_cast<int>(++round_L_.at(lane) & 1); }

  void send(size_t lane, const std::vector<uint64_t>& lengths) {
    uint64_t round = round_L_.at(lane);
    size_t parity = round & 1;
    if (lengths.size() != blocks_.size()) throw std::out_of_range("lengths");
    // Peers first, beginning behind this rank, so that not all write to the same one at once.
    for (size_t step = 1; step <= blocks_.size(); ++step) {
      size_t peer = (rank_ + step) % blocks_.size();
      if (lengths[peer] > layout_.bytes_L[lane]) throw std::out_of_range("length");
      char* block = blocks_[peer];
      Flag& flag = layout_.flag(block, lane, parity, rank_);
      flag.length = lengths[peer];
      flag.round.store(round, std::memory_order_release);
      uint64_t arrived = layout_.count(block, lane, parity).arrived.fetch_add(1) + 1;
      if (peer != rank_ && arrived % blocks_.size() == 0) wake_owner(block, code(lane, parity));
    }
  }

  // The length of every rank's segment, or nothing where the round is still incomplete after a
  // moment of looking.
  nb::object receive(size_t lane) {
    uint64_t round = round_L_.at(lane);
    size_t parity = round & 1;
    auto& arrived = layout_.count(blocks_[rank_], lane, parity).arrived;
    uint64_t wanted = blocks_.size() * ((round + 1) / 2);
    if (arrived.load(std::memory_order_acquire) < wanted && !spin(arrived, wanted)) {
      return nb::none();
    }
    auto& waiting = layout_.waiting(blocks_[rank_]).waiting;
    if (waiting.load(std::memory_order_relaxed)) waiting.store(0, std::memory_order_relaxed);
    nb::list lengths;
    for (size_t source = 0; source < blocks_.size(); ++source) {
      lengths.append(layout_.flag(blocks_[rank_], lane, parity, source).length);
    }
    return lengths;
  }

  // Asleep until the round is complete, or for so long: whether it is.
  bool sleep(size_t lane, int64_t ns) {
    uint64_t round = round_L_.at(lane);
    size_t parity = round & 1;
    auto& arrived = layout_.count(blocks_[rank_], lane, parity).arrived;
    uint64_t wanted = blocks_.size() * ((round + 1) / 2);
    auto& waits_for = layout_.sleep(blocks_[rank_]).waits_for;
    nb::gil_scoped_release released;
    layout_.waiting(blocks_[rank_]).waiting.store(1, std::memory_order_relaxed);
    waits_for.store(code(lane, parity));
    if (arrived.load() < wanted && ns > 0) sleep_while(waits_for, code(lane, parity), ns);
    waits_for.store(0);
    return arrived.load(std::memory_order_acquire) >= wanted;
  }

  // Who has not sent. Of these, where any, only they who do not wait themselves: some ranks have got
  // what a rank sent before it fell silent, others have not, and wait a round behind.
  std::vector<size_t> missing(size_t lane) const {
    uint64_t round = round_L_.at(lane);
    std::vector<size_t> ranks, silent;
    for (size_t source = 0; source < blocks_.size(); ++source) {
      Flag& flag = layout_.flag(blocks_[rank_], lane, round & 1, source);
      if (flag.round.load(std::memory_order_acquire) == round) continue;
      ranks.push_back(source);
      if (!layout_.waiting(blocks_[source]).waiting.load(std::memory_order_relaxed)) {
        silent.push_back(source);
      }
    }
    return silent.empty() ? ranks : silent;
  }

 private:
  static uint32_t code(size_t lane, size_t parity) {
    return static_cast<uint32_t>(lane * kParities + parity + 1);
  }

  void wake_owner(char* block, uint32_t code) {
    auto& waits_for = layout_.sleep(block).waits_for;
    if (waits_for.load() == code && waits_for.compare_exchange_strong(code, 0)) wake(waits_for);
  }

  bool spin(const std::atomic<uint64_t>& arrived, uint64_t wanted) const {
    nb::gil_scoped_release released;
    auto come = [&] { return arrived.load(std::memory_order_acquire) >= wanted; };
    auto begun = std::chrono::steady_clock::now();
    auto spent = [&] {
      return std::chrono::nanoseconds(std::chrono::steady_clock::now() - begun).count();
    };
    while (spent() < spin_ns_) {
      for (int i = 0; i < 32; ++i) {
        if (come()) return true;
        relax();
      }
    }
    while (spent() < spin_ns_ + yield_ns_) {
      if (come()) return true;
      std::this_thread::yield();
    }
    return come();
  }

  BlockLayout layout_;
  size_t rank_;
  int64_t spin_ns_, yield_ns_;
  std::vector<char*> blocks_;
  std::vector<uint64_t> round_L_;
};

}  // namespace

void bind_shm(nb::module_& m) {
  m.def("block_bytes",
        [](size_t world, const std::vector<size_t>& lane_bytes) {
          return BlockLayout(world, lane_bytes).total;
        });
  m.def("area_offset",
        [](size_t world, const std::vector<size_t>& lane_bytes, size_t lane, size_t parity,
           size_t source) { return BlockLayout(world, lane_bytes).area(lane, parity, source); });
  nb::class_<Mailboxes>(m, "Mailboxes")
      .def(nb::init<size_t, const std::vector<uintptr_t>&, const std::vector<size_t>&, int64_t,
                    int64_t>())
      .def("begin", &Mailboxes::begin)
      .def("send", &Mailboxes::send)
      .def("receive", &Mailboxes::receive)
      .def("sleep", &Mailboxes::sleep)
      .def("missing", &Mailboxes::missing);
}

}  // namespace moeserve
