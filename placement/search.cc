#include "search.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

namespace moeserve {
namespace {

uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Tokens of each slot in ascending order, as one array with offsets.
struct Tokens {
  std::vector<int32_t> start, token;
  Tokens(int64_t tokens, int64_t width, int64_t slots, const int32_t* slot_TK)
      : start(slots + 1, 0) {
    for (int64_t i = 0; i < tokens * width; ++i)
      if (slot_TK[i] >= 0) ++start[slot_TK[i] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    token.resize(start.back());
    std::vector<int32_t> fill(start.begin(), start.end() - 1);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < width; ++k)
        if (int32_t s = slot_TK[t * width + k]; s >= 0) token[fill[s]++] = int32_t(t);
  }
};

constexpr int64_t kLane = 16;  // tokens taken at a time; rows are padded to a multiple
typedef uint8_t Bytes __attribute__((vector_size(kLane)));
typedef uint16_t Halves __attribute__((vector_size(kLane)));

int64_t total(Halves v) {
  int64_t sum = 0;
  for (int i = 0; i < kLane / 2; ++i) sum += v[i];
  return sum;
}

// What tokens pay when the slot that `a` use goes from place 1 to place 2 and that of `b` back.
// Tokens of both stay where they are.
int64_t places_of_swap(int64_t tokens, const uint8_t* a, const uint8_t* b, const uint8_t* count1,
                       const uint8_t* count2, const uint8_t* price1, const uint8_t* price2) {
  int64_t sum = 0;
  for (int64_t block = 0; block < tokens; block += 64 * kLane) {
    const int64_t end = std::min(tokens, block + 64 * kLane);
    Halves more = {}, less = {};
    for (int64_t t = block; t < end; t += kLane) {
      Bytes u, v, c1, c2, p1, p2;
      std::memcpy(&u, a + t, kLane);
      std::memcpy(&v, b + t, kLane);
      std::memcpy(&c1, count1 + t, kLane);
      std::memcpy(&c2, count2 + t, kLane);
      std::memcpy(&p1, price1 + t, kLane);
      std::memcpy(&p2, price2 + t, kLane);
      const Bytes go = u & ~v, come = v & ~u;
      const Bytes added = (go & (Bytes)(c2 == 0) & p2) | (come & (Bytes)(c1 == 0) & p1);
      const Bytes freed = (go & (Bytes)(c1 == 1) & p1) | (come & (Bytes)(c2 == 1) & p2);
      more += ((Halves)added & 255) + ((Halves)added >> 8);
      less += ((Halves)freed & 255) + ((Halves)freed >> 8);
    }
    sum += total(more) - total(less);
  }
  return sum;
}

class Annealer {
 public:
  Annealer(const LayerGrouping& in, int32_t* device_S)
      : in_(in), device_(device_S), lists_(in.tokens, in.width, in.slots, in.slot_TK),
        row_((in.tokens + kLane - 1) / kLane * kLane), count_DT_(in.devices * row_, 0),
        price_DT_(padded(in.weight_DT, in.devices)), load_DW_(in.devices * in.workloads, 0),
        uses_ST_(in.slots * row_, 0) {
    if (in.nodes > 1) {
      count_NT_.assign(in.nodes * row_, 0);
      price_NT_ = padded(in.weight_NT, in.nodes);
    }
    for (int64_t s = 0; s < in.slots; ++s) {
      int64_t d = device_[s], n = in.node_D[d];
      for (int32_t i = lists_.start[s]; i < lists_.start[s + 1]; ++i) {
        int64_t t = lists_.token[i];
        ++count_DT_[d * row_ + t];
        if (in.nodes > 1) ++count_NT_[n * row_ + t];
        uses_ST_[s * row_ + t] = 0xFF;
      }
      for (int64_t w = 0; w < in.workloads; ++w)
        load_DW_[d * in.workloads + w] += in.load_SW[s * in.workloads + w];
    }
  }

