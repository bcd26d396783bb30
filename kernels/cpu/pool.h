// A small pool of threads that runs a counted loop.
//
// Items are handed out one at a time to whoever is free, the caller included, so the loop ends
// even if no worker ever wakes. Which thread runs an item must not matter to its result.
// A second caller that finds the pool busy, and a call from inside an item, run their loop alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moeserve {

using Item = void (*)(void* context, int64_t index);

void run_items(int64_t count, Item item, void* context);

// Threads that share a loop, the caller included.
int threads();
void set_threads(int count);

// At least `bytes` of memory of the calling thread, 64-byte aligned, valid until the thread's next
// call with the same slot. Slot 0 is for whoever starts a loop, slot 1 for its items.
void* scratch(int slot, std::size_t bytes);

}  // namespace moeserve
