// Attention over a bf16 or int8 cache, from units (units.h, kv.h).
//
// The past is cut by absolute position into segments of 512 and steps of 64. A running softmax
// goes over the steps of a segment; segments are merged in ascending order. A query's operations
// follow from its own position and window: queries share what is read of the cache, never a sum,
// and nothing of a position that a query may not see reaches it, not even times zero.
#pragma once

constexpr int kSegment = 512;
constexpr int kGroups = kStep / kGroup;
constexpr int kTile = 32;  // queries of one KV head that walk through a segment together
constexpr float kLog2E = 1.44269504f;

// Queries per register tile, and how many may share a wide one.
#if defined(__AVX512F__)
constexpr int kRows = 8, kFewRows = 4;
#elif defined(__AVX2__)
constexpr int kRows = 2, kFewRows = 0;
#else
constexpr int kRows = 1, kFewRows = 0;
#endif

// A query's place, what it sees (positions from .. to - 1) and its running state.
struct Seen {
  int64_t row, head, from, to;
  float highest, total;  // of the segments merged so far
  F16 count;             // of this segment, in 16 sums
  float factor[2];
  int32_t offset[2];
};

// What a tile works on. Lines are queries; `room` is in floats, `units` in units.
struct Work {
  Seen* seen;
  uint32_t* query;  // [count][units]
  float* score;     // [count][kStep]
  uint8_t* share;   // [count][2 * kStep]: bf16, or bytes
  float *acc, *merged;  // [count][room]
  // Of each query: the segment's highest score, the factor that carries older sums to it, and what
  // a byte of this step's shares is worth.
  float *here, *shrink, *unit;
  uint8_t* turned;  // values of a step that are the keys of a latent: [groups][tiles]...
  uint8_t* packed;  // groups of a step that do not lie in groups
  int64_t units, room;
};

// The groups of one step: keys, values and scales; null where no query sees any of it.
struct Step {
  const uint8_t* group[kGroups];
  const uint8_t* ahead[kGroups];  // what will be needed next, for the prefetcher
};

struct Bf16 {
  using Sum = F16;
  static constexpr bool kBytes = false;
  INLINE Sum none() { return zero(); }
  INLINE Sum score(Sum sum, N16 key, N16 query) { return dot_bf16(sum, key, query); }
  INLINE Sum value(Sum sum, N16 share, N16 value) { return dot_bf16(sum, value, share); }
};

struct Int8 {
  using Sum = N16;
  static constexpr bool kBytes = true;
  INLINE Sum none() { return no_units(); }
  INLINE Sum score(Sum sum, N16 key, N16 query) { return dot_bytes(sum, key, query); }
  INLINE Sum value(Sum sum, N16 share, N16 value) { return dot_bytes(sum, share, value); }
};

// Scores of M queries and C groups over units first .. last - 1.
template <class Kind, int M, int C>
INLINE void score_tile(const Work& w, int row, const uint8_t* const* group,
                       const uint8_t* const* ahead, int64_t first, int64_t last, float* score,
                       const float* const* scale, int part) {
  typename Kind::Sum sum[M][C];
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < C; ++c) sum[i][c] = Kind::none();
  const uint32_t* query = w.query + row * w.units;
  for (int64_t j = first; j < last; ++j) {
    N16 key[C];
    for (int c = 0; c < C; ++c) {
      key[c] = load_units(group[c] + 64 * j);
      prefetch(ahead[c] + 64 * j);
    }
    for (int i = 0; i < M; ++i) {
      const N16 x = splat_unit(query[i * w.units + j]);
      for (int c = 0; c < C; ++c) sum[i][c] = Kind::score(sum[i][c], key[c], x);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < C; ++c) {
      float* to = score + i * kStep + c * kGroup;
      const Seen& seen = w.seen[row + i];
      if constexpr (Kind::kBytes) {
        const F16 exact = to_float(sum[i][c] - splat_unit(seen.offset[part]));
        const F16 here = exact * load(scale[c] + part * kGroup) * splat(seen.factor[part]);
        store(to, part ? load(to) + here : here);
      } else {
        store(to, sum[i][c] * splat(seen.factor[0]));
      }
    }
}