  GroupedLayer run() {
    GroupedLayer now{whole_cost(), whole_excess()}, best = now;
    std::vector<int32_t> kept(device_, device_ + in_.slots);
    uint64_t random = in_.seed;
    for (int64_t step = 0; step < in_.steps; ++step) {
      int64_t i = int64_t(next_random(random) % uint64_t(in_.slots));
      int64_t j = int64_t(next_random(random) % uint64_t(in_.slots));
      int64_t draw = in_.draw[next_random(random) & 1023];
      if (device_[i] == device_[j]) continue;
      int64_t left = in_.steps - step;
      int64_t heat = in_.heat * left / in_.steps * left / in_.steps;
      int64_t room = heat * draw >> 10;
      int64_t excess = excess_of_swap(i, j);
      int64_t linear = excess * in_.penalty + price_of_swap(i, j) + bond_of_swap(i, j);
      int64_t cost = tokens_of_swap(i, j);
      if (linear + cost > room) continue;
      swap(i, j);
      now.cost += cost + linear - excess * in_.penalty;
      now.excess += excess;
      if (now.excess < best.excess || (now.excess == best.excess && now.cost < best.cost)) {
        best = now;
        std::copy(device_, device_ + in_.slots, kept.begin());
      }
    }
    std::copy(kept.begin(), kept.end(), device_);
    return best;
  }

 private:
  std::vector<uint8_t> padded(const uint8_t* from_PT, int64_t places) const {
    std::vector<uint8_t> to_PT(places * row_, 0);
    for (int64_t p = 0; p < places; ++p)
      std::copy(from_PT + p * in_.tokens, from_PT + (p + 1) * in_.tokens, &to_PT[p * row_]);
    return to_PT;
  }

  int64_t whole_cost() const {
    int64_t cost = 0;
    for (size_t i = 0; i < count_DT_.size(); ++i)
      if (count_DT_[i]) cost += price_DT_[i];
    for (size_t i = 0; i < count_NT_.size(); ++i)
      if (count_NT_[i]) cost += price_NT_[i];
    for (int64_t s = 0; s < in_.slots; ++s) {
      if (in_.price_SD) cost += in_.price_SD[s * in_.devices + device_[s]];
      for (int64_t x = 0; in_.bond_SS && x < s; ++x)
        if (device_[x] == device_[s]) cost += in_.bond_SS[s * in_.slots + x];
    }
    return cost;
  }

  int64_t whole_excess() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < in_.devices * in_.workloads; ++i)
      sum += std::max<int64_t>(0, load_DW_[i] - in_.cap_DW[i]);
    return sum;
  }

  int64_t excess_of_swap(int64_t i, int64_t j) const {
    const int64_t W = in_.workloads, d1 = device_[i], d2 = device_[j];
    int64_t sum = 0;
    for (int64_t w = 0; w < W; ++w) {
      int64_t gain = in_.load_SW[j * W + w] - in_.load_SW[i * W + w];
      int64_t a = load_DW_[d1 * W + w] - in_.cap_DW[d1 * W + w];
      int64_t b = load_DW_[d2 * W + w] - in_.cap_DW[d2 * W + w];
      sum += std::max<int64_t>(0, a + gain) - std::max<int64_t>(0, a);
      sum += std::max<int64_t>(0, b - gain) - std::max<int64_t>(0, b);
    }
    return sum;
  }

  int64_t price_of_swap(int64_t i, int64_t j) const {
    if (!in_.price_SD) return 0;
    const int64_t *a = in_.price_SD + i * in_.devices, *b = in_.price_SD + j * in_.devices;
    return a[device_[j]] - a[device_[i]] + b[device_[i]] - b[device_[j]];
  }

  int64_t bond_of_swap(int64_t i, int64_t j) const {
    if (!in_.bond_SS) return 0;
    const int64_t *a = in_.bond_SS + i * in_.slots, *b = in_.bond_SS + j * in_.slots;
    int64_t sum = 0;
    for (int64_t x = 0; x < in_.slots; ++x) {
      if (x == i || x == j) continue;
      if (device_[x] == device_[i]) sum += b[x] - a[x];
      if (device_[x] == device_[j]) sum += a[x] - b[x];
    }
    return sum;
  }

