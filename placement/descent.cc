// Columns below a threshold, by swaps: see columns.h.
#include <set>

#include "columns_common.h"

namespace moeserve {
namespace {

uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// A column being changed item by item: what each change would cost is kept up to date.
class Descent {
 public:
  Descent(const ColumnProblem& in, const Patterns& of)
      : in_(in), of_(of), hits_(in.patterns, 0), add_(in.items, 0), loses_(in.items, 0),
        alone_(in.items * in.items, 0), inside_(in.items, 0) {
    for (int32_t e = 0; e < in_.items; ++e)
      for (int32_t x = of_.start[e]; x < of_.start[e + 1]; ++x)
        add_[e] += in_.weight_P[of_.pattern[x]];
  }

  void clear() {
    while (!items_.empty()) take_out(items_.back());
  }

  void put_in(int32_t e) {
    for (int32_t x = of_.start[e]; x < of_.start[e + 1]; ++x) {
      const int32_t p = of_.pattern[x];
      inside_[e] = 0;
      count(p, -1);
      if (hits_[p]++ == 0) touched_ += in_.weight_P[p];
      inside_[e] = 1;
      count(p, 1);
    }
    inside_[e] = 1;
    items_.push_back(e);
    load_ += in_.load_E[e];
  }

  void take_out(int32_t e) {
    for (int32_t x = of_.start[e]; x < of_.start[e + 1]; ++x) {
      const int32_t p = of_.pattern[x];
      inside_[e] = 1;
      count(p, -1);
      if (--hits_[p] == 0) touched_ -= in_.weight_P[p];
      inside_[e] = 0;
      count(p, 1);
    }
    inside_[e] = 0;
    load_ -= in_.load_E[e];
    items_.erase(std::find(items_.begin(), items_.end(), e));
  }

  void complete(uint64_t& random) {
    while (int64_t(items_.size()) < in_.size) {
      int64_t best = kMost;
      int32_t pick = -1;
      for (int32_t e = 0; e < in_.items; ++e) {
        const int64_t noise = int64_t(next_random(random) % 1024);
        if (inside_[e]) continue;
        const int64_t with = add_[e] * kToken + tokens(e) * (kToken / 8192) * noise -
                             in_.price_E[e] + over(load_ + in_.load_E[e], false);
        if (with < best) best = with, pick = e;
      }
      if (pick < 0) return;
      if (in_.at_most && best >= 0 && !items_.empty()) return;
      put_in(pick);
    }
  }

  // The best change of one item for another (or, with fewer allowed, of none for one or one for
  // none) while it helps.
  void improve(Priced& found, std::set<std::vector<int32_t>>& met, int64_t threshold,
               int64_t most) {
    for (int64_t move = 0; move < 8 * in_.size; ++move) {
      note(found, met, threshold, most);
      int64_t best = 0;
      int32_t out = -1, in = -1;
      const int64_t now = over(load_, true);
      for (int32_t e : items_) {
        const int64_t lose = in_.price_E[e] - loses_[e] * kToken;
        const int64_t* alone = &alone_[int64_t(e) * in_.items];
        if (in_.at_most && items_.size() > 1)
          if (int64_t d = lose + over(load_ - in_.load_E[e], true) - now; d < best)
            best = d, out = e, in = -1;
        for (int32_t f = 0; f < in_.items; ++f) {
          if (inside_[f]) continue;
          int64_t d = lose + (add_[f] + alone[f]) * kToken - in_.price_E[f];
          if (d >= best) continue;
          d += over(load_ - in_.load_E[e] + in_.load_E[f], true) - now;
          if (d < best) best = d, out = e, in = f;
        }
      }
      if (in_.at_most && int64_t(items_.size()) < in_.size)
        for (int32_t f = 0; f < in_.items; ++f) {
          if (inside_[f]) continue;
          int64_t d = add_[f] * kToken - in_.price_E[f] + over(load_ + in_.load_E[f], true) - now;
          if (d < best) best = d, out = -1, in = f;
        }
      if (out < 0 && in < 0) return;
      if (out >= 0) take_out(out);
      if (in >= 0) put_in(in);
    }
    note(found, met, threshold, most);
  }

 private:
  // Adds (or takes away) what pattern p says at its present number of hits.
  void count(int32_t p, int64_t sign) {
    if (hits_[p] > 1) return;
    const int64_t w = sign * in_.weight_P[p];
    const int32_t* item = in_.item_PK + int64_t(p) * in_.width;
    if (hits_[p] == 0) {
      for (int64_t k = 0; k < in_.width && item[k] >= 0; ++k) add_[item[k]] += w;
      return;
    }
    int32_t only = -1;
    for (int64_t k = 0; only < 0 && k < in_.width && item[k] >= 0; ++k)
      if (inside_[item[k]]) only = item[k];
    loses_[only] += w;
    int64_t* alone = &alone_[int64_t(only) * in_.items];
    for (int64_t k = 0; k < in_.width && item[k] >= 0; ++k) alone[item[k]] += w;
  }

  int64_t tokens(int32_t e) const { return of_.start[e + 1] - of_.start[e]; }

  // Load outside the limits is charged: four tokens a choice, which is 16 units.
  int64_t over(int64_t load, bool whole) const {
    int64_t off = std::max<int64_t>(0, load - in_.most_load);
    if (whole) off += std::max<int64_t>(0, in_.least_load - load);
    return off > kMost / kToken ? kMost / 2 : kToken / 4 * off;
  }

  void note(Priced& found, std::set<std::vector<int32_t>>& met, int64_t threshold, int64_t most) {
    if (load_ < in_.least_load || load_ > in_.most_load) return;
    if (!in_.at_most && int64_t(items_.size()) < in_.size) return;
    std::vector<int32_t> items(items_);
    std::sort(items.begin(), items.end());
    int64_t reduced = touched_ * kToken;
    for (int32_t e : items) reduced -= in_.price_E[e];
    if (reduced >= threshold || int64_t(found.reduced_C.size()) >= most) return;
    if (met.insert(items).second) keep(found, items, in_.size, reduced);
  }

  const ColumnProblem& in_;
  const Patterns& of_;
  std::vector<int32_t> hits_, items_;
  std::vector<int64_t> add_;    // tokens that an item would bring
  std::vector<int64_t> loses_;  // tokens that only this item brings
  std::vector<int64_t> alone_;  // of these, those that use the other item too
  std::vector<char> inside_;
  int64_t load_ = 0, touched_ = 0;
};

}  // namespace

Priced descend(const ColumnProblem& in, int64_t starts, const int32_t* start_CM,
               int64_t threshold, int64_t most, uint64_t seed) {
  Priced found{};
  std::set<std::vector<int32_t>> met;
  Patterns of(in);
  Descent descent(in, of);
  for (int64_t c = 0; c < starts; ++c) {
    descent.clear();
    for (int64_t m = 0; m < in.size; ++m)
      if (const int32_t e = start_CM[c * in.size + m]; e >= 0) descent.put_in(e);
    descent.complete(seed);
    descent.improve(found, met, threshold, most);
  }
  return found;
}

}  // namespace moeserve
