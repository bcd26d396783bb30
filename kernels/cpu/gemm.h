// Matrix products: rows prepared in tiles, times panels, with an epilogue per row and panel.
#pragma once

constexpr int64_t kBlockRows = most(64, 8 * kTile);  // rows that share what is read of a panel
constexpr int64_t kAheadUnits = 8;                   // of 512 bytes: how far to fetch ahead

int64_t tile_limit(Kind kind) { return kind == Kind::int4 ? kTile4 : kTile; }

// The tile of row `i` among `rows`: as few tiles as possible, of nearly equal size.
struct RowTile {
  int64_t first, size, index, count;
};

RowTile tile_of(int64_t rows, int64_t limit, int64_t i) {
  const int64_t count = ceil_div(rows, limit), size = rows / count, larger = rows % count;
  const int64_t bound = larger * (size + 1);
  if (i < bound) return {i / (size + 1) * (size + 1), size + 1, i / (size + 1), count};
  const int64_t past = (i - bound) / size;
  return {bound + past * size, size, larger + past, count};
}

Inputs inputs_from(const Inputs& x, const Form& form, int64_t first) {
  return {x.data + first * form.lines * kLine, x.scale + first, x.sums + first * form.groups};
}

// Row `i` of a block of `rows`, to its place in its tile.
void prepare_in_tile(Kind kind, const Form& form, const float* x, int64_t k, const Inputs& block,
                     int64_t rows, int64_t i) {
  const RowTile t = tile_of(rows, tile_limit(kind), i);
  char* to = block.data + t.first * form.lines * kLine + (i - t.first) * kLine;
  prepare(kind, form, x, k, to, t.size * kLine, block.scale + i, block.sums + i * form.groups);
}

template <class Op, int R = kTile>
INLINE void choose_sums(int64_t rows, const char* panel, const char* x, int64_t chunks,
                        const Ahead& ahead, float* out) {
  if constexpr (R > 0) {
    if (rows == R) return panel_sums<Op, R>(panel, x, chunks, ahead, out);
    choose_sums<Op, R - 1>(rows, panel, x, chunks, ahead, out);
  }
}

template <bool kLevels, bool kSame, int R = kTile4>
INLINE void choose_sums4(int64_t rows, const char* panel, const char* x, const Grouped& w,
                         const Ahead& ahead, float* out) {
  if constexpr (R > 0) {
    if (rows == R) return panel_sums4<R, kLevels, kSame>(panel, x, w, ahead, out);
    choose_sums4<kLevels, kSame, R - 1>(rows, panel, x, w, ahead, out);
  }
}

void sums4(const Matrix& w, const Form& form, int64_t index, int64_t rows, const char* panel,
           const Inputs& x, const Ahead& ahead, float* out) {
  const int64_t at = index * form.groups * kPanel;
  const Grouped grouped{w.scale + at, w.zero ? w.zero + at : nullptr,
                        x.sums,       w.levels,
                        form.groups,  form.halves,
                        form.last_halves, w.levels ? kOffset : w.same_zero};
  if (w.levels)
    choose_sums4<true, true>(rows, panel, x.data, grouped, ahead, out);
  else if (w.zero)
    choose_sums4<false, false>(rows, panel, x.data, grouped, ahead, out);
  else
    choose_sums4<false, true>(rows, panel, x.data, grouped, ahead, out);
}

// While the only tile reads its panel, the same stream is fetched some way ahead, across its end
// into `next`. With several tiles the panel is in the cache after the first, and the next one is
// fetched in equal shares.
Ahead ahead_of(const char* panel, int64_t bytes, const char* next, const RowTile& tile) {
  const int64_t units = bytes / 512;
  if (tile.count == 1) {
    const int64_t turn = most(0, units - kAheadUnits) / 4 * 4;
    return {{panel + kAheadUnits * 512, next ? next : panel}, turn, 8};
  }
  const int64_t lines = ceil_div(8, tile.count);
  if (!next || tile.index * lines >= 8) return {{panel, panel}, 0, 0};
  const char* from = next + tile.index * lines * 64 * units;
  return {{from, from + units / 4 * 4 * lines * 64}, units / 4 * 4, static_cast<int>(lines)};
}

INLINE F16 exact(const float* raw, int32_t offset) {
  F16 r = load(raw);
  EACH_PART r.part[i] = __builtin_convertvector((I)r.part[i] - offset, V);
  return r;
}

// The two halves of a panel's result, of one row.
INLINE void finish(const Matrix& w, const float* raw, int64_t index, float scale, int32_t total,
                   F16& low, F16& high) {
  const int64_t lane = index * kPanel;
  if (w.kind == Kind::int8) {
    low = exact(raw, kOffset * total) * splat(scale) * load(w.scale + lane);
    high = exact(raw + kLanes, kOffset * total) * splat(scale) * load(w.scale + lane + kLanes);
  } else {
    low = load(raw), high = load(raw + kLanes);
    if (w.kind == Kind::int4) low = low * splat(scale), high = high * splat(scale);
  }
  if (!w.bias) return;
  low = low + load(w.bias + lane);
  high = high + load(w.bias + lane + kLanes);
}