  int64_t tokens_of_swap(int64_t i, int64_t j) const {
    const int64_t T = row_, d1 = device_[i], d2 = device_[j];
    const int64_t n1 = in_.node_D[d1], n2 = in_.node_D[d2];
    const uint8_t *a = &uses_ST_[i * T], *b = &uses_ST_[j * T];
    int64_t sum = places_of_swap(T, a, b, &count_DT_[d1 * T], &count_DT_[d2 * T],
                                 &price_DT_[d1 * T], &price_DT_[d2 * T]);
    if (n1 != n2)
      sum += places_of_swap(T, a, b, &count_NT_[n1 * T], &count_NT_[n2 * T],
                            &price_NT_[n1 * T], &price_NT_[n2 * T]);
    return sum;
  }

  void move(int64_t s, int64_t from, int64_t to) {
    const int64_t T = row_, W = in_.workloads;
    const int64_t n1 = in_.node_D[from], n2 = in_.node_D[to];
    for (int32_t i = lists_.start[s]; i < lists_.start[s + 1]; ++i) {
      int64_t t = lists_.token[i];
      --count_DT_[from * T + t];
      ++count_DT_[to * T + t];
      if (n1 != n2) {
        --count_NT_[n1 * T + t];
        ++count_NT_[n2 * T + t];
      }
    }
    for (int64_t w = 0; w < W; ++w) {
      load_DW_[from * W + w] -= in_.load_SW[s * W + w];
      load_DW_[to * W + w] += in_.load_SW[s * W + w];
    }
    device_[s] = int32_t(to);
  }

  void swap(int64_t i, int64_t j) {
    int64_t d1 = device_[i], d2 = device_[j];
    move(i, d1, d2);
    move(j, d2, d1);
  }

  const LayerGrouping& in_;
  int32_t* device_;
  Tokens lists_;
  int64_t row_;  // tokens, padded
  std::vector<uint8_t> count_DT_, price_DT_, count_NT_, price_NT_;
  std::vector<int64_t> load_DW_;
  std::vector<uint8_t> uses_ST_;  // 0xFF where the token uses the slot
};

// One layer while it is being balanced: loads of W workloads, slots of equal number per device.
struct Packing {
  int64_t E, W, D, m;
  const double *load_EW, *speed_D;
  std::vector<int32_t> count_E, expert_S;
  std::vector<double> load_DW;

  double share(int32_t e, int64_t w) const { return load_EW[e * W + w] / count_E[e]; }
  double peak(int64_t d) const {
    double top = 0;
    for (int64_t w = 0; w < W; ++w) top = std::max(top, load_DW[d * W + w] / speed_D[d]);
    return top;
  }
  bool holds(int64_t d, int32_t e) const {
    return std::find(&expert_S[0] + d * m, &expert_S[0] + (d + 1) * m, e) !=
           &expert_S[0] + (d + 1) * m;
  }
  int64_t hottest() const {
    int64_t hot = 0;
    double top = peak(0);
    for (int64_t d = 1; d < D; ++d)
      if (double p = peak(d); p > top) hot = d, top = p;
    return hot;
  }
  void sum_loads() {
    std::fill(load_DW.begin(), load_DW.end(), 0.0);
    for (int64_t s = 0; s < D * m; ++s)
      for (int64_t w = 0; w < W; ++w) load_DW[s / m * W + w] += share(expert_S[s], w);
  }
  double item_size(int32_t e) const {
    double top = 0;
    for (int64_t w = 0; w < W; ++w) top = std::max(top, share(e, w));
    return top;
  }

  // One more copy, again and again, of the expert whose copies are heaviest.
  void replicate() {
    count_E.assign(E, 1);
    for (int64_t extra = D * m - E; extra > 0; --extra) {
      int32_t heavy = -1;
      double top = -1;
      for (int32_t e = 0; e < E; ++e)
        if (double size = item_size(e); count_E[e] < D && size > top) heavy = e, top = size;
      if (heavy < 0) heavy = int32_t(extra % E);  // every expert lies everywhere already
      ++count_E[heavy];
    }
  }

