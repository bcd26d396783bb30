// Sets of experts for one device ("columns") against a price per expert: the pricing problems of a
// column generation, and covers of all experts by disjoint columns. Integers throughout: what is
// returned as a bound is one. Called through moeserve/placement/solvers/columns/pricing.py; the
// twin is moeserve/placement/solvers/columns/twin.py.
//
// Letters in shapes: P patterns (tokens with the same choices), K choices, E items (experts, or
// their copies), M items of a column, C columns. Costs are in units of 1/720720 token, so that a
// token can be divided equally among up to 16 items.
#pragma once

#include <cstdint>
#include <vector>

namespace moeserve {

struct ColumnProblem {
  int64_t patterns, width, items, size;  // a column has `size` items, or at most that
  bool at_most;
  const int32_t* item_PK;    // -1 behind the last choice; distinct
  const int32_t* weight_P;   // tokens of the pattern; their sum fits 31 bits
  const int64_t* load_E;
  int64_t least_load, most_load;  // a column outside is not allowed
  const int64_t* price_E;    // unread by `cover`
};

struct Limits {
  int64_t nodes;
  double seconds;  // from the call; infinite for none
  bool cpu;        // of this thread's CPU time, not of the clock
};

struct Priced {
  std::vector<int32_t> item_CM;    // ascending; -1 behind the last
  std::vector<int64_t> reduced_C;  // tokens touched minus the prices of the items
  std::vector<int64_t> floor_E;    // no allowed column with the item has a reduced cost below
  int64_t nodes;
};

// Columns whose reduced cost is below `threshold`, by depth-first search, all of them when
// `complete`. After `most` columns it is cut short, or (`fewer`) the threshold falls to the median
// of these and the search goes on. `floor_E` holds at any limit; without one, it is the cheapest
// column with the item, or the threshold.
Priced price(const ColumnProblem& in, int64_t threshold, int64_t most, bool fewer, Limits limits,
             bool* complete);

// Columns below `threshold` met on descents by swaps. Row c of `start_CM` are the items that a
// descent begins with (-1: none), completed greedily with some noise. `floor_E` is unused.
Priced descend(const ColumnProblem& in, int64_t starts, const int32_t* start_CM,
               int64_t threshold, int64_t most, uint64_t seed);

struct Cover {
  std::vector<int32_t> block_E;  // empty when there is none within the budget
  int64_t value;                 // its reduced cost: the sum over its columns
  bool complete;
  int64_t nodes;
};

// The cover of all items by `items / size` disjoint columns whose reduced costs sum to the least,
// below `budget`. The columns are given in ascending order of their reduced costs, none negative;
// one column of the cover may be another, whose reduced cost is more than `whole`.
Cover cover(const ColumnProblem& in, int64_t columns, const int32_t* item_CM,
            const int64_t* reduced_C, int64_t whole, int64_t budget, Limits limits);

}  // namespace moeserve