// Panel `index` of a stack times a block of rows: `emit(row, low, high)` for each. `next` is the
// panel that will be read after this one, or null.
template <class Emit>
void times(const Matrix& w, const Form& form, int64_t index, const Inputs& x, int64_t rows,
           const char* next, const Emit& emit) {
  const char* panel = static_cast<const char*>(w.data) + index * form.panel_bytes;
  alignas(64) float raw[kTile * kPanel];
  for (int64_t first = 0; first < rows;) {
    const RowTile tile = tile_of(rows, tile_limit(w.kind), first);
    const Inputs part = inputs_from(x, form, first);
    const Ahead ahead = ahead_of(panel, form.panel_bytes, next, tile);
    switch (w.kind) {
      case Kind::fp32: choose_sums<Fp32>(tile.size, panel, part.data, form.lines, ahead, raw); break;
      case Kind::bf16: choose_sums<Bf16>(tile.size, panel, part.data, form.lines, ahead, raw); break;
      case Kind::int8: choose_sums<Int8>(tile.size, panel, part.data, form.lines, ahead, raw); break;
      case Kind::int4: sums4(w, form, index, tile.size, panel, part, ahead, raw);
    }
    for (int64_t r = 0; r < tile.size; ++r) {
      F16 low, high;
      const bool scaled = w.kind == Kind::int8 || w.kind == Kind::int4;
      finish(w, raw + r * kPanel, index, scaled ? part.scale[r] : 0.0f,
             w.kind == Kind::int8 ? part.sums[r] : 0, low, high);
      emit(first + r, low, high);
    }
    first += tile.size;
  }
}

INLINE void store_panel(float* out, int64_t n, int64_t panel, F16 low, F16 high) {
  const int64_t at = panel * kPanel, left = n - at;
  store(out + at, low, left);
  if (left > kLanes) store(out + at + kLanes, high, left - kLanes);
}

// The start of a panel, while something else is still to be done.
INLINE void fetch_start(const char* panel) {
  for (int i = 0; i < kAheadUnits * 8; ++i) __builtin_prefetch(panel + i * 64, 0, 3);
}

// Panels per item: several items for every thread, but not the shortest ones.
int64_t panels_per_item(int64_t panels, int64_t parts) {
  return most(1, least(8, panels * parts / (16 * threads())));
}

// One matrix for each of `heads` (1 for a plain linear): out[t, a] = w[a] x[t, a].
void linear(const float* x, int64_t rows, int64_t heads, const Matrix& w, float* out) {
  const Form form = form_of(w.kind, w.k, w.group);
  const int64_t panels = panels_of(w.n, false), blocks = ceil_div(rows, kBlockRows);
  char* memory = static_cast<char*>(scratch(0, bytes_of(form, rows * heads) + 64));
  const Inputs all = take_inputs(form, rows * heads, memory);
  const auto block_rows = [&](int64_t b) { return least(kBlockRows, rows - b * kBlockRows); };
  each_row(rows * heads, 4 * w.k, [&](int64_t i) {
    const int64_t head = i / rows, t = i % rows, b = t / kBlockRows;
    const Inputs block = inputs_from(all, form, head * rows + b * kBlockRows);
    prepare_in_tile(w.kind, form, x + (t * heads + head) * w.k, w.k, block, block_rows(b),
                    t % kBlockRows);
  });

  const int64_t parts = heads * blocks, step = panels_per_item(panels, parts);
  const int64_t ranges = ceil_div(panels, step);
  const char* data = static_cast<const char*>(w.data);
  each(ranges * parts, rows * heads * w.n * w.k, [&](int64_t item) {
    const int64_t from = item / parts * step, to = least(panels, from + step);
    const int64_t head = item % parts / blocks, b = item % parts % blocks;
    const Inputs block = inputs_from(all, form, head * rows + b * kBlockRows);
    const int64_t later = item + threads(), base = head * panels;
    const char* after = nullptr;
    if (later < ranges * parts)
      after = data + (later % parts / blocks * panels + later / parts * step) * form.panel_bytes;
    for (int64_t p = from; p < to; ++p) {
      const char* next = p + 1 < to ? data + (base + p + 1) * form.panel_bytes : after;
      times(w, form, base + p, block, block_rows(b), next, [&](int64_t r, F16 low, F16 high) {
        store_panel(out + ((b * kBlockRows + r) * heads + head) * w.n, w.n, p, low, high);
      });
    }
  });
}