  // Heaviest copy first, to the device it leaves coolest.
  void pack() {
    std::vector<int32_t> order(E);
    std::iota(order.begin(), order.end(), 0);
    std::vector<double> size(E);
    for (int32_t e = 0; e < E; ++e) size[e] = item_size(e);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return size[a] > size[b]; });
    std::fill(expert_S.begin(), expert_S.end(), -1);
    std::fill(load_DW.begin(), load_DW.end(), 0.0);
    std::vector<int64_t> used(D, 0);
    for (int32_t e : order)
      for (int32_t copy = 0; copy < count_E[e]; ++copy) {
        int64_t place = -1;
        bool place_twice = false;
        double place_top = 0;
        for (int64_t d = 0; d < D; ++d) {
          if (used[d] == m) continue;
          bool twice = copy > 0 && holds(d, e);
          double top = 0;
          for (int64_t w = 0; w < W; ++w)
            top = std::max(top, (load_DW[d * W + w] + share(e, w)) / speed_D[d]);
          if (place < 0 || twice < place_twice || (twice == place_twice && top < place_top))
            place = d, place_top = top, place_twice = twice;
        }
        expert_S[place * m + used[place]++] = e;
        for (int64_t w = 0; w < W; ++w) load_DW[place * W + w] += share(e, w);
      }
  }

  // The hotter of two devices after their slots i and j change places.
  double after(int64_t i, int64_t j) const {
    int64_t a = i / m, b = j / m;
    double top = 0;
    for (int64_t w = 0; w < W; ++w) {
      double gain = share(expert_S[j], w) - share(expert_S[i], w);
      top = std::max(top, (load_DW[a * W + w] + gain) / speed_D[a]);
      top = std::max(top, (load_DW[b * W + w] - gain) / speed_D[b]);
    }
    return top;
  }

  // Cools the hottest device by its best swap until there is none. Returns its load.
  double refine() {
    for (int64_t round = 0; round < 64 * D; ++round) {
      int64_t hot = hottest(), best_i = -1, best_j = -1;
      double top = peak(hot), best = top * (1 - 1e-12);
      for (int64_t i = hot * m; i < (hot + 1) * m; ++i)
        for (int64_t j = 0; j < D * m; ++j) {
          if (j / m == hot || expert_S[i] == expert_S[j]) continue;
          double p = after(i, j);
          if (p >= best || (count_E[expert_S[i]] > 1 && holds(j / m, expert_S[i])) ||
              (count_E[expert_S[j]] > 1 && holds(hot, expert_S[j])))
            continue;
          best = p, best_i = i, best_j = j;
        }
      if (best_i < 0) return top;
      std::swap(expert_S[best_i], expert_S[best_j]);
      sum_loads();
    }
    return peak(hottest());
  }

  // Lets the experts of the hottest device take copies from others, while that helps.
  double recount(double top, int64_t rounds) {
    for (int64_t round = 0; round < rounds; ++round) {
      std::vector<int32_t> kept_count = count_E, kept_expert = expert_S, best_count, best_expert;
      int64_t hot = hottest();
      std::vector<int32_t> takers(&kept_expert[0] + hot * m, &kept_expert[0] + (hot + 1) * m);
      double best = top * (1 - 1e-12);
      for (int32_t taker : takers) {
        if (kept_count[taker] >= D) continue;
        for (int32_t giver = 0; giver < E; ++giver) {
          if (giver == taker || kept_count[giver] < 2) continue;
          count_E = kept_count;
          ++count_E[taker];
          --count_E[giver];
          if (item_size(giver) >= best) continue;
          pack();
          double p = m > 2 ? refine() : peak(hottest());
          if (p < best) best = p, best_count = count_E, best_expert = expert_S;
        }
      }
      count_E = best_count.empty() ? kept_count : best_count;
      expert_S = best_count.empty() ? kept_expert : best_expert;
      sum_loads();
      if (best_count.empty()) break;
      top = refine();
    }
    return top;
  }
};

constexpr int64_t kPlace = 720720;  // divisible by 1..16

}  // namespace

