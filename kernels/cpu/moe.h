// Routed experts in one parallel loop: first gate/up of every expert in ranges of panels, then down
// in columns of 32 over all experts, where a column ends in the weighted sum or what is wanted of it. Whoever ends an
// expert's gate/up prepares its rows for down; a column waits only for the expert it comes to.
// Items are handed out in order, so what an item waits for is always in somebody's hands.
#pragma once

#include <sched.h>

INLINE F16 activate(F16 gate, F16 up, bool clamped) {
  if (!clamped) return gate * sigmoid(gate) * up;
  gate = at_most(gate, splat(7.0f));
  up = at_most(at_least(up, splat(-7.0f)), splat(7.0f));
  return (up + splat(1.0f)) * (gate * sigmoid(gate * splat(1.702f)));
}

constexpr int64_t kDownPanels = 4, kColumnRows = 2048;  // a column stays in the cache

// Rows of one expert: `pair[start : start + rows]`, at most kBlockRows of them.
struct Block {
  int32_t expert, start, rows;
  int32_t done, ready;  // items of gate/up; whether the rows for down are there
};

// What becomes of the contributions of a row: a chain of fused multiply-adds or the exact sum, as
// floats; the exact sum as it travels, int32 [limbs][hidden]; or each by itself, not yet weighed.
enum class Ending { chain, exact, sums, each };

// Pairs of a row and an expert, those of row t are first[t] : first[t + 1]; null: `chosen` of each.
struct Pairs {
  int64_t rows, chosen;
  const int32_t *first, *ids;
  const float *weights, *units;  // of pairs, of rows
};

// The pairs sorted by expert, in blocks. False if an id is not an expert.
bool group_by_expert(const int32_t* ids, int64_t pairs, int64_t experts, int32_t* place,
                     int32_t* pair, Block* block, int64_t& blocks) {
  for (int64_t e = 0; e < experts; ++e) place[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return false;
    ++place[ids[i]];
  }
  int32_t total = 0;
  blocks = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int32_t left = place[e];
    place[e] = total;
    while (left) {
      const int32_t rows = static_cast<int32_t>(least(left, kBlockRows));
      block[blocks++] = {static_cast<int32_t>(e), total, rows, 0, 0};
      total += rows;
      left -= rows;
    }
  }
  for (int64_t i = 0; i < pairs; ++i) pair[place[ids[i]]++] = static_cast<int32_t>(i);
  return true;
}