template <class Kind, int M>
INLINE void score_groups(const Work& w, const Layout& l, const Step& step, int row, int low,
                         int high) {
  constexpr int kMost = M <= kFewRows ? 4 : 2;
  const int64_t scales_at = kGroup * (l.key_bytes + l.value_bytes);
  const int64_t units = l.head_units + l.rest_units;
  for (int g = low; g < high;) {
    const float* scale[kMost];
    const int width = high - g >= kMost ? kMost : 1;
    for (int c = 0; c < width; ++c)
      scale[c] = reinterpret_cast<const float*>(step.group[g + c] + scales_at);
    float* score = w.score + row * kStep + g * kGroup;
    const uint8_t *const *group = step.group + g, *const *ahead = step.ahead + g;
    const int64_t middle = Kind::kBytes ? l.head_units : units;
    if (width == kMost) {
      score_tile<Kind, M, kMost>(w, row, group, ahead, 0, middle, score, scale, 0);
      if (middle < units)
        score_tile<Kind, M, kMost>(w, row, group, ahead, middle, units, score, scale, 1);
    } else {
      score_tile<Kind, M, 1>(w, row, group, ahead, 0, middle, score, scale, 0);
      if (middle < units)
        score_tile<Kind, M, 1>(w, row, group, ahead, middle, units, score, scale, 1);
    }
    g += width;
  }
}

// acc = acc * shrink + shares times values, for M queries and C tiles of 16 features, over
// positions low .. high - 1 of the step.
template <class Kind, int M, int C>
INLINE void value_tile(const Work& w, int row, const uint8_t* const* group,
                       const uint8_t* const* ahead, int64_t tile_bytes, int low, int high,
                       float* acc, const float* shrink) {
  constexpr int kPer = Kind::kBytes ? 4 : 2, kLines = kGroup / kPer;
  typename Kind::Sum sum[M][C];
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < C; ++c) {
      if constexpr (Kind::kBytes)
        sum[i][c] = Kind::none();
      else
        sum[i][c] = load(acc + i * w.room + c * kLanes) * splat(shrink[i]);
    }
  const uint8_t* share = w.share + row * 2 * kStep;
  const auto add = [&](unsigned line, uint32_t visible) __attribute__((always_inline)) {
    const uint8_t* at = group[line / kLines] + line % kLines * 64;
    const uint8_t* next = ahead[line / kLines] + line % kLines * 64;
    N16 value[C];
    for (int c = 0; c < C; ++c) {
      value[c] = load_units(at + c * tile_bytes);
      prefetch(next + c * tile_bytes);
      if (visible != ~0u)
        EACH_PART value[c].part[i] = value[c].part[i] & static_cast<int32_t>(visible);
    }
    for (int i = 0; i < M; ++i) {
      uint32_t unit;
      __builtin_memcpy(&unit, share + i * 2 * kStep + 4 * line, 4);
      const N16 x = splat_unit(unit);
      for (int c = 0; c < C; ++c) sum[i][c] = Kind::value(sum[i][c], x, value[c]);
    }
  };
  if constexpr (Kind::kBytes) {
    for (int line = low / kPer; line < (high + kPer - 1) / kPer; ++line) add(line, ~0u);
    for (int i = 0; i < M; ++i)
      for (int c = 0; c < C; ++c) {
        float* to = acc + i * w.room + c * kLanes;
        const F16 before = load(to) * splat(shrink[i]);
        store(to, fma(to_float(sum[i][c]), splat(w.unit[row + i]), before));
      }
  } else {
    if (low % 2) add(low / 2, 0xffff0000u);
    for (int line = (low + 1) / 2; line < high / 2; ++line) add(line, ~0u);
    if (high % 2) add(high / 2, 0x0000ffffu);
    for (int i = 0; i < M; ++i)
      for (int c = 0; c < C; ++c) store(acc + i * w.room + c * kLanes, sum[i][c]);
  }
}

template <int C>
constexpr int kRowsOf = C > 2 ? kFewRows : kRows;

template <class Kind, int C, int M = kRowsOf<C>>
INLINE void value_rows(const Work& w, int row, int rows, const uint8_t* const* group,
                       const uint8_t* const* ahead, int64_t tile_bytes, int low, int high,
                       float* acc, const float* shrink) {
  if constexpr (M > 1)
    if (rows < M)
      return value_rows<Kind, C, M - 1>(w, row, rows, group, ahead, tile_bytes, low, high, acc,
                                        shrink);
  value_tile<Kind, M, C>(w, row, group, ahead, tile_bytes, low, high, acc, shrink);
}

