// Columns below a threshold, exactly: see columns.h.
#include "columns_common.h"

namespace moeserve {
namespace {

constexpr int64_t kWidest = 16;

// Candidates that can still join the chosen items, with what the tokens that are not touched yet
// say about them: `n` tokens use each, `pair` tokens use both.
struct Level {
  int64_t count = 0;
  std::vector<int32_t> item, n, pair;
  std::vector<int32_t> tau;             // about what is paired with the last of its best partners
  std::vector<int64_t> share;           // no column with this candidate is cheaper by its share
  std::vector<int32_t> order;           // of the candidates, in which columns begin with them
  std::vector<int64_t> behind;          // in that order: what those behind add at the least
  std::vector<int64_t> least;           // the same, its load charged at `rate`
  int64_t rate = 0;                     // of a unit of load, against the limit: see `charge`
  std::vector<int64_t> paired;          // with its best partners but one: see `glance`
  int32_t* row(int64_t i) { return &pair[i * count]; }
};

class Pricing {
 public:
  Pricing(const ColumnProblem& in, int64_t threshold, int64_t most, bool fewer, Limits limits)
      : in_(in), threshold_(threshold), most_(most), fewer_(fewer), allowance_(limits), of_(in),
        touched_(in.patterns, 0), seat_(in.items, -1), level_(in.size + 1) {
    other_.assign(of_.pattern.size() * (in.width - 1), -1);
    for (int32_t e = 0; e < in.items; ++e)
      for (int32_t x = of_.start[e]; x < of_.start[e + 1]; ++x) {
        const int32_t* item = in.item_PK + int64_t(of_.pattern[x]) * in.width;
        int32_t* other = other_.data() + x * (in.width - 1);
        for (int64_t k = 0; k < in.width && item[k] >= 0; ++k)
          if (item[k] != e) *other++ = item[k];
      }
    Level& all = level_[0];
    const int64_t E = all.count = in.items;
    const int64_t loads = std::accumulate(in.load_E, in.load_E + E, int64_t(0));
    const int64_t prices = std::accumulate(in.price_E, in.price_E + E, int64_t(0),
                                           [](int64_t a, int64_t b) { return a + std::abs(b); });
    if (loads > 0 && in.most_load < loads) most_rate_ = 4 * (prices / loads);
    if (loads > 0 && in.least_load > 0) least_rate_ = -4 * (prices / loads);
    all.item.resize(E);
    std::iota(all.item.begin(), all.item.end(), 0);
    all.n.assign(E, 0);
    all.tau.assign(E, 0);
    all.pair.assign(E * E, 0);
    for (int64_t p = 0; p < in.patterns; ++p) {
      const int32_t* item = in.item_PK + p * in.width;
      for (int64_t i = 0; i < in.width && item[i] >= 0; ++i) {
        all.n[item[i]] += in.weight_P[p];
        for (int64_t j = 0; j < i; ++j) {
          all.pair[item[i] * E + item[j]] += in.weight_P[p];
          all.pair[item[j] * E + item[i]] += in.weight_P[p];
        }
      }
    }
  }

  Priced run(bool* complete) {
    visit(0, 0, 0, -kMost);
    *complete = !stopped_;
    found_.nodes = allowance_.nodes;
    set_floors();
    return std::move(found_);
  }

 private:
  bool allowed(int64_t load) const { return in_.least_load <= load && load <= in_.most_load; }

  void hit(int64_t value, int64_t load, int32_t a, int32_t b) {
    if (value >= threshold_ || !allowed(load)) return;
    std::vector<int32_t> items(chosen_);
    if (a >= 0) items.push_back(a);
    if (b >= 0) items.push_back(b);
    keep(found_, std::move(items), in_.size, value);
    if (int64_t(found_.reduced_C.size()) < most_) return;
    if (fewer_)
      threshold_ = halve(found_, in_.size);
    else
      stopped_ = true;
  }

  // What was not looked into, with the first item that is being looked into: no column there is
  // cheaper than that.
  void leave(int64_t lower) {
    if (int64_t(left_.size()) <= first_at_) left_.resize(first_at_ + 1, kMost);
    left_[first_at_] = std::min(left_[first_at_], lower);
  }