void wait_for(const int32_t* flag) {
  for (int spins = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); ++spins) {
    if (spins > 2000) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// One call: sizes, and where everything lies in scratch memory.
struct MoeCall {
  const Experts& w;
  const Pairs& pairs;
  Ending ending;
  void* out;
  int64_t hidden, inner, room;  // `room`: floats of a row between gate/up and down
  Form up, down;
  int64_t up_panels, down_panels, blocks, step, down_step, up_items;
  Inputs tokens, activations;
  float* between;  // [pairs][room], in the order of `pair`
  int32_t *pair, *row_of, *first;
  Block* block;
};

// The tokens of a block, line by line into tiles. One row alone is a tile where it lies.
Inputs gather(const MoeCall& m, const Block& b) {
  const int32_t* pair = m.pair + b.start;
  if (b.rows == 1) return inputs_from(m.tokens, m.up, m.row_of[pair[0]]);
  char* memory = static_cast<char*>(scratch(1, bytes_of(m.up, b.rows) + 64));
  const Inputs to = take_inputs(m.up, b.rows, memory);
  for (int64_t first = 0; first < b.rows;) {
    const RowTile tile = tile_of(b.rows, tile_limit(m.w.gate_up.kind), first);
    for (int64_t r = first; r < first + tile.size; ++r) {
      const Inputs from = inputs_from(m.tokens, m.up, m.row_of[pair[r]]);
      char* line = to.data + first * m.up.lines * kLine + (r - first) * kLine;
      for (int64_t i = 0; i < m.up.lines; ++i)
        __builtin_memcpy(line + i * tile.size * kLine, from.data + i * kLine, kLine);
      to.scale[r] = *from.scale;
      for (int64_t g = 0; g < m.up.groups; ++g) to.sums[r * m.up.groups + g] = from.sums[g];
    }
    first += tile.size;
  }
  return to;
}

const char* panel_at(const Matrix& w, const Form& form, int64_t index) {
  return static_cast<const char*>(w.data) + index * form.panel_bytes;
}

void gate_up_item(const MoeCall& m, int64_t item) {
  const Matrix& w = m.w.gate_up;
  const int64_t steps = ceil_div(m.up_panels, m.step);
  Block& b = m.block[item / steps];
  const int64_t from = item % steps * m.step, to = least(m.up_panels, from + m.step);
  const int64_t base = b.expert * m.up_panels, later = item + threads();
  fetch_start(panel_at(w, m.up, base + from), b.rows);
  const char* after =
      later < m.up_items
          ? panel_at(w, m.up, m.block[later / steps].expert * m.up_panels + later % steps * m.step)
          : nullptr;
  const Inputs x = gather(m, b);
  for (int64_t p = from; p < to; ++p) {
    const char* next = p + 1 < to ? panel_at(w, m.up, base + p + 1) : after;
    times(w, m.up, base + p, x, b.rows, next, [&](int64_t r, F16 gate, F16 up) {
      store(m.between + (b.start + r) * m.room + p * kLanes, activate(gate, up, m.w.clamped));
    });
  }
  if (__atomic_add_fetch(&b.done, 1, __ATOMIC_ACQ_REL) < steps) return;
  const Inputs rows = inputs_from(m.activations, m.down, b.start);
  for (int64_t r = 0; r < b.rows; ++r)
    prepare_in_tile(m.w.down.kind, m.down, m.between + (b.start + r) * m.room, m.inner, rows,
                    b.rows, r);
  __atomic_store_n(&b.ready, 1, __ATOMIC_RELEASE);
}

// The exact sums of a row in one panel.
template <int64_t kLimbs>
void end_exact(const MoeCall& m, int64_t t, const float* column, int64_t width, int64_t panel) {
  Whole<kLimbs> low, high;
  const float unit = m.pairs.units[t], scale = factor_of<kLimbs>(unit);
  for (int64_t c = m.first[t]; c < m.first[t + 1]; ++c) {
    const F16 factor = splat(m.pairs.weights[c] * scale);
    const float* value = column + c * width * kPanel;
    add(low, load(value), factor);
    add(high, load(value + kLanes), factor);
  }
  const int32_t bound = bound_bits(m.pairs.chosen);
  settle(low, bound);
  settle(high, bound);
  float* out = static_cast<float*>(m.out) + t * m.hidden;
  if (m.ending == Ending::exact)
    return store_panel(out, m.hidden, panel, number(low, unit), number(high, unit));
  out += t * (kLimbs - 1) * m.hidden;
  for (int64_t limb = 0; limb < kLimbs; ++limb)
    store_panel(out + limb * m.hidden, m.hidden, panel, low.sum[limb], high.sum[limb]);
}

void end_chain(const MoeCall& m, int64_t t, const float* column, int64_t width, int64_t panel) {
  F16 low = zero(), high = zero();
  for (int64_t c = m.first[t]; c < m.first[t + 1]; ++c) {
    const F16 weight = splat(m.pairs.weights[c]);
    const float* value = column + c * width * kPanel;
    low = fma(weight, load(value), low);
    high = fma(weight, load(value + kLanes), high);
  }
  store_panel(static_cast<float*>(m.out) + t * m.hidden, m.hidden, panel, low, high);
}

void end_column(const MoeCall& m, int64_t t, const float* column, int64_t width, int64_t panel) {
  if (m.ending == Ending::chain) {
    end_chain(m, t, column, width, panel);
  } else if (m.ending == Ending::each) {
    for (int64_t c = m.first[t]; c < m.first[t + 1]; ++c) {
      const float* value = column + c * width * kPanel;
      store_panel(static_cast<float*>(m.out) + c * m.hidden, m.hidden, panel, load(value),
                  load(value + kLanes));
    }
  } else if (limbs_of(m.w.down.kind) == 1) {
    end_exact<1>(m, t, column, width, panel);
  } else {
    end_exact<2>(m, t, column, width, panel);
  }
}

// A column of some panels over all experts, one expert after the other, and how it ends.
void down_item(const MoeCall& m, int64_t item) {
  const Matrix& w = m.w.down;
  const int64_t from = item * m.down_step, width = least(m.down_step, m.down_panels - from);
  float* column = static_cast<float*>(scratch(1, m.first[m.pairs.rows] * width * kPanel * 4));
  const auto panel_of = [&](int64_t i, int64_t p) {
    return panel_at(w, m.down, m.block[i].expert * m.down_panels + p);
  };
  const int64_t later = from + threads() * m.down_step;
  if (m.blocks) fetch_start(panel_of(0, from), m.block[0].rows);
  for (int64_t i = 0; i < m.blocks; ++i) {
    const Block& b = m.block[i];
    wait_for(&b.ready);
    const int32_t* pair = m.pair + b.start;
    const Inputs x = inputs_from(m.activations, m.down, b.start);
    for (int64_t p = 0; p < width; ++p) {
      const char* next = nullptr;
      if (p + 1 < width)
        next = panel_of(i, from + p + 1);
      else if (i + 1 < m.blocks)
        next = panel_of(i + 1, from);
      else if (later < m.down_panels)
        next = panel_of(0, later);
      times(w, m.down, b.expert * m.down_panels + from + p, x, b.rows, next,
            [&](int64_t r, F16 low, F16 high) {
              float* to = column + (pair[r] * width + p) * kPanel;
              store(to, low);
              store(to + kLanes, high);
            });
    }
  }
  for (int64_t t = 0; t < m.pairs.rows; ++t)
    for (int64_t p = 0; p < width; ++p)
      end_column(m, t, column + p * kPanel, width, from + p);
}

// `read(t, inputs)` lays out row t. False if an id is not an expert.
template <class Read>
bool run_moe(const Experts& w, const Pairs& pairs, const Read& read, Ending ending, void* out) {
  const int64_t rows = pairs.rows, all = pairs.first ? pairs.first[rows] : rows * pairs.chosen;
  MoeCall m{w, pairs, ending, out, w.down.n, w.down.k, padded(w.down.k), {}, {}, 0, 0, 0, 0, 0, 0,
            {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
  m.up = form_of(w.gate_up.kind, m.hidden, w.gate_up.group);
  m.down = form_of(w.down.kind, m.inner, w.down.group);
  m.up_panels = panels_of(2 * m.inner, true);
  m.down_panels = panels_of(m.hidden, false);
  const int64_t most_blocks = least(all, w.count + all / kBlockRows);
  char* memory = static_cast<char*>(
      scratch(0, bytes_of(m.up, rows) + bytes_of(m.down, all) + 4 * all * (m.room + 2) +
                     4 * (rows + 1) + sizeof(Block) * most_blocks + 4 * w.count + 4 * 64));
  m.tokens = take_inputs(m.up, rows, memory);
  m.activations = take_inputs(m.down, all, memory);
  m.between = reinterpret_cast<float*>(memory);
  m.pair = reinterpret_cast<int32_t*>(m.between + all * m.room);
  m.row_of = m.pair + all;
  m.first = m.row_of + all;
  m.block = reinterpret_cast<Block*>(m.first + rows + 1);
  int32_t* place = reinterpret_cast<int32_t*>(m.block + most_blocks);
  if (!group_by_expert(pairs.ids, all, w.count, place, m.pair, m.block, m.blocks)) return false;
  for (int64_t t = 0; t <= rows; ++t)
    m.first[t] = pairs.first ? pairs.first[t] : static_cast<int32_t>(t * pairs.chosen);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = m.first[t]; c < m.first[t + 1]; ++c) m.row_of[c] = static_cast<int32_t>(t);

  each_row(rows, 4 * m.hidden, [&](int64_t t) { read(t, inputs_from(m.tokens, m.up, t)); });
  m.step = panels_per_item(m.up_panels, m.blocks);
  m.down_step = most(1, least(least(kDownPanels, kColumnRows / most(1, all)),
                              m.down_panels / (8 * threads())));
  m.up_items = all ? m.blocks * ceil_div(m.up_panels, m.step) : 0;
  const int64_t down_items = rows ? ceil_div(m.down_panels, m.down_step) : 0;
  each(m.up_items + down_items, 3 * all * m.hidden * m.inner, [&](int64_t item) {
    item < m.up_items ? gate_up_item(m, item) : down_item(m, item - m.up_items);
  });
  return true;
}

bool moe_ffn(const float* x, int64_t rows, const Experts& w, const int32_t* ids,
             const float* weights, int64_t chosen, const float* units, float* out) {
  const Form form = form_of(w.gate_up.kind, w.down.n, w.gate_up.group);
  const auto read = [&](int64_t t, const Inputs& row) {
    prepare(w.gate_up.kind, form, x + t * w.down.n, w.down.n, row.data, kLine, row.scale, row.sums);
  };
  const Pairs pairs{rows, chosen, nullptr, ids, weights, units};
  return run_moe(w, pairs, read, units ? Ending::exact : Ending::chain, out);
}