INLINE int first_of(const Seen& seen, int64_t at) { return static_cast<int>(most(seen.from - at, 0)); }
INLINE int end_of(const Seen& seen, int64_t at) { return static_cast<int>(least(seen.to - at, kStep)); }

// C tiles of features for up to kRows queries, each over its own positions. bf16 adds even what is
// zero, so queries go together only where all of them see a pair.
template <class Kind, int C>
void value_step(const Work& w, int row, int rows, int64_t at, const uint8_t* const* group,
                const uint8_t* const* ahead, int64_t tile_bytes, float* acc) {
  const float one = 1.0f, *shrink = w.shrink + row;
  const Seen &eldest = w.seen[row], &youngest = w.seen[row + rows - 1];
  const int least_low = first_of(eldest, at), most_high = end_of(youngest, at);
  int low = first_of(youngest, at), high = end_of(eldest, at);
  if (Kind::kBytes || (low == least_low && high == most_high))
    return value_rows<Kind, C>(w, row, rows, group, ahead, tile_bytes, least_low, most_high, acc,
                               shrink);
  low = (low + 1) / 2 * 2, high = high / 2 * 2;
  for (int i = 0; i < rows; ++i) {
    const int mine = first_of(w.seen[row + i], at), end = end_of(w.seen[row + i], at);
    const int until = low < high ? low : end;
    value_rows<Kind, C>(w, row + i, 1, group, ahead, tile_bytes, mine, until, acc + i * w.room,
                        shrink + i);
  }
  if (low >= high) return;
  float same[kRowsOf<C>];
  for (int i = 0; i < rows; ++i) same[i] = one;
  value_rows<Kind, C>(w, row, rows, group, ahead, tile_bytes, low, high, acc, same);
  for (int i = 0; i < rows; ++i) {
    const int end = end_of(w.seen[row + i], at);
    if (end > high)
      value_rows<Kind, C>(w, row + i, 1, group, ahead, tile_bytes, high, end, acc + i * w.room,
                          &one);
  }
}

// Scores outside of what a query sees count nothing.
INLINE void bound_scores(const Work& w, int row, int64_t at) {
  float* score = w.score + row * kStep;
  const int low = first_of(w.seen[row], at), high = end_of(w.seen[row], at);
  for (int p = 0; p < low; ++p) score[p] = kNever;
  for (int p = high; p < kStep; ++p) score[p] = kNever;
}

INLINE F16 greatest_of(const F16* x) {
  return greatest_everywhere(at_least(at_least(x[0], x[1]), at_least(x[2], x[3])));
}

// Scales of values that the query sees, of one group; others are zero.
INLINE F16 visible_scales(const float* scale, int low, int high) {
  float own[kGroup];
  for (int p = 0; p < kGroup; ++p) own[p] = p >= low && p < high ? scale[p] : 0.0f;
  return load(own);
}

// Shares times value scales, as bytes of the greatest; `x` becomes NaN where a scale is.
INLINE void quantize_shares(const Work& w, int row, const float* const* value_scale, int64_t at,
                            F16* x) {
  const int low = first_of(w.seen[row], at), high = end_of(w.seen[row], at);
  F16 y[kGroups];
  if (low == 0 && high == kStep) {
    for (int g = 0; g < kGroups; ++g) y[g] = load(value_scale[g]);
  } else {
    for (int g = 0; g < kGroups; ++g)
      y[g] = visible_scales(value_scale[g], low - g * kGroup, high - g * kGroup);
  }
  for (int g = 0; g < kGroups; ++g) {
    y[g] = x[g] * y[g];
    x[g] = fma(y[g], zero(), x[g]);
  }
  // Below 1e-36 a reciprocal would overflow: such values count as zero.
  const float found = first_lane(greatest_of(y)), top = found < 1e-36f ? 1e-36f : found;
  w.unit[row] = top * (1.0f / 255.0f);
  const F16 factor = splat(255.0f / top);
  for (int g = 0; g < kGroups; ++g)
    store_bytes(w.share + row * 2 * kStep + g * kGroup, nearest(y[g] * factor));
}