  // Columns that were left unseen begin with an item at some place in the order of the first
  // level, and have no item from before it.
  void set_floors() {
    found_.floor_E.assign(in_.items, threshold_);
    const Level& all = level_[0];
    int64_t least = kMost;
    if (all.order.empty() && !left_.empty())
      for (int64_t& floor : found_.floor_E) floor = std::min(floor, left_[0]);
    for (size_t i = 0; i < all.order.size(); ++i) {
      if (i < left_.size()) least = std::min(least, left_[i]);
      int64_t& floor = found_.floor_E[all.item[all.order[i]]];
      floor = std::min(floor, least);
    }
    for (size_t c = 0; c < found_.reduced_C.size(); ++c)
      for (int64_t m = 0; m < in_.size; ++m)
        if (const int32_t e = found_.item_CM[c * in_.size + m]; e >= 0)
          found_.floor_E[e] = std::min(found_.floor_E[e], found_.reduced_C[c]);
  }

  void last_one(Level& at, int64_t value, int64_t load) {
    for (int64_t i = 0; i < at.count && !stopped_; ++i) {
      const int32_t e = at.item[i];
      hit(value + at.n[i] * kToken - in_.price_E[e], load + in_.load_E[e], e, -1);
    }
  }

  void last_two(Level& at, int64_t value, int64_t load) {
    for (int64_t i = 0; i < at.count && !stopped_; ++i) {
      const int32_t e = at.item[i];
      const int64_t with_e = value + at.n[i] * kToken - in_.price_E[e];
      const int64_t load_e = load + in_.load_E[e];
      if (in_.at_most) hit(with_e, load_e, e, -1);
      const int32_t* pair = at.row(i);
      for (int64_t j = i + 1; j < at.count; ++j) {
        const int32_t f = at.item[j];
        const int64_t both = with_e + (at.n[j] - pair[j]) * kToken - in_.price_E[f];
        if (both < threshold_) hit(both, load_e + in_.load_E[f], e, f);
        if (stopped_) break;
      }
    }
  }

  // What `partners + 1` items cost at the least, as the share of one of them: n tokens use it, and
  // the pairs with its partners hold up to `with` of these. A token touched by j of the items is
  // divided equally among them. 1 / j is convex in j, so
  // 1 / j >= 2 / (s + 1) - (j - 1) / (s (s + 1)) for every s; and j - 1 sums up to the pairs.
  int64_t share_of(int64_t n, int64_t with, int64_t partners) const {
    // The best s is the whole part of with / n, plus 1.
    const int64_t most = std::min(in_.width, partners + 1);
    if (n <= 0) return 0;
    if (most <= kWidest && with >= n * (most - 1)) return n * (kToken / most);
    const int64_t s = std::min(with / n + 1, std::min(most, kWidest - 1));
    return std::max<int64_t>(0, 2 * n * (kToken / (s + 1)) - with * (kToken / (s * (s + 1))));
  }

  void share(Level& at, int64_t partners) {
    at.share.resize(at.count);
    at.paired.resize(at.count);
    for (int64_t i = 0; i < at.count; ++i) {
      const int64_t with = partners ? largest(at.row(i), at.count, partners, at.tau[i]) : 0;
      at.paired[i] = partners ? with - at.tau[i] : 0;
      at.share[i] = share_of(at.n[i], with, partners) - in_.price_E[at.item[i]];
    }
  }

  // What the load of an allowed column is off its limit, times the rate, is never positive: added
  // to what its items cost at the least, it leaves a bound. A positive rate is one of the most, a
  // negative one of the least load that is allowed.
  int64_t charge(int64_t rate, int64_t load) const {
    if (rate == 0) return 0;
    return rate * (load - (rate > 0 ? in_.most_load : in_.least_load));
  }

  // The least that `take` candidates add at this rate; how far their load is off the limit.
  int64_t sum_at(Level& at, int64_t rate, int64_t load, int64_t take, int64_t* off) {
    keyed_.resize(at.count);
    for (int64_t i = 0; i < at.count; ++i) {
      const int64_t own = in_.load_E[at.item[i]], x = joining(at.share[i] + rate * own);
      keyed_[i] = {x, in_.at_most && x == 0 ? 0 : own};
    }
    std::nth_element(keyed_.begin(), keyed_.begin() + take - 1, keyed_.end());
    int64_t sum = charge(rate, load);
    *off = load;
    for (int64_t i = 0; i < take; ++i) sum += keyed_[i].first, *off += keyed_[i].second;
    return sum;
  }

