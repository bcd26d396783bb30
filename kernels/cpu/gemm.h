// Matrix products: x[t, k] is spread over 32 columns of a panel and added with k ascending, so an
// output element is one chain of fused multiply-adds, whatever tile of rows it is computed in.
#pragma once

// Rows per tile, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kTile = 8;
#elif defined(__AVX2__)
constexpr int kTile = 3;
#elif defined(__aarch64__)
constexpr int kTile = 2;
#else
constexpr int kTile = 1;
#endif
constexpr int64_t kRowBlock = 64;

// R rows times C panels. `row(r)` is a row's features; `emit(r, c, low, high)` takes the result.
template <int R, int C, class T, class Row, class Emit>
INLINE void tile(const T* panel, int64_t k_size, const Row& row, const Emit& emit) {
  const float* x[R];
  F16 sum[R][C][2];
  for (int r = 0; r < R; ++r) {
    x[r] = row(r);
    for (int c = 0; c < C; ++c) sum[r][c][0] = sum[r][c][1] = zero();
  }
  for (int64_t k = 0; k < k_size; ++k) {
    V a[R];
    for (int r = 0; r < R; ++r) a[r] = spread(x[r][k]);
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) {
        const F16 b = load(panel + (c * k_size + k) * kPanel + h * kLanes);
        for (int r = 0; r < R; ++r)
          EACH_PART sum[r][c][h].part[i] = fma(a[r], b.part[i], sum[r][c][h].part[i]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) emit(r, c, sum[r][c][0], sum[r][c][1]);
}

template <int R, int C, class T, class Row, class Emit>
INLINE void last_tile(int64_t left, const T* panel, int64_t k_size, const Row& row,
                      const Emit& emit) {
  if constexpr (R > 0) {
    if (left == R)
      tile<R, C>(panel, k_size, row, emit);
    else
      last_tile<R - 1, C>(left, panel, k_size, row, emit);
  }
}

// Rows [0, rows) times C panels.
template <int C, class T, class Row, class Emit>
void all_rows(int64_t rows, const T* panel, int64_t k_size, const Row& row, const Emit& emit) {
  constexpr int most_rows = C == 1 ? kTile : kTile / C;
  int64_t r = 0;
  for (; r + most_rows <= rows; r += most_rows)
    tile<most_rows, C>(
        panel, k_size, [&](int i) { return row(r + i); },
        [&](int i, int c, F16 low, F16 high) { emit(r + i, c, low, high); });
  last_tile<most_rows - 1, C>(
      rows - r, panel, k_size, [&](int i) { return row(r + i); },
      [&](int i, int c, F16 low, F16 high) { emit(r + i, c, low, high); });
}

// A panel in fp32: many rows pay for it once instead of once per tile.
template <class T>
const float* widened(const T* panel, int64_t size) {
  float* wide = static_cast<float*>(scratch(1, size * sizeof(float)));
  for (int64_t i = 0; i < size; i += kLanes) store(wide + i, load(panel + i));
  return wide;
}

// Rows [0, rows) times panels [from, to): `row(r)`, `emit(r, panel, low, high)`. Few rows take two
// panels at once, to have more than one chain in flight.
template <class T, class Row, class Emit>
void sweep(const T* data, int64_t k_size, int64_t from, int64_t to, int64_t rows, const Row& row,
           const Emit& emit) {
  int64_t p = from;
  if constexpr (kTile >= 2) {
    if (rows <= kTile / 2)
      for (; p + 2 <= to; p += 2)
        all_rows<2>(rows, data + p * k_size * kPanel, k_size, row,
                    [&](int64_t r, int c, F16 low, F16 high) { emit(r, p + c, low, high); });
  }
  for (; p < to; ++p) {
    const T* panel = data + p * k_size * kPanel;
    const auto emit_one = [&](int64_t r, int, F16 low, F16 high) { emit(r, p, low, high); };
    if (sizeof(T) < sizeof(float) && rows >= 4 * kTile)
      all_rows<1>(rows, widened(panel, k_size * kPanel), k_size, row, emit_one);
    else
      all_rows<1>(rows, panel, k_size, row, emit_one);
  }
}

INLINE void add_bias(const float* bias, int64_t panel, F16& low, F16& high) {
  if (!bias) return;
  low = low + load(bias + panel * kPanel);
  high = high + load(bias + panel * kPanel + kLanes);
}

INLINE void store_panel(float* out, int64_t n, int64_t panel, F16 low, F16 high) {
  const int64_t at = panel * kPanel, left = n - at;
  store(out + at, low, left);
  if (left > kLanes) store(out + at + kLanes, high, left - kLanes);
}

// Panels per item, so that every thread gets several items.
int64_t panels_per_item(int64_t panels, int64_t others) {
  const int64_t wanted = ceil_div(8 * threads(), most(1, others));
  return most(2, panels / wanted / 2 * 2);
}

// One matrix for each of `heads` (1 for a plain linear): out[t, a] = w[a] x[t, a].
template <class T>
void linear_of(const float* x, int64_t rows, int64_t heads, const Matrix& w, float* out) {
  const int64_t panels = ceil_div(w.n, kPanel), row_blocks = ceil_div(rows, kRowBlock);
  const int64_t step = panels_per_item(panels, heads * row_blocks);
  const int64_t steps = ceil_div(panels, step);
  each(heads * row_blocks * steps, rows * heads * w.n * w.k, [&](int64_t item) {
    const int64_t from = item % steps * step, part = item / steps;
    const int64_t head = part % heads, first = part / heads * kRowBlock;
    const T* data = static_cast<const T*>(w.data) + head * panels * w.k * kPanel;
    sweep(
        data, w.k, from, least(panels, from + step), least(kRowBlock, rows - first),
        [&](int64_t r) { return x + ((first + r) * heads + head) * w.k; },
        [&](int64_t r, int64_t p, F16 low, F16 high) {
          add_bias(w.bias, p, low, high);
          store_panel(out + ((first + r) * heads + head) * w.n, w.n, p, low, high);
        });
  });
}

void linear(const float* x, int64_t rows, int64_t heads, const Matrix& w, float* out) {
  w.kind == Kind::bf16 ? linear_of<bf16>(x, rows, heads, w, out) : linear_of<float>(x, rows, heads, w, out);
}

INLINE F16 activate(F16 gate, F16 up, bool clamped) {
  if (!clamped) return gate * sigmoid(gate) * up;
  gate = at_most(gate, splat(7.0f));
  up = at_most(at_least(up, splat(-7.0f)), splat(7.0f));
  return (up + splat(1.0f)) * (gate * sigmoid(gate * splat(1.702f)));
}

// The (token, choice) pairs sorted by expert; `start[i] : start[i + 1]` belong to `expert[i]`.
struct Groups {
  int64_t count;
  int32_t *expert, *start, *pair;
};

bool group_by_expert(const int32_t* ids, int64_t pairs, int64_t experts, int32_t* memory,
                     Groups& groups) {
  int32_t* place = memory;
  groups = {0, place + experts, place + 2 * experts, place + 3 * experts + 1};
  for (int64_t e = 0; e < experts; ++e) place[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return false;
    ++place[ids[i]];
  }
  int32_t total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t tokens = place[e];
    place[e] = total;
    if (!tokens) continue;
    groups.expert[groups.count] = static_cast<int32_t>(e);
    groups.start[groups.count++] = total;
    total += tokens;
  }
  groups.start[groups.count] = total;
  for (int64_t i = 0; i < pairs; ++i) groups.pair[place[ids[i]]++] = static_cast<int32_t>(i);
  return true;
}