// The softmax over this step, of R queries so that their long chains of operations overlap.
template <class Kind, int R>
INLINE void soften_rows(const Work& w, int row, const float* const* value_scale, int64_t at) {
  F16 x[R][kGroups];
  for (int i = 0; i < R; ++i) {
    bound_scores(w, row + i, at);
    for (int g = 0; g < kGroups; ++g) x[i][g] = load(w.score + (row + i) * kStep + g * kGroup);
    const F16 here = splat(w.here[row + i]), next = at_least(here, greatest_of(x[i]));
    const F16 shrink = exp2(here - next);
    for (int g = 0; g < kGroups; ++g) x[i][g] = x[i][g] - next;
    w.here[row + i] = first_lane(next);
    w.shrink[row + i] = first_lane(shrink);
  }
  for (int g = 0; g < kGroups; ++g)
    for (int i = 0; i < R; ++i) x[i][g] = exp2(x[i][g]);
  for (int i = 0; i < R; ++i) {
    if constexpr (Kind::kBytes) {
      quantize_shares(w, row + i, value_scale, at, x[i]);
    } else {
      bf16* share = reinterpret_cast<bf16*>(w.share + (row + i) * 2 * kStep);
      for (int g = 0; g < kGroups; ++g) {
        x[i][g] = round_bf16(x[i][g]);
        store_bf16(share + g * kGroup, x[i][g]);
      }
    }
    Seen& seen = w.seen[row + i];
    seen.count = fma(seen.count, splat(w.shrink[row + i]),
                     (x[i][0] + x[i][1]) + (x[i][2] + x[i][3]));
  }
}

template <class Kind>
INLINE void soften_step(const Work& w, int first, int last, const float* const* value_scale,
                        int64_t at) {
  constexpr int kTogether = kParts == 1 ? 4 : 1;
  int row = first;
  for (; row + kTogether <= last; row += kTogether)
    soften_rows<Kind, kTogether>(w, row, value_scale, at);
  for (; row < last; ++row) soften_rows<Kind, 1>(w, row, value_scale, at);
}

#if defined(__AVX512F__)
// `line` 64-bit elements of eight registers, as rows, to columns.
INLINE void turn_quads(__m512i* r) {
  const __m512i a = _mm512_setr_epi64(0, 8, 2, 10, 4, 12, 6, 14);
  const __m512i b = _mm512_setr_epi64(1, 9, 3, 11, 5, 13, 7, 15);
  __m512i s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm512_permutex2var_epi64(r[i], a, r[i + 1]);
    s[i + 1] = _mm512_permutex2var_epi64(r[i], b, r[i + 1]);
  }
  const __m512i c = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i d = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      t[i + j] = _mm512_permutex2var_epi64(s[i + j], c, s[i + j + 2]);
      t[i + j + 2] = _mm512_permutex2var_epi64(s[i + j], d, s[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i64x2(t[j], t[j + 4], 0x44);
    r[j + 4] = _mm512_shuffle_i64x2(t[j], t[j + 4], 0xee);
  }
}
#endif

#if defined(__AVX512F__)
// A tile of 16 features of a latent group, from keys (16 positions a line) to values (16 features
// a line). `units` of the tile are there; features beyond them become zero.
template <class Kind>
INLINE void turn_lines(const uint8_t* keys, int units, __m512i* line) {
  if constexpr (Kind::kBytes) {
    const __m512i bytes = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i r[4];
    for (int j = 0; j < 4; ++j) {
      r[j] = j < units ? _mm512_loadu_si512(keys + 64 * j) : _mm512_setzero_si512();
      r[j] = _mm512_xor_si512(_mm512_shuffle_epi8(r[j], bytes), _mm512_set1_epi8(-128));
    }
    const __m512i a = _mm512_shuffle_i64x2(r[0], r[1], 0x44);
    const __m512i b = _mm512_shuffle_i64x2(r[2], r[3], 0x44);
    const __m512i c = _mm512_shuffle_i64x2(r[0], r[1], 0xee);
    const __m512i d = _mm512_shuffle_i64x2(r[2], r[3], 0xee);
    line[0] = _mm512_shuffle_i64x2(a, b, 0x88);
    line[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    line[2] = _mm512_shuffle_i64x2(c, d, 0x88);
    line[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
  } else {
    const __m512i words = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int j = 0; j < 8; ++j) {
      line[j] = j < units ? _mm512_loadu_si512(keys + 64 * j) : _mm512_setzero_si512();
      line[j] = _mm512_shuffle_epi8(line[j], words);
    }
    turn_quads(line);
  }
}

// One tile of a latent's bytes for M queries that see the whole step, turned on the way. In bf16,
// and for fewer queries, this would wait for products: there the lines go through memory.
template <int M>
INLINE void latent_tile(const Layout& l, const Work& w, const Step& step, int row, int64_t tile) {
  N16 sum[M];
  for (int i = 0; i < M; ++i) sum[i] = no_units();
  const uint8_t* share = w.share + row * 2 * kStep;
  for (int g = 0; g < kGroups; ++g, share += kGroup) {
    __m512i line[4];
    turn_lines<Int8>(step.group[g] + 256 * tile,
                     static_cast<int>(least(4, l.head_units - 4 * tile)), line);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < M; ++i) {
        uint32_t x;
        __builtin_memcpy(&x, share + i * 2 * kStep + 4 * j, 4);
        sum[i] = dot_bytes(sum[i], splat_unit(x), N16{{(I)line[j]}});
      }
  }
  float* acc = w.acc + row * w.room + tile * kLanes;
  for (int i = 0; i < M; ++i, acc += w.room) {
    const F16 before = load(acc) * splat(w.shrink[row + i]);
    store(acc, fma(to_float(sum[i]), splat(w.unit[row + i]), before));
  }
}