  // Takes the rate at which the bound on the level is highest, or nearly: it is concave in it.
  void set_rate(Level& at, int64_t value, int64_t load, int64_t take) {
    int64_t off = 0, rate = at.rate;
    int64_t best = sum_at(at, rate, load, take, &off);
    int64_t low = least_rate_, high = most_rate_;
    for (int step = 0; step < 6 && low < high && value + best < threshold_; ++step) {
      const bool more = rate > 0 ? off > in_.most_load
                                 : rate < 0 ? off >= in_.least_load : off > in_.most_load;
      if (rate == 0 && !more && off >= in_.least_load) break;
      (more ? low : high) = rate;
      int64_t next = rate == 0 ? (more ? high : low) / 8 : more == (rate > 0) ? 2 * rate : rate / 2;
      if (next <= low || next >= high) next = low + (high - low) / 2;
      if (next == rate) break;
      rate = next;
      if (const int64_t sum = sum_at(at, rate, load, take, &off); sum > best)
        best = sum, at.rate = rate;
    }
    at.least.resize(at.count);
    for (int64_t i = 0; i < at.count; ++i)
      at.least[i] = at.share[i] + at.rate * in_.load_E[at.item[i]];
  }

  int64_t joining(int64_t least) const { return in_.at_most ? std::min<int64_t>(0, least) : least; }

  // Drops candidates that no column below the threshold can have; those that stay into `kept_`.
  // The least that `rest` of them add; kMost when nothing can come of it.
  int64_t narrow(Level& at, int64_t value, int64_t load, int64_t rest) {
    for (;;) {
      if (at.count < rest && !in_.at_most) return kMost;
      share(at, rest - 1);
      const int64_t take = std::min(rest, at.count);
      kept_.clear();
      if (take == 0) return 0;
      set_rate(at, value, load, take);
      sorted_.resize(at.count);
      for (int64_t i = 0; i < at.count; ++i) sorted_[i] = joining(at.least[i]);
      std::nth_element(sorted_.begin(), sorted_.begin() + take - 1, sorted_.end());
      const int64_t dearest = sorted_[take - 1];
      const int64_t sum = std::accumulate(sorted_.begin(), sorted_.begin() + take,
                                          charge(at.rate, load));
      if (value + sum >= threshold_) return kMost;
      const int64_t others = take < rest ? sum : sum - dearest;
      for (int64_t i = 0; i < at.count; ++i)
        if (at.least[i] <= dearest || value + others + at.least[i] < threshold_)
          kept_.push_back(int32_t(i));
      if (int64_t(kept_.size()) >= at.count - at.count / 8) return sum;
      take_only(at, kept_);
    }
  }

  // Keeps these candidates, in this order.
  void take_only(Level& at, const std::vector<int32_t>& kept) {
    const int64_t old = at.count, count = int64_t(kept.size());
    Level& to = spare_;
    to.count = count;
    to.item.resize(count);
    to.n.resize(count);
    to.tau.resize(count);
    to.share.resize(count);
    to.least.resize(count);
    to.paired.resize(count);
    if (int64_t(to.pair.size()) < count * count) to.pair.resize(count * count);
    for (int64_t i = 0; i < count; ++i) {
      to.item[i] = at.item[kept[i]];
      to.n[i] = at.n[kept[i]];
      to.tau[i] = at.tau[kept[i]];
      to.share[i] = at.share[kept[i]];
      to.least[i] = at.least[kept[i]];
      to.paired[i] = at.paired[kept[i]];
      const int32_t* from = &at.pair[kept[i] * old];
      int32_t* into = &to.pair[i * count];
      for (int64_t j = 0; j < count; ++j) into[j] = from[kept[j]];
    }
    std::swap(at.count, to.count);
    at.item.swap(to.item);
    at.n.swap(to.n);
    at.tau.swap(to.tau);
    at.share.swap(to.share);
    at.least.swap(to.least);
    at.paired.swap(to.paired);
    at.pair.swap(to.pair);
  }