// Every group times its expert's matrix: `row(pair)`, `emit(pair, panel, low, high)`.
template <class T, class Row, class Emit>
void each_group(const Groups& groups, const Matrix& w, const Row& row, const Emit& emit) {
  const int64_t panels = ceil_div(w.n, kPanel);
  const int64_t step = panels_per_item(panels, groups.count);
  const int64_t steps = ceil_div(panels, step);
  each(groups.count * steps, groups.start[groups.count] * w.n * w.k, [&](int64_t item) {
    const int64_t from = item % steps * step, i = item / steps, e = groups.expert[i];
    const int32_t* pair = groups.pair + groups.start[i];
    sweep(
        static_cast<const T*>(w.data) + e * panels * w.k * kPanel, w.k, from,
        least(panels, from + step), groups.start[i + 1] - groups.start[i],
        [&](int64_t r) { return row(pair[r]); },
        [&](int64_t r, int64_t p, F16 low, F16 high) {
          add_bias(w.bias ? w.bias + e * panels * kPanel : nullptr, p, low, high);
          emit(pair[r], p, low, high);
        });
  });
}

template <class T>
bool moe_of(const float* x, int64_t rows, const Experts& w, const int32_t* ids,
            const float* weights, int64_t chosen, float* out) {
  const int64_t pairs = rows * chosen, hidden = w.down.n, inner = w.down.k;
  const int64_t floats = pairs * (inner + hidden);
  float* inner_of = static_cast<float*>(scratch(0, 4 * (floats + 3 * w.count + 1 + pairs)));
  float* down_of = inner_of + pairs * inner;
  Groups groups;
  int32_t* integers = reinterpret_cast<int32_t*>(down_of + pairs * hidden);
  if (!group_by_expert(ids, pairs, w.count, integers, groups)) return false;

  each_group<T>(
      groups, w.gate_up, [&](int64_t pair) { return x + pair / chosen * hidden; },
      [&](int64_t pair, int64_t p, F16 gate, F16 up) {
        const int64_t at = p * kLanes;
        store(inner_of + pair * inner + at, activate(gate, up, w.clamped), inner - at);
      });
  each_group<T>(
      groups, w.down, [&](int64_t pair) { return inner_of + pair * inner; },
      [&](int64_t pair, int64_t p, F16 low, F16 high) {
        store_panel(down_of + pair * hidden, hidden, p, low, high);
      });
  each_row(rows, chosen * hidden, [&](int64_t t) {
    for (int64_t h = 0; h < hidden; h += kLanes) {
      F16 total = zero();
      for (int64_t c = t * chosen; c < (t + 1) * chosen; ++c)
        total = fma(splat(weights[c]), load(down_of + c * hidden + h, hidden - h), total);
      store(out + t * hidden + h, total, hidden - h);
    }
  });
  return true;
}

bool moe_ffn(const float* x, int64_t rows, const Experts& w, const int32_t* ids, const float* weights,
             int64_t chosen, float* out) {
  return w.down.kind == Kind::bf16 ? moe_of<bf16>(x, rows, w, ids, weights, chosen, out)
                        : moe_of<float>(x, rows, w, ids, weights, chosen, out);
}

void quantize_per_token(const float* x, int64_t rows, int64_t k, int8_t* codes, float* scale) {
  constexpr float kTiny = 7.8886090522101181e-31f;  // 2^-100
  each_row(rows, 2 * k, [&](int64_t t) {
    const float* in = x + t * k;
    float most = 0.0f;
    bool sound = true;
    for (int64_t i = 0; i < k; ++i) {
      const float size = __builtin_fabsf(in[i]);
      sound = sound && size <= 3.4028234663852886e38f;
      most = size > most ? size : most;
    }
    const float factor = sound && most >= kTiny ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < k; ++i)
      codes[t * k + i] = sound ? static_cast<int8_t>(__builtin_rintf(in[i] * factor)) : 0;
    scale[t] = !sound ? __builtin_nanf("") : most >= kTiny ? most / 127.0f : 0.0f;
  });
}