// Whether it could take all queries, and did.
template <class Kind>
bool latent_values(const Attention& b, const Layout& l, const Work& w, const Step& step,
                   int64_t at, int first, int last) {
  if (!Kind::kBytes || !b.kv.latent || (last - first) % 8 ||
      first_of(w.seen[last - 1], at) > 0 || end_of(w.seen[first], at) < kStep)
    return false;
  for (int64_t tile = 0; tile < l.value_tiles; ++tile) {
    int row = first;
    for (; last - row >= 16; row += 16) latent_tile<16>(l, w, step, row, tile);
    if (row < last) latent_tile<8>(l, w, step, row, tile);
  }
  return true;
}
#endif

// The same, into memory: a tile's lines one after the other.
template <class Kind>
INLINE void turn(const uint8_t* keys, int units, uint8_t* values) {
#if defined(__AVX512F__)
  constexpr int kLines = kGroup / (Kind::kBytes ? 4 : 2);
  __m512i line[kLines];
  turn_lines<Kind>(keys, units, line);
  for (int j = 0; j < kLines; ++j) _mm512_storeu_si512(values + 64 * j, line[j]);
#else
  constexpr int kPer = Kind::kBytes ? 4 : 2, kSize = 4 / kPer, kFlip = Kind::kBytes ? 128 : 0;
  for (int line = 0; line < kGroup / kPer; ++line)
    for (int f = 0; f < kLanes; ++f)
      for (int p = 0; p < kPer; ++p)
        for (int byte = 0; byte < kSize; ++byte) {
          const uint8_t* from = keys + f / kPer * 64 + (line * kPer + p) * 4 + f % kPer * kSize;
          values[64 * line + 4 * f + p * kSize + byte] =
              f / kPer < units ? static_cast<uint8_t>(from[byte] ^ kFlip) : 0;
        }
#endif
}

// One group out of positions that lie in rows.
void gather(const Cache& c, const Layout& l, const int32_t* blocks, int64_t head, int64_t first,
            int64_t low, int64_t high, uint8_t* group) {
  for (int64_t p = most(first, low); p < least(first + kGroup, high); ++p) {
    const Place from = place_of(c, l, blocks[p / c.block_size], p % c.block_size, head);
    const int64_t lane = p - first;
    for (int64_t j = 0; j < l.key_bytes / 4; ++j)
      __builtin_memcpy(group + 64 * j + 4 * lane, from.key + 4 * j, 4);
    uint8_t* value = group + kGroup * l.key_bytes;
    const Place to{nullptr, value + lane / l.per_unit * 64 + lane % l.per_unit * l.element, nullptr,
                   64, 64, true};
    for (int64_t f = 0; f < l.value_bytes / l.element; ++f)
      __builtin_memcpy(value_at(to, l, f), from.value + f * l.element, l.element);
    for (int64_t s = 0; s < l.scales; ++s)
      __builtin_memcpy(value + kGroup * l.value_bytes + 64 * s + 4 * lane, from.scale + 4 * s, 4);
  }
}

