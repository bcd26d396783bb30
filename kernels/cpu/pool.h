// A small pool of threads that runs a counted loop.
//
// Items are handed out one at a time to whoever is free, the caller included, so the loop ends
// even if no worker ever wakes; the caller waits only for items that somebody has begun. Which
// thread runs an item must not matter to its result. A second caller that finds the pool busy, and
// a call from inside an item, run their loop alone.
//
// A worker that finds nothing spins for some tens of microseconds, then sleeps. While it spins a
// loop costs about half a microsecond, as much as a barrier would: phases are loops of their own.
// Workers are bound to a NUMA node where there are several, never to one core: that gained nothing
// here when idle, and under load lost what the system's balancing gives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moeserve {

using Item = void (*)(void* context, int64_t index);

void run_items(int64_t count, Item item, void* context);

// Wake who sleeps, without waiting: a loop is to follow soon.
void wake_threads();

// While one lives, loops of its thread run on it alone: the pool is left to other callers.
class Alone {
 public:
  Alone();
  ~Alone();
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  bool before_;
};

// Threads that share a loop, the caller included. The number may change between two loops, or while
// one runs; a worker that is over rests until it grows again.
int threads();
void set_threads(int count);

// The CPUs this process may use, by NUMA node; empty where the system does not say.
std::vector<std::vector<int>> cpus_of_nodes();

// At least `bytes` of memory of the calling thread, 64-byte aligned, valid until the thread's next
// call with the same slot. Slot 0 is for whoever starts a loop, slot 1 for its items, slot 2 for
// who calls kernels that use the other two, slot 3 for who calls those.
void* scratch(int slot, std::size_t bytes);

}  // namespace moeserve