  bool loads_fit(const Level& at, int64_t load, int64_t rest) {
    loads_.resize(at.count);
    for (int64_t i = 0; i < at.count; ++i) loads_[i] = in_.load_E[at.item[i]];
    std::nth_element(loads_.begin(), loads_.begin() + rest - 1, loads_.end());
    if (std::accumulate(loads_.begin(), loads_.begin() + rest, load) > in_.most_load) return false;
    std::nth_element(loads_.begin(), loads_.begin() + rest - 1, loads_.end(),
                     std::greater<int64_t>());
    return std::accumulate(loads_.begin(), loads_.begin() + rest, load) >= in_.least_load;
  }

  void visit(int64_t depth, int64_t value, int64_t load, int64_t lower) {
    if (stopped_ || !allowance_.spend()) {
      stopped_ = true;
      return leave(lower);
    }
    Level& at = level_[depth];
    const int64_t rest = in_.size - depth;
    if (in_.at_most && depth > 0) hit(value, load, -1, -1);
    if (rest <= 2) {
      if (rest == 2) last_two(at, value, load);
      if (rest == 1) last_one(at, value, load);
      if (stopped_) leave(lower);
      return;
    }
    if (!in_.at_most && (at.count < rest || !loads_fit(at, load, rest))) return;
    if (narrow(at, value, load, rest) >= kMost) return;
    at.order = kept_;
    // Items of many tokens first: without them, little is left for the pairs of the others.
    rank_.resize(at.count);
    for (int32_t c : at.order) rank_[c] = depth ? at.share[c] - at.n[c] * (kToken / 4) : -at.n[c];
    std::sort(at.order.begin(), at.order.end(), [&](int32_t a, int32_t b) {
      return rank_[a] != rank_[b] ? rank_[a] < rank_[b] : at.item[a] < at.item[b];
    });
    // The least that `rest - 1` candidates behind each add.
    const int64_t count = int64_t(at.order.size());
    at.behind.assign(count, 0);
    sorted_.clear();
    int64_t sum = 0;
    for (int64_t i = count - 1; i >= 0; --i) {
      at.behind[i] = sum;
      const int64_t x = joining(at.least[at.order[i]]);
      if (int64_t(sorted_.size()) == rest - 1) {
        if (x >= sorted_.back()) continue;
        sum -= sorted_.back();
        sorted_.pop_back();
      }
      sorted_.insert(std::upper_bound(sorted_.begin(), sorted_.end(), x), x);
      sum += x;
    }
    for (int64_t i = 0; i < count && (in_.at_most || i + rest <= count); ++i) {
      const int64_t below =
          value + charge(at.rate, load) + at.least[at.order[i]] + at.behind[i];
      if (below >= threshold_) continue;
      if (depth == 0) first_at_ = i;
      if (stopped_)
        leave(below);
      else
        descend_into(depth, i, value, load, below);
    }
  }

  // A first look at the columns with the candidate that is i-th in order and none before it: into
  // `kept_` the candidates that such a column below the threshold can have, judged by the pairs as
  // they are. False when there is no such column.
  bool glance(Level& at, int64_t i, int64_t value, int64_t load, int64_t rest) {
    const int32_t* pair = at.row(at.order[i]);
    const int64_t others = int64_t(at.order.size()) - i - 1, take = std::min(rest, others);
    const int32_t* next = at.order.data() + i + 1;
    kept_.clear();
    if (in_.at_most ? take == 0 : others < rest) return in_.at_most;
    first_.resize(others);
    sorted_.resize(others);
    for (int64_t j = 0; j < others; ++j) {
      const int32_t c = next[j], e = at.item[c];
      first_[j] = share_of(at.n[c] - pair[c], at.paired[c], rest - 1) - in_.price_E[e] +
                  at.rate * in_.load_E[e];
      sorted_[j] = joining(first_[j]);
    }
    std::nth_element(sorted_.begin(), sorted_.begin() + take - 1, sorted_.end());
    const int64_t dearest = sorted_[take - 1];
    const int64_t sum = std::accumulate(sorted_.begin(), sorted_.begin() + take,
                                        charge(at.rate, load));
    if (!in_.at_most && value + sum >= threshold_) return false;
    const int64_t fewer = take < rest ? sum : sum - dearest;
    for (int64_t j = 0; j < others; ++j)
      if (value + fewer + first_[j] < threshold_ || (!in_.at_most && first_[j] <= dearest))
        kept_.push_back(next[j]);
    return true;
  }