// Groups of the step at position `at` that hold any of low .. high - 1.
void find_groups(const Attention& b, const Layout& l, const Tile& tile, int64_t at, int64_t low,
                 int64_t high, uint8_t* packed, const uint8_t** group) {
  const int32_t* blocks = b.blocks + tile.sequence * b.table_width;
  for (int g = 0; g < kGroups; ++g) {
    const int64_t first = at + g * kGroup;
    group[g] = nullptr;
    if (first >= high || first + kGroup <= low) continue;
    if (b.kv.block_size % kGroup) {
      uint8_t* room = packed + g * kGroup * l.position_bytes;
      gather(b.kv, l, blocks, tile.kv_head, first, low, high, room);
      group[g] = room;
    } else {
      const int64_t size = b.kv.block_size;
      group[g] = place_of(b.kv, l, blocks[first / size], first % size, tile.kv_head).key;
    }
  }
}

template <class Kind>
void take_query(const Attention& b, const Layout& l, const Work& w, int row) {
  Seen& seen = w.seen[row];
  const float* x = b.q + (seen.row * b.heads + seen.head) * b.kv.head_size;
  uint32_t* to = w.query + row * w.units;
  const float scale = b.scale * kLog2E;
  for (int part = 0; part < 2; ++part) {
    const int64_t size = part ? l.rest_size : l.head_size, units = part ? l.rest_units : l.head_units;
    if (!units) continue;
    to[units - 1] = 0;
    if constexpr (Kind::kBytes) {
      int8_t* codes = reinterpret_cast<int8_t*>(to);
      seen.factor[part] = quantize(x, size, codes) * scale;
      int32_t total = 0;
      for (int64_t d = 0; d < size; ++d) total += codes[d];
      seen.offset[part] = 128 * total;
    } else {
      bf16* narrowed = reinterpret_cast<bf16*>(to);
      for (int64_t d = 0; d < size; ++d) narrowed[d] = narrow(x[d]);
      seen.factor[0] = scale;
    }
    to += units;
    x += size;
  }
}

Work new_work(const Layout& l, int64_t count, const Cache& c) {
  Work w{};
  w.units = l.head_units + l.rest_units;
  w.room = l.value_tiles * kLanes;
  const int64_t turned = c.latent ? kGroups * kGroup * kLanes * l.element * 4 : 0;
  const int64_t packed = c.block_size % kGroup ? kStep * l.position_bytes : 0;
  const int64_t sizes[] = {count * static_cast<int64_t>(sizeof(Seen)), count * w.units * 4,
                           count * kStep * 4, count * kStep * 2, count * w.room * 4,
                           count * w.room * 4, count * 4, count * 4, count * 4, turned, packed};
  int64_t total = 0;
  for (const int64_t size : sizes) total += ceil_div(size, 64) * 64;
  uint8_t* at = static_cast<uint8_t*>(scratch(1, total));
  uint8_t* start[11];
  for (int i = 0; i < 11; ++i) start[i] = at, at += ceil_div(sizes[i], 64) * 64;
  w.seen = reinterpret_cast<Seen*>(start[0]);
  w.query = reinterpret_cast<uint32_t*>(start[1]);
  w.score = reinterpret_cast<float*>(start[2]);
  w.share = start[3];
  w.acc = reinterpret_cast<float*>(start[4]);
  w.merged = reinterpret_cast<float*>(start[5]);
  w.here = reinterpret_cast<float*>(start[6]);
  w.shrink = reinterpret_cast<float*>(start[7]);
  w.unit = reinterpret_cast<float*>(start[8]);
  w.turned = start[9];
  w.packed = start[10];
  return w;
}

template <class Kind, int C>
void value_tiles(const Attention& b, const Layout& l, const Work& w, const Step& step, int64_t at,
                 int first, int last, int low, int high, int64_t tile) {
  constexpr int64_t kTileBytes = kGroup * 64 / (Kind::kBytes ? 4 : 2);
  const uint8_t *group[kGroups], *ahead[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    group[g] = ahead[g] = nullptr;
    if (g < low || g >= high) continue;
    ahead[g] = step.ahead[g] + tile * kTileBytes;
    if (!b.kv.latent) {
      group[g] = step.group[g] + kGroup * l.key_bytes + tile * kTileBytes;
      continue;
    }
    uint8_t* turned = w.turned + g * C * kTileBytes;
    constexpr int kUnits = kLanes / (Kind::kBytes ? 4 : 2);
    for (int c = 0; c < C; ++c) {
      const int64_t unit = (tile + c) * kUnits;
      turn<Kind>(step.group[g] + 64 * unit, static_cast<int>(least(kUnits, l.head_units - unit)),
                 turned + c * kTileBytes);
    }
    group[g] = turned;
  }
  for (int row = first; row < last; row += kRowsOf<C>)
    value_step<Kind, C>(w, row, static_cast<int>(least(kRowsOf<C>, last - row)), at, group, ahead,
                        kTileBytes, w.acc + row * w.room + tile * kLanes);
}

