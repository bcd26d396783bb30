// Covers of all items by columns: see columns.h.
#include "columns_common.h"

namespace moeserve {
namespace {

int64_t touched(const ColumnProblem& in, const Patterns& of, const int32_t* item, int64_t count) {
  std::vector<char> seen(in.patterns, 0);
  int64_t tokens = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int32_t x = of.start[item[i]]; x < of.start[item[i] + 1]; ++x)
      if (char& met = seen[of.pattern[x]]; !met) met = 1, tokens += in.weight_P[of.pattern[x]];
  return tokens * kToken;
}

class Covering {
 public:
  Covering(const ColumnProblem& in, int64_t columns, const int32_t* item_CM,
           const int64_t* reduced_C, int64_t whole, int64_t budget, Limits limits)
      : in_(in), of_(in), item_CM_(item_CM), reduced_C_(reduced_C), whole_(whole),
        best_(budget), blocks_(in.items / in.size), allowance_(limits),
        state_(in.items, kOpen), list_(in.items + blocks_ + 2) {
    list_[0].resize(columns);
    std::iota(list_[0].begin(), list_[0].end(), 0);
  }

  Cover run() {
    visit(0, 0);
    return {block_E_, best_, !allowance_.over(), allowance_.nodes};
  }

 private:
  enum : char { kOpen, kCovered, kImplied };

  void visit(int64_t depth, int64_t value) {
    if (!allowance_.spend()) return;
    if (int64_t(chosen_.size()) == blocks_ - 1) return finish(value);
    std::vector<int32_t>& list = list_[depth];
    const int64_t places = in_.size - implied_;  // left in the implied block
    int32_t pick = -1;
    for (bool fewer = true; fewer;) {
      int64_t barred = 0;
      pick = survey(list, &barred);
      if (barred > places) return;
      const int64_t lower = value + remaining(barred, places);
      if (lower >= best_) return;
      // A column is dropped when it and the least of the items outside cost too much.
      const size_t before = list.size();
      list.erase(std::remove_if(list.begin(), list.end(), [&](int32_t c) {
        int64_t own = 0;
        for (int64_t m = 0; m < in_.size; ++m) own += least_[item_CM_[c * in_.size + m]];
        return lower + reduced_C_[c] - own / in_.size - 1 >= best_;
      }), list.end());
      fewer = list.size() < before - before / 8;
    }
    for (size_t i = 0; i < list.size() && !allowance_.over(); ++i) {
      const int32_t* item = item_CM_ + list[i] * in_.size;
      if (std::find(item, item + in_.size, pick) == item + in_.size) continue;
      const int64_t with = value + reduced_C_[list[i]];
      if (with + (implied_ ? whole_ + 1 : 0) >= best_) break;
      for (int64_t m = 0; m < in_.size; ++m) state_[item[m]] = kCovered;
      chosen_.push_back(list[i]);
      filter(depth, best_ - with);
      visit(depth + 1, with);
      chosen_.pop_back();
      for (int64_t m = 0; m < in_.size; ++m) state_[item[m]] = kOpen;
    }
    if (places > 0 && value + whole_ + 1 < best_ && !allowance_.over()) {
      state_[pick] = kImplied;
      ++implied_;
      filter(depth, best_ - value - whole_ - 1);
      visit(depth + 1, value);
      --implied_;
      state_[pick] = kOpen;
    }
  }

  // The open item in the fewest columns; the cheapest column of each into `least_` and `open_`.
  // `barred` items have none.
  int32_t survey(const std::vector<int32_t>& list, int64_t* barred) {
    number_.assign(in_.items, 0);
    least_.assign(in_.items, 0);
    for (int32_t c : list)
      for (int64_t m = 0; m < in_.size; ++m) {
        const int32_t e = item_CM_[c * in_.size + m];
        if (number_[e]++ == 0) least_[e] = reduced_C_[c];
      }
    int32_t pick = -1;
    open_.clear();
    for (int32_t e = 0; e < in_.items; ++e) {
      if (state_[e] != kOpen) continue;
      if (number_[e] == 0) ++*barred;
      else open_.push_back(least_[e]);
      if (pick < 0 || number_[e] < number_[pick]) pick = e;
    }
    return pick;
  }

  // Into the next list: columns of open items only, below what is left.
  void filter(int64_t depth, int64_t left) {
    std::vector<int32_t>& to = list_[depth + 1];
    to.clear();
    for (int32_t c : list_[depth]) {
      if (reduced_C_[c] >= left) break;
      const int32_t* item = item_CM_ + c * in_.size;
      bool open = true;
      for (int64_t m = 0; m < in_.size && open; ++m) open = state_[item[m]] == kOpen;
      if (open) to.push_back(c);
    }
  }

  // What the open items cost at the least: an m-th of the cheapest column of each, except those
  // that end in the implied block.
  int64_t remaining(int64_t barred, int64_t places) {
    const int64_t all = std::accumulate(open_.begin(), open_.end(), int64_t(0));
    const int64_t spared = std::min<int64_t>(places - barred, int64_t(open_.size()));
    std::nth_element(open_.begin(), open_.begin() + spared, open_.end(), std::greater<int64_t>());
    const int64_t with = all - std::accumulate(open_.begin(), open_.begin() + spared, int64_t(0));
    const int64_t implied = whole_ + 1 + with / in_.size;
    if (implied_ || barred) return implied;
    return std::min(implied, all / in_.size);
  }

  void finish(int64_t value) {
    std::vector<int32_t> last;
    for (int32_t e = 0; e < in_.items; ++e)
      if (state_[e] != kCovered) last.push_back(e);
    int64_t load = 0, reduced = touched(in_, of_, last.data(), int64_t(last.size()));
    for (int32_t e : last) load += in_.load_E[e], reduced -= in_.price_E[e];
    if (load < in_.least_load || load > in_.most_load || value + reduced >= best_) return;
    best_ = value + reduced;
    block_E_.assign(in_.items, int32_t(blocks_ - 1));
    for (size_t b = 0; b < chosen_.size(); ++b)
      for (int64_t m = 0; m < in_.size; ++m)
        block_E_[item_CM_[chosen_[b] * in_.size + m]] = int32_t(b);
  }

  const ColumnProblem& in_;
  Patterns of_;
  const int32_t* item_CM_;
  const int64_t* reduced_C_;
  int64_t whole_, best_, blocks_, implied_ = 0;
  Allowance allowance_;
  std::vector<char> state_;
  std::vector<std::vector<int32_t>> list_;
  std::vector<int32_t> chosen_, block_E_, number_;
  std::vector<int64_t> open_, least_;
};

}  // namespace

Cover cover(const ColumnProblem& in, int64_t columns, const int32_t* item_CM,
            const int64_t* reduced_C, int64_t whole, int64_t budget, Limits limits) {
  return Covering(in, columns, item_CM, reduced_C, whole, budget, limits).run();
}

}  // namespace moeserve