  // The columns with the candidate that is i-th in order and none before it.
  void descend_into(int64_t depth, int64_t i, int64_t value, int64_t load, int64_t below) {
    Level &at = level_[depth], &to = level_[depth + 1];
    const int32_t* with = at.row(at.order[i]);
    const int32_t e = at.item[at.order[i]];
    const int64_t with_e = value + at.n[at.order[i]] * kToken - in_.price_E[e];
    const int64_t load_e = load + in_.load_E[e];
    if (!glance(at, i, with_e, load_e, in_.size - depth - 1)) return;
    to.rate = at.rate;
    const int64_t count = to.count = int64_t(kept_.size());
    to.item.resize(count);
    to.n.resize(count);
    to.tau.resize(count);
    if (int64_t(to.pair.size()) < count * count) to.pair.resize(count * count);
    for (int64_t a = 0; a < count; ++a) {
      const int32_t c = kept_[a];
      seat_[at.item[c]] = int32_t(a);
      to.item[a] = at.item[c];
      to.n[a] = at.n[c] - with[c];
      to.tau[a] = at.tau[c];
      const int32_t* from = at.row(c);
      int32_t* into = &to.pair[a * count];
      for (int64_t b = 0; b < count; ++b) into[b] = from[kept_[b]];
    }
    const size_t mark = trail_.size();
    touch(e, to);
    for (int64_t a = 0; a < count; ++a) seat_[to.item[a]] = -1;
    chosen_.push_back(e);
    visit(depth + 1, with_e, load_e, below);
    chosen_.pop_back();
    for (size_t t = mark; t < trail_.size(); ++t) touched_[trail_[t]] = 0;
    trail_.resize(mark);
  }

  // Marks the patterns of e, and takes those that were not from the pairs of the next level.
  void touch(int32_t e, Level& to) {
    int32_t seat[256];
    const int64_t others = in_.width - 1;
    for (int32_t x = of_.start[e]; x < of_.start[e + 1]; ++x) {
      const int32_t p = of_.pattern[x];
      if (touched_[p]) continue;
      touched_[p] = 1;
      trail_.push_back(p);
      const int32_t* other = &other_[x * others];
      int seats = 0;
      for (int64_t k = 0; k < others && other[k] >= 0; ++k) {
        seat[seats] = seat_[other[k]];
        seats += seat[seats] >= 0;
      }
      const int32_t w = in_.weight_P[p];
      for (int a = 1; a < seats; ++a)
        for (int b = 0; b < a; ++b) {
          to.pair[seat[a] * to.count + seat[b]] -= w;
          to.pair[seat[b] * to.count + seat[a]] -= w;
        }
    }
  }

  const ColumnProblem& in_;
  int64_t threshold_, most_;
  bool fewer_;
  Allowance allowance_;
  Patterns of_;
  std::vector<char> touched_;
  std::vector<int32_t> other_;  // beside the items in `of_`: the other items of the pattern
  std::vector<int32_t> trail_, chosen_, kept_;
  std::vector<int32_t> seat_;  // item -> candidate of the next level, or -1
  std::vector<int64_t> sorted_, loads_, first_, rank_;
  std::vector<std::pair<int64_t, int64_t>> keyed_;
  int64_t least_rate_ = 0, most_rate_ = 0;
  std::vector<Level> level_;
  Level spare_;
  Priced found_{};
  bool stopped_ = false;
  int64_t first_at_ = 0;       // the place of the first item in the order of the first level
  std::vector<int64_t> left_;  // by that place: see `leave`
};

}  // namespace

Priced price(const ColumnProblem& in, int64_t threshold, int64_t most, bool fewer, Limits limits,
             bool* complete) {
  return Pricing(in, threshold, most, fewer, limits).run(complete);
}

}  // namespace moeserve
