// What the searches of columns.h share: limits, the patterns of each item, columns found.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "columns.h"

namespace moeserve {

constexpr int64_t kToken = 720720;  // divisible by 1..16, and by s (s + 1) up to s = 15
constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 4;

class Allowance {
 public:
  explicit Allowance(Limits limits) : limits_(limits), began_(now()) {}

  // Counts a node; false once a limit is reached.
  bool spend() {
    ++nodes;
    if (nodes > limits_.nodes) over_ = true;
    if ((nodes & 15) == 0 && limits_.seconds < 1e9 && now() - began_ > limits_.seconds)
      over_ = true;
    return !over_;
  }
  bool over() const { return over_; }

  int64_t nodes = 0;

 private:
  double now() const {
    timespec time{};
    clock_gettime(limits_.cpu ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
  }

  Limits limits_;
  double began_;
  bool over_ = false;
};

// Patterns of each item, as one array with offsets.
struct Patterns {
  std::vector<int32_t> start, pattern;
  explicit Patterns(const ColumnProblem& in) : start(in.items + 1, 0) {
    const int64_t cells = in.patterns * in.width;
    for (int64_t i = 0; i < cells; ++i)
      if (in.item_PK[i] >= 0) ++start[in.item_PK[i] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    pattern.resize(start.back());
    std::vector<int32_t> fill(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < cells; ++i)
      if (in.item_PK[i] >= 0) pattern[fill[in.item_PK[i]]++] = int32_t(i / in.width);
  }
};

// At least the sum of the `most` largest of x: at any `tau`, that many times `tau` and what those
// above it have more. Near the sum where about `most` are above; `tau` is moved towards that.
inline int64_t largest(const int32_t* x, int64_t count, int64_t most, int32_t& tau) {
  int64_t least = kMost;
  int32_t next = tau;
  for (int pass = 0; pass < 3; ++pass) {
    int32_t above = 0;
    int64_t sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      above += x[j] > next;
      sum += x[j] > next ? x[j] : 0;
    }
    const int64_t with = sum + (most - above) * int64_t(next);
    if (with < least) least = with, tau = next;
    if (above == most) break;
    // As if what is above fell off exponentially.
    const int64_t mean = above ? sum / above - next : next / 2;
    const int64_t wanted = next + mean * 2 * (above - most) / (above + most);
    next = int32_t(std::clamp<int64_t>(wanted, 0, int64_t(1) << 30));
  }
  return least;
}

inline void keep(Priced& found, std::vector<int32_t> items, int64_t size, int64_t reduced) {
  std::sort(items.begin(), items.end());
  items.resize(size, -1);
  found.item_CM.insert(found.item_CM.end(), items.begin(), items.end());
  found.reduced_C.push_back(reduced);
}

// Leaves only the columns below the median, which is returned.
inline int64_t halve(Priced& found, int64_t size) {
  std::vector<int64_t>& reduced = found.reduced_C;
  std::vector<int64_t> sorted(reduced);
  std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
  const int64_t median = sorted[sorted.size() / 2];
  size_t to = 0;
  for (size_t c = 0; c < reduced.size(); ++c) {
    if (reduced[c] >= median) continue;
    std::copy_n(&found.item_CM[c * size], size, &found.item_CM[to * size]);
    reduced[to++] = reduced[c];
  }
  reduced.resize(to);
  found.item_CM.resize(to * size);
  return median;
}

}  // namespace moeserve
