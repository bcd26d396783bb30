// Attention over an fp32 cache, all in fp32: a running softmax over steps of 64 positions counted
// from the sequence's start.
#pragma once

constexpr int kStep = 64;
constexpr int kQueries = 4;  // queries of one KV head that share what is read of the cache

// Keys per tile of scores, and 16s of features per tile of values, as the registers allow.
#if defined(__AVX512F__)
constexpr int kKeys = 4, kWide = 4;
#else
constexpr int kKeys = 1, kWide = 2;
#endif

struct Tile {
  int32_t sequence, kv_head, first, count;  // `first` counts the sequence's queries of this KV head
  int64_t segment, state;                   // one segment and where its state goes; or -1: all
};

// A query's place, what it sees (positions from .. to - 1), its scores and running state.
struct Query {
  int64_t row, head, from, to;
  float highest, total, shrink;
  alignas(64) float score[kStep];
};

// score[q][p] = scale * q . k for Q queries and K keys; 16 partial sums per score.
template <int Q, int K>
INLINE void scores_of(const float* const* q, const float* const* k, int64_t size, float scale,
                      Query* query, int64_t at) {
  F16 dot[Q][K];
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < K; ++j) dot[i][j] = zero();
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    F16 key[K];
    for (int j = 0; j < K; ++j) key[j] = load(k[j] + d);
    for (int i = 0; i < Q; ++i) {
      const F16 x = load(q[i] + d);
      for (int j = 0; j < K; ++j) dot[i][j] = fma(x, key[j], dot[i][j]);
    }
  }
  if (whole < size)
    for (int j = 0; j < K; ++j) {
      const F16 key = load(k[j] + whole, size - whole);
      for (int i = 0; i < Q; ++i)
        dot[i][j] = fma(load(q[i] + whole, size - whole), key, dot[i][j]);
    }
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < K; ++j) query[i].score[at + j] = sum(dot[i][j]) * scale;
}

// The softmax over this step's positions `low .. high - 1` of the query; the rest count nothing.
void soften(Query& query, int64_t low, int64_t high) {
  for (int64_t p = 0; p < low; ++p) query.score[p] = kNever;
  for (int64_t p = high; p < kStep; ++p) query.score[p] = kNever;
  F16 score[kStep / kLanes];
  for (int i = 0; i < kStep / kLanes; ++i) score[i] = load(query.score + i * kLanes);
  const float here = greatest(at_least(at_least(score[0], score[1]), at_least(score[2], score[3])));
  const float highest = here > query.highest ? here : query.highest;
  for (int i = 0; i < kStep / kLanes; ++i) {
    score[i] = exp(score[i] - splat(highest));
    store(query.score + i * kLanes, score[i]);
  }
  query.shrink = exp1(query.highest - highest);
  const float total = sum((score[0] + score[1]) + (score[2] + score[3]));
  query.total = query.total * query.shrink + total;
  query.highest = highest;
}

