// The parts of a layer as one call each: the kernels above, one after the other, with memory that
// stays. Nothing is computed here but copies, bounds and sums of two; so the bits are theirs.
#pragma once

// Pieces of the caller's slot 2, each on a cache line of its own.
class Room {
 public:
  explicit Room(int64_t floats, int64_t pieces = 8)
      : at_(static_cast<float*>(scratch(2, 4 * (floats + pieces * kLanes)))) {}
  float* take(int64_t floats) {
    float* piece = at_;
    at_ += padded(floats);
    return piece;
  }

 private:
  float* at_;
};

INLINE void copy(float* to, const float* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(float));
}

void add_to(float* x, const float* y, int64_t rows, int64_t size) {
  each_row(rows, size, [&](int64_t t) {
    for (int64_t h = t * size; h < (t + 1) * size; h += kLanes) {
      const int64_t left = (t + 1) * size - h;
      store(x + h, load(x + h, left) + load(y + h, left), left);
    }
  });
}

void norm_heads(float* row, int64_t size, int64_t head, Norm norm) {
  if (!norm.weight) return;
  for (int64_t h = 0; h < size; h += head) norm_row(row + h, head, norm.weight, norm.eps, row + h);
}

void bound(float* row, int64_t size, float clip) {
  if (clip == __builtin_inff()) return;
  for (int64_t h = 0; h < size; h += kLanes) {
    const int64_t left = size - h;
    store(row + h, at_most(at_least(load(row + h, left), splat(-clip)), splat(clip)), left);
  }
}

Attention attention_of(const Cache& cache, const Step& step, const float* q, int64_t heads,
                       float scale, float* out) {
  Attention batch{};
  batch.q = q;
  batch.kv = cache;
  batch.out = out;
  batch.starts = step.starts;
  batch.context = step.context;
  batch.blocks = step.blocks;
  batch.sequences = step.sequences;
  batch.table_width = step.table_width;
  batch.heads = heads;
  batch.scale = scale;
  return batch;
}

bool attend_gqa(float* x, const Gqa& w, const Step& step, const Cache& cache) {
  const int64_t rows = step.rows, hidden = w.qkv.k, all = w.qkv.n, size = w.head_size;
  const int64_t wide = w.heads * size, narrow = w.kv_heads * size;
  if (cache.latent || cache.kv_heads != w.kv_heads || cache.head_size != size ||
      cache.value_size != size || 2 * step.pairs > size)
    return false;
  Room room(rows * (hidden + 2 * all));
  float *normed = room.take(rows * hidden), *qkv = room.take(rows * all);
  float *q = room.take(rows * wide), *k = room.take(rows * narrow), *v = room.take(rows * narrow);
  rms_norm(x, rows, hidden, w.norm.weight, w.norm.eps, normed);
  linear(normed, rows, 1, w.qkv, qkv);
  each_row(rows, 4 * all, [&](int64_t t) {
    float* row = qkv + t * all;
    const float *c = step.cos + t * step.pairs, *s = step.sin + t * step.pairs;
    norm_heads(row, wide, w.q_norm_size, w.q_norm);
    norm_heads(row + wide, narrow, w.k_norm_size, w.k_norm);
    bound(row, all, w.clip);
    rope_row(row, w.heads, size, c, s, step.pairs, step.interleaved, q + t * wide);
    rope_row(row + wide, w.kv_heads, size, c, s, step.pairs, step.interleaved, k + t * narrow);
    copy(v + t * narrow, row + wide + narrow, narrow);
  });
  if (!paged::write_kv(cache, k, v, rows, step.slots)) return false;
  float *attended = qkv, *out = normed;
  Attention batch = attention_of(cache, step, q, w.heads, w.scale, attended);
  batch.window = w.window;
  batch.sinks = w.sinks;
  if (!paged::paged_attention(batch)) return false;
  linear(attended, rows, 1, w.o, out);
  add_to(x, out, rows, hidden);
  return true;
}

