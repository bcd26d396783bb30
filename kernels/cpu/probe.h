// How fast this machine can go at most: bytes read from memory, and multiply-adds by the
// instructions that the kernels are made of. What a roofline is measured with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moeserve {

// `what` is "read" (bytes), "int8", "bf16" or "fp32" (operations, two per multiply-add).
// The names of the ways this machine can do it, best first; none of them can raise SIGILL here.
std::vector<std::string> probe_ways(const std::string& what);

// Units per second of `threads` threads together, one figure per round of `seconds` each.
// `bytes` is the memory that "read" reads, all threads together: more than caches hold.
std::vector<double> probe(const std::string& what, const std::string& way, int threads, int rounds,
                          double seconds, int64_t bytes);

}  // namespace moeserve