template <class Kind, int M = kRows>
INLINE void score_rows(const Work& w, const Layout& l, const Step& step, int row, int rows, int low,
                       int high) {
  if constexpr (M > 1)
    if (rows < M) return score_rows<Kind, M - 1>(w, l, step, row, rows, low, high);
  score_groups<Kind, M>(w, l, step, row, low, high);
}

// One step for the queries first .. last - 1, all of which see some of it.
template <class Kind>
void walk_step(const Attention& b, const Layout& l, const Work& w, Step& step,
               const uint8_t* const* next, int64_t at, int first, int last) {
  const int64_t from = w.seen[first].from - at, to = w.seen[last - 1].to - at;
  const int low = static_cast<int>(most(from, 0) / kGroup);
  const int high = static_cast<int>(ceil_div(least(to, kStep), kGroup));
  // Keys bring the next step's keys into the cache, values its values: a step is time enough.
  for (int g = low; g < high; ++g) {
    step.ahead[g] = next[g] ? next[g] : step.group[g];
    for (int64_t s = 0; s < l.scales; ++s)
      prefetch(step.ahead[g] + kGroup * (l.key_bytes + l.value_bytes) + 64 * s);
  }
  for (int row = first; row < last; row += kRows)
    score_rows<Kind>(w, l, step, row, static_cast<int>(least(kRows, last - row)), low, high);
  const float* scale[kGroups] = {};
  const int64_t scale_at = kGroup * (l.key_bytes + l.value_bytes) + (b.kv.latent ? 0 : 64);
  for (int g = low; g < high; ++g)
    scale[g] = reinterpret_cast<const float*>(step.group[g] + scale_at);
  soften_step<Kind>(w, first, last, scale, at);
  if (!b.kv.latent)
    for (int g = low; g < high; ++g) step.ahead[g] += kGroup * l.key_bytes;
#if defined(__AVX512F__)
  if (latent_values<Kind>(b, l, w, step, at, first, last)) return;
#endif
  int64_t tile = 0;
  if constexpr (kFewRows > 0)
    for (; last - first <= kFewRows && tile + 4 <= l.value_tiles; tile += 4)
      value_tiles<Kind, 4>(b, l, w, step, at, first, last, low, high, tile);
  for (; tile + 2 <= l.value_tiles; tile += 2)
    value_tiles<Kind, 2>(b, l, w, step, at, first, last, low, high, tile);
  for (; tile < l.value_tiles; ++tile)
    value_tiles<Kind, 1>(b, l, w, step, at, first, last, low, high, tile);
}

// Puts a segment's state behind what was merged before. `fresh`: there was nothing.
INLINE void merge(Seen& seen, float* merged, const float* acc, float here, float count,
                  int64_t room, bool fresh) {
  if (fresh) {
    seen.highest = here;
    seen.total = count;
    __builtin_memcpy(merged, acc, room * sizeof(float));
    return;
  }
  const float highest = here > seen.highest ? here : seen.highest;
  const float old = exp2(seen.highest - highest), young = exp2(here - highest);
  seen.total = seen.total * old + count * young;
  seen.highest = highest;
  for (int64_t d = 0; d < room; d += kLanes)
    store(merged + d, load(merged + d) * splat(old) + load(acc + d) * splat(young));
}

void finish_units(const Attention& b, Seen& seen, const float* merged) {
  float shrink = 1.0f;
  if (b.sinks) {
    const float sink = b.sinks[seen.head] * kLog2E;
    const float highest = sink > seen.highest ? sink : seen.highest;
    shrink = exp2(seen.highest - highest);
    seen.total = seen.total * shrink + exp2(sink - highest);
  }
  const int64_t size = b.kv.value_size;
  float* out = b.out + (seen.row * b.heads + seen.head) * size;
  for (int64_t d = 0; d < size; d += kLanes)
    store(out + d, load(merged + d) * splat(shrink) / splat(seen.total), size - d);
}