// acc[q] = acc[q] * shrink + sum over positions of score * v, for Q queries and C * 16 features.
template <int Q, int C>
INLINE void values_of(Query* query, const float* const* v, int64_t low, int64_t high, int64_t left,
                      float* acc, int64_t acc_stride) {
  F16 total[Q][C];
  for (int i = 0; i < Q; ++i)
    for (int c = 0; c < C; ++c)
      total[i][c] = load(acc + i * acc_stride + c * kLanes) * splat(query[i].shrink);
  for (int64_t p = low; p < high; ++p) {
    F16 value[C];
    for (int c = 0; c < C; ++c)
      value[c] = C > 1 ? load(v[p] + c * kLanes) : load(v[p], left);
    for (int i = 0; i < Q; ++i) {
      const F16 share = splat(query[i].score[p]);
      for (int c = 0; c < C; ++c) total[i][c] = fma(share, value[c], total[i][c]);
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int c = 0; c < C; ++c) store(acc + i * acc_stride + c * kLanes, total[i][c]);
}

template <int Q>
void add_values(Query* query, const float* const* v, int64_t low, int64_t high, int64_t size,
                float* acc, int64_t acc_stride) {
  const float* at[kStep];
  for (int64_t d = 0; d < size;) {
    for (int64_t p = low; p < high; ++p) at[p] = v[p] + d;
    if (size - d >= kWide * kLanes) {
      values_of<Q, kWide>(query, at, low, high, 0, acc + d, acc_stride);
      d += kWide * kLanes;
    } else {
      values_of<Q, 1>(query, at, low, high, size - d, acc + d, acc_stride);
      d += kLanes;
    }
  }
}

void find_positions(const Rows& rows, const int32_t* blocks, int64_t head, int64_t first,
                    int64_t from, int64_t to, const float** at) {
  const float* data = rows.data + head * rows.head_stride;
  int64_t block = from / rows.block_size, offset = from % rows.block_size;
  for (int64_t p = from; p < to; ++p) {
    at[p - first] = data + blocks[block] * rows.block_stride + offset * rows.position_stride;
    if (++offset == rows.block_size) ++block, offset = 0;
  }
}

void finish(const Attention& b, Query& query, const float* acc) {
  float shrink = 1.0f;
  if (b.sinks) {
    const float sink = b.sinks[query.head];
    const float highest = sink > query.highest ? sink : query.highest;
    shrink = exp1(query.highest - highest);
    query.total = query.total * shrink + exp1(sink - highest);
  }
  const int64_t size = b.kv.value_size;
  float* out = b.out + (query.row * b.heads + query.head) * size;
  for (int64_t d = 0; d < size; d += kLanes) {
    const F16 share = load(acc + d) * splat(shrink) / splat(query.total);
    store(out + d, share, size - d);
  }
}

// Q queries of one sequence and KV head, all of them or one at a time where their ranges differ.
template <int Q>
void attend(const Attention& b, Tile tile) {
  const int64_t size = b.kv.head_size, value_size = b.kv.value_size, v_room = padded(value_size);
  const Rows keys = rows_of(b.kv, false), values = rows_of(b.kv, true);
  float* acc = static_cast<float*>(scratch(1, 4 * Q * v_room));
  for (int64_t i = 0; i < Q * v_room; ++i) acc[i] = 0.0f;
  const int64_t group = b.heads / b.kv.kv_heads, start = b.starts[tile.sequence];
  const int64_t past = b.context[tile.sequence] - (b.starts[tile.sequence + 1] - start);
  Query query[Q];
  const float* q[Q];
  for (int i = 0; i < Q; ++i) {
    const int64_t index = tile.first + i, to = past + index / group + 1;
    query[i].row = start + index / group;
    query[i].head = tile.kv_head * group + index % group;
    query[i].from = b.window ? most(0, to - b.window) : 0;
    query[i].to = to;
    query[i].highest = kNever;
    query[i].total = 0.0f;
    q[i] = b.q + (query[i].row * b.heads + query[i].head) * size;
  }
  const int32_t* blocks = b.blocks + tile.sequence * b.table_width;
  const int64_t from = query[0].from, to = query[Q - 1].to;
  const float *k[kStep], *v[kStep];
  for (int64_t step = from / kStep * kStep; step < to; step += kStep) {
    const int64_t low = most(from - step, 0), high = least(to - step, kStep);
    find_positions(keys, blocks, tile.kv_head, step, step + low, step + high, k);
    find_positions(values, blocks, tile.kv_head, step, step + low, step + high, v);
    int64_t p = low;
    for (; p + kKeys <= high; p += kKeys)
      scores_of<Q, kKeys>(q, k + p, size, b.scale, query, p);
    for (; p < high; ++p) scores_of<Q, 1>(q, k + p, size, b.scale, query, p);

    const bool together = query[Q - 1].from - step <= low && query[0].to - step >= high;
    for (int i = 0; i < Q; ++i) {
      const int64_t mine = most(query[i].from - step, 0), end = least(query[i].to - step, kStep);
      if (mine >= end) continue;
      soften(query[i], mine, end);
      if (!together)
        add_values<1>(query + i, v, mine, end, value_size, acc + i * v_room, v_room);
    }
    if (together) add_values<Q>(query, v, low, high, value_size, acc, v_room);
  }
  for (int i = 0; i < Q; ++i) finish(b, query[i], acc + i * v_room);
}

void attend_floats(const Attention& b, Tile tile) {
  const int64_t rows = b.starts[tile.sequence + 1] - b.starts[tile.sequence];
  switch (least(kQueries, rows * (b.heads / b.kv.kv_heads) - tile.first)) {
    case 1: return attend<1>(b, tile);
    case 2: return attend<2>(b, tile);
    case 3: return attend<3>(b, tile);
    default: return attend<kQueries>(b, tile);
  }
}