GroupedLayer group(const LayerGrouping& in, int32_t* device_S) { return Annealer(in, device_S).run(); }

double balance(int64_t experts, int64_t workloads, int64_t devices, int64_t slots,
               const double* load_EW, const double* speed_D, int64_t recounts,
               int32_t* expert_S) {
  Packing p{experts, workloads, devices, slots / devices, load_EW, speed_D, {}, {}, {}};
  p.expert_S.resize(slots);
  p.load_DW.resize(devices * workloads);
  p.replicate();
  p.pack();
  double top = p.recount(p.refine(), recounts);
  std::copy(p.expert_S.begin(), p.expert_S.end(), expert_S);
  return top;
}

int64_t saved_bound(int64_t tokens, int64_t width, int64_t slots, const int32_t* slot_TK,
                    int64_t partners) {
  Tokens lists(tokens, width, slots, slot_TK);
  std::vector<int64_t> gain(slots), sorted;
  std::vector<int32_t> mates(tokens);
  std::vector<char> chosen(slots);
  int64_t sum = 0;
  for (int64_t s = 0; s < slots; ++s) {
    std::fill(chosen.begin(), chosen.end(), 0);
    const int32_t first = lists.start[s], last = lists.start[s + 1];
    for (int32_t i = first; i < last; ++i) mates[lists.token[i]] = 0;
    int64_t saved = 0, bound = std::numeric_limits<int64_t>::max();
    for (int64_t round = 0; round <= partners && round < slots; ++round) {
      std::fill(gain.begin(), gain.end(), 0);
      for (int32_t i = first; i < last; ++i) {
        int64_t t = lists.token[i], n = mates[t] + 1;
        for (int64_t k = 0; k < width; ++k) {
          int32_t x = slot_TK[t * width + k];
          if (x >= 0 && x != s && !chosen[x]) gain[x] += kPlace / n - kPlace / (n + 1);
        }
      }
      sorted = gain;
      int64_t take = std::min<int64_t>(partners, slots);
      std::nth_element(sorted.begin(), sorted.begin() + take - (take == slots), sorted.end(),
                       std::greater<int64_t>());
      bound = std::min(bound, saved + std::accumulate(sorted.begin(), sorted.begin() + take,
                                                      int64_t(0)));
      if (round == partners) break;
      int64_t pick = std::max_element(gain.begin(), gain.end()) - gain.begin();
      saved += gain[pick];
      chosen[pick] = 1;
      for (int32_t i = first; i < last; ++i) {
        int64_t t = lists.token[i];
        for (int64_t k = 0; k < width; ++k) mates[t] += slot_TK[t * width + k] == pick;
      }
    }
    sum += bound;
  }
  return sum;
}

void assign(int64_t size, const double* cost_RC, int32_t* column_R) {
  const double inf = std::numeric_limits<double>::infinity();
  std::vector<double> u(size + 1, 0), v(size + 1, 0), slack(size + 1);
  std::vector<int64_t> row(size + 1, 0), way(size + 1, 0);
  std::vector<char> done(size + 1);
  for (int64_t r = 1; r <= size; ++r) {
    row[0] = r;
    int64_t c = 0;
    std::fill(slack.begin(), slack.end(), inf);
    std::fill(done.begin(), done.end(), 0);
    do {
      done[c] = 1;
      int64_t i = row[c], next = 0;
      double step = inf;
      for (int64_t j = 1; j <= size; ++j) {
        if (done[j]) continue;
        double reduced = cost_RC[(i - 1) * size + j - 1] - u[i] - v[j];
        if (reduced < slack[j]) slack[j] = reduced, way[j] = c;
        if (slack[j] < step) step = slack[j], next = j;
      }
      for (int64_t j = 0; j <= size; ++j) {
        if (done[j]) u[row[j]] += step, v[j] -= step;
        else slack[j] -= step;
      }
      c = next;
    } while (row[c] != 0);
    for (; c != 0; c = way[c]) row[c] = row[way[c]];
  }
  for (int64_t j = 1; j <= size; ++j) column_R[row[j] - 1] = int32_t(j - 1);
}

}  // namespace moeserve