Seen see(const Attention& b, const Tile& tile, int64_t i) {
  const int64_t group = b.heads / b.kv.kv_heads, start = b.starts[tile.sequence];
  const int64_t past = b.context[tile.sequence] - (b.starts[tile.sequence + 1] - start);
  const int64_t index = tile.first + i;
  Seen seen{};
  seen.row = start + index / group;
  seen.head = tile.kv_head * group + index % group;
  seen.to = past + index / group + 1;
  seen.from = b.window ? most(0, seen.to - b.window) : 0;
  return seen;
}

constexpr int64_t state_floats(int64_t room) { return room + kLanes; }

template <class Kind>
void walk_segment(const Attention& b, const Layout& l, const Work& w, const Tile& tile,
                  int64_t begin) {
  for (int i = 0; i < tile.count; ++i) {
    w.here[i] = kNever;
    w.seen[i].count = zero();
  }
  for (int64_t i = 0; i < tile.count * w.room; ++i) w.acc[i] = 0.0f;
  const int64_t low = most(begin, w.seen[0].from);
  const int64_t high = least(begin + kSegment, w.seen[tile.count - 1].to);
  const bool grouped = b.kv.block_size % kGroup == 0;
  Step step{};
  const uint8_t* next[kGroups] = {};
  int64_t at = low / kStep * kStep;
  if (at < high) find_groups(b, l, tile, at, low, high, w.packed, step.group);
  for (; at < high; at += kStep) {
    for (int g = 0; g < kGroups; ++g) next[g] = nullptr;
    if (grouped && at + kStep < high)
      find_groups(b, l, tile, at + kStep, low, high, nullptr, next);
    int first = 0, last = tile.count;
    while (first < last && w.seen[first].to <= at) ++first;
    while (last > first && w.seen[last - 1].from >= at + kStep) --last;
    if (first < last) walk_step<Kind>(b, l, w, step, next, at, first, last);
    if (at + kStep >= high) break;
    if (grouped)
      for (int g = 0; g < kGroups; ++g) step.group[g] = next[g];
    else
      find_groups(b, l, tile, at + kStep, low, high, w.packed, step.group);
  }
}

// Every segment of a tile and its output, or one segment and its state.
template <class Kind>
void attend_units(const Attention& b, const Layout& l, const Tile& tile, float* states) {
  const Flush flush;
  const Work w = new_work(l, tile.count, b.kv);
  for (int i = 0; i < tile.count; ++i) {
    w.seen[i] = see(b, tile, i);
    take_query<Kind>(b, l, w, i);
  }
  const int64_t from = w.seen[0].from, to = w.seen[tile.count - 1].to;
  const int64_t begin = tile.segment < 0 ? from / kSegment * kSegment : tile.segment * kSegment;
  const int64_t end = tile.segment < 0 ? to : begin + kSegment;
  for (int64_t at = begin; at < end; at += kSegment) {
    walk_segment<Kind>(b, l, w, tile, at);
    for (int i = 0; i < tile.count; ++i) {
      Seen& seen = w.seen[i];
      if (seen.from >= at + kSegment || seen.to <= at) continue;
      const float count = sum(seen.count);
      const float* acc = w.acc + i * w.room;
      if (tile.segment < 0) {
        merge(seen, w.merged + i * w.room, acc, w.here[i], count, w.room,
              seen.from / kSegment * kSegment == at);
      } else {
        float* state = states + tile.state + i * state_floats(w.room);
        state[0] = w.here[i];
        state[1] = count;
        __builtin_memcpy(state + kLanes, acc, w.room * sizeof(float));
      }
    }
  }
  if (tile.segment < 0)
    for (int i = 0; i < tile.count; ++i) finish_units(b, w.seen[i], w.merged + i * w.room);
}

// One query whose segments were walked apart: `tile` holds it alone, with the first segment and
// its state; the next segment's is `stride` floats on.
struct Ending {
  Tile tile;
  int64_t stride;
};

void merge_states(const Attention& b, const Layout& l, const Ending& ending, const float* states) {
  const Flush flush;
  const int64_t room = l.value_tiles * kLanes, first = ending.tile.segment;
  float* merged = static_cast<float*>(scratch(1, room * sizeof(float)));
  Seen seen = see(b, ending.tile, 0);
  const int64_t begin = seen.from / kSegment;
  for (int64_t s = begin; s * kSegment < seen.to; ++s) {
    const float* state = states + ending.tile.state + (s - first) * ending.stride;
    merge(seen, merged, state + kLanes, state[0], state[1], room, s == begin);
  }
  finish_units(b, seen, merged);
}