bool attend_mla(float* x, const Mla& w, const Step& step, const Cache& cache) {
  const int64_t rows = step.rows, hidden = w.down.k, all = w.down.n, heads = w.heads;
  const int64_t key = w.latent + w.rotated, low = all - key, head = w.nope + w.rotated;
  if (!cache.latent || cache.head_size != key || cache.value_size != w.latent ||
      2 * step.pairs > w.rotated)
    return false;
  Room room(rows * (hidden + all + key + low +
                    heads * (head + w.nope + w.latent + key + w.out_of_latent.n)),
            10);
  float *normed = room.take(rows * hidden), *down = room.take(rows * all);
  float *k = room.take(rows * key), *lowered = room.take(rows * low);
  float *q = room.take(rows * heads * head), *nope = room.take(rows * heads * w.nope);
  float *latent = room.take(rows * heads * w.latent), *wide = room.take(rows * heads * key);
  float* value = room.take(rows * heads * w.out_of_latent.n);

  rms_norm(x, rows, hidden, w.norm.weight, w.norm.eps, normed);
  linear(normed, rows, 1, w.down, down);
  each_row(rows, 2 * all, [&](int64_t t) {
    const float *row = down + t * all, *c = step.cos + t * step.pairs;
    if (w.q_up.data)
      norm_row(row, low, w.q_norm.weight, w.q_norm.eps, lowered + t * low);
    else
      copy(q + t * low, row, low);
    norm_row(row + low, w.latent, w.latent_norm.weight, w.latent_norm.eps, k + t * key);
    rope_row(row + low + w.latent, 1, w.rotated, c, step.sin + t * step.pairs, step.pairs,
             step.interleaved, k + t * key + w.latent);
  });
  if (w.q_up.data) linear(lowered, rows, 1, w.q_up, q);
  each_row(rows, heads * w.nope, [&](int64_t t) {
    for (int64_t a = t * heads; a < (t + 1) * heads; ++a)
      copy(nope + a * w.nope, q + a * head, w.nope);
  });
  linear(nope, rows, heads, w.into_latent, latent);
  each_row(rows, 2 * heads * key, [&](int64_t t) {
    for (int64_t a = t * heads; a < (t + 1) * heads; ++a) {
      copy(wide + a * key, latent + a * w.latent, w.latent);
      rope_row(q + a * head + w.nope, 1, w.rotated, step.cos + t * step.pairs,
               step.sin + t * step.pairs, step.pairs, step.interleaved, wide + a * key + w.latent);
    }
  });
  if (!paged::write_kv(cache, k, nullptr, rows, step.slots)) return false;
  if (!paged::paged_attention(attention_of(cache, step, wide, heads, w.scale, latent))) return false;
  linear(latent, rows, heads, w.out_of_latent, value);
  linear(value, rows, 1, w.o, normed);
  add_to(x, normed, rows, hidden);
  return true;
}

// `room` holds 3 * inner floats a row.
void mlp_of(const float* x, int64_t rows, const Mlp& w, float* room, float* out) {
  const int64_t inner = w.down.k;
  float* activated = room + 2 * rows * inner;
  linear(x, rows, 1, w.gate_up, room);
  glu(room, rows, inner, false, activated);
  linear(activated, rows, 1, w.down, out);
}

void dense(float* x, int64_t rows, const Dense& w) {
  const int64_t hidden = w.mlp.gate_up.k, inner = w.mlp.down.k;
  Room room(rows * (2 * hidden + 3 * inner));
  float *normed = room.take(rows * hidden), *out = room.take(rows * hidden);
  rms_norm(x, rows, hidden, w.norm.weight, w.norm.eps, normed);
  mlp_of(normed, rows, w.mlp, room.take(3 * rows * inner), out);
  add_to(x, out, rows, hidden);
}

void route(const float* x, int64_t rows, const Router& w, float* normed, int32_t* ids,
           float* weights) {
  Room room(rows * w.matrix.n);
  float* logits = room.take(rows * w.matrix.n);
  rms_norm(x, rows, w.matrix.k, w.norm.weight, w.norm.eps, normed);
  linear(normed, rows, 1, w.matrix, logits);
  route_topk(logits, rows, w.spec, w.bias, ids, weights);
}

bool has_shared(const Mixture& w) { return w.shared.down.data || w.gate.data; }

int64_t shared_room(const Mixture& w, int64_t rows) {
  return rows * (w.shared.down.data ? 3 * w.shared.down.k : 3);
}

// `room` holds shared_room floats.
void shared_of(const float* normed, int64_t rows, const Mixture& w, float* room, float* out) {
  if (w.shared.down.data) return mlp_of(normed, rows, w.shared, room, out);
  float *logit = room, *weight = room + rows;
  int32_t* only = reinterpret_cast<int32_t*>(room + 2 * rows);
  linear(normed, rows, 1, w.gate, logit);
  Routing one{};
  one.experts = one.top_k = one.groups = one.kept_groups = 1;
  one.scoring = 1;
  one.top2 = true;
  one.scale = 1.0f;
  route_topk(logit, rows, one, nullptr, only, weight);
  moe_ffn(normed, rows, w.gated, only, weight, 1, nullptr, out);
}

void shared(const float* normed, int64_t rows, const Mixture& w, float* out) {
  const int64_t floats = shared_room(w, rows);
  Room room(floats);
  shared_of(normed, rows, w, room.take(floats), out);
}

bool moe(float* x, int64_t rows, const Mixture& w, const float* normed, const int32_t* ids,
         int64_t chosen, const float* weights) {
  const int64_t hidden = w.experts.down.n;
  Room room(rows * (2 * hidden + 1) + shared_room(w, rows));
  float *out = room.take(rows * hidden), *grid = nullptr;
  if (w.combine == Combine::exact) {
    grid = room.take(rows);
    units(x, rows, w.experts, grid);
  }
  if (!moe_ffn(normed, rows, w.experts, ids, weights, chosen, grid, out)) return false;
  if (has_shared(w)) {
    float* extra = room.take(rows * hidden);
    shared_of(normed, rows, w, room.take(shared_room(w, rows)), extra);
    add_to(out, extra, rows, hidden);
  }
  add_to(x, out, rows, hidden);
  return true;
}

void head(const float* x, const int64_t* wanted, int64_t rows, const Head& w, float* out) {
  const int64_t hidden = w.matrix.k;
  Room room(rows * hidden);
  float* normed = room.take(rows * hidden);
  each_row(rows, 2 * hidden, [&](int64_t r) {
    norm_row(x + wanted[r] * hidden, hidden, w.norm.weight, w.norm.eps, normed + r * hidden);
  });
  linear(normed, rows, 1, w.matrix, out);
}
