// Kernels that treat each row by itself: norm, gate, rotation, routing.
#pragma once

// `out` may be `in`.
INLINE void norm_row(const float* in, int64_t size, const float* weight, float eps, float* out) {
  const F16 factor = splat(1.0f / __builtin_sqrtf(mean_square(in, size) + eps));
  for (int64_t h = 0; h < size; h += kLanes) {
    const int64_t left = size - h;
    store(out + h, load(in + h, left) * factor * load(weight + h, left), left);
  }
}

void rms_norm(const float* x, int64_t rows, int64_t size, const float* weight, float eps,
              float* out) {
  each_row(rows, 2 * size,
           [&](int64_t t) { norm_row(x + t * size, size, weight, eps, out + t * size); });
}

void glu(const float* x, int64_t rows, int64_t inner, bool clamped, float* out) {
  each_row(rows, 16 * inner, [&](int64_t t) {
    const float *gate = x + t * 2 * inner, *up = gate + inner;
    for (int64_t i = 0; i < inner; i += kLanes) {
      const int64_t left = inner - i;
      store(out + t * inner + i, activate(load(gate + i, left), load(up + i, left), clamped), left);
    }
  });
}

// The heads of one token; `c` and `s` are its cos and sin.
INLINE void rope_row(const float* x, int64_t heads, int64_t size, const float* c, const float* s,
                     int64_t pairs, bool interleaved, float* out) {
  for (int64_t a = 0; a < heads; ++a) {
    const float* __restrict in = x + a * size;
    float* __restrict to = out + a * size;
    const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const float first = in[i * step], second = in[i * step + apart];
      to[i * step] = first * c[i] - second * s[i];
      to[i * step + apart] = second * c[i] + first * s[i];
    }
    for (int64_t d = 2 * pairs; d < size; ++d) to[d] = in[d];
  }
}

void rope(const float* x, int64_t rows, int64_t heads, int64_t size, const float* cos,
          const float* sin, int64_t pairs, bool interleaved, float* out) {
  each_row(rows, 2 * heads * size, [&](int64_t t) {
    rope_row(x + t * heads * size, heads, size, cos + t * pairs, sin + t * pairs, pairs,
             interleaved, out + t * heads * size);
  });
}

void softmax(const float* in, int64_t n, float* out) {
  float highest = in[0];
  for (int64_t i = 1; i < n; ++i) highest = in[i] > highest ? in[i] : highest;
  F16 total = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    store(out + i, exp(load(in + i, n - i) - splat(highest)), n - i);
    total = total + load(out + i, n - i);  // read back: the lanes past n must not count
  }
  const F16 all = splat(sum(total));
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(out + i, n - i) / all, n - i);
}

// The index of the greatest among those not `taken`, the lowest one of equals.
int64_t best_of(const float* value, const bool* taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (best < 0 || value[i] > value[best])) best = i;
  return best;
}

// Experts outside the best groups can no longer be chosen.
void keep_best_groups(const Routing& spec, float* choice, float* group_score, bool* taken) {
  const int64_t size = spec.experts / spec.groups;
  for (int64_t g = 0; g < spec.groups; ++g) {
    float first = kNever, second = kNever;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      if (choice[i] > first) {
        second = first;
        first = choice[i];
      } else if (choice[i] > second) {
        second = choice[i];
      }
    }
    group_score[g] = spec.top2 && size > 1 ? first + second : first;
    taken[g] = false;
  }
  for (int64_t n = 0; n < spec.kept_groups; ++n)
    taken[best_of(group_score, taken, spec.groups)] = true;
  for (int64_t i = 0; i < spec.experts; ++i)
    if (!taken[i / size]) choice[i] = kNever;
}

void weigh(const Routing& spec, float* weights) {
  if (spec.scoring == 2) {
    softmax(weights, spec.top_k, weights);
  } else if (spec.normalise) {
    float total = 0.0f;
    for (int64_t c = 0; c < spec.top_k; ++c) total += weights[c];
    for (int64_t c = 0; c < spec.top_k; ++c) weights[c] /= total + 1e-20f;
  }
  for (int64_t c = 0; c < spec.top_k; ++c) weights[c] *= spec.scale;
}

void route_topk(const float* logits, int64_t rows, Routing spec, const float* bias, int32_t* ids,
                float* weights) {
  const int64_t experts = spec.experts;
  each_row(rows, experts * (16 + spec.top_k), [&](int64_t t) {
    float* score = static_cast<float*>(scratch(1, experts * (3 * sizeof(float) + sizeof(bool))));
    float *choice = score + experts, *group_score = choice + experts;
    bool* taken = reinterpret_cast<bool*>(group_score + experts);
    const float* logit = logits + t * experts;
    if (spec.scoring == 0) softmax(logit, experts, score);
    for (int64_t i = 0; spec.scoring == 1 && i < experts; i += kLanes)
      store(score + i, sigmoid(load(logit + i, experts - i)), experts - i);
    for (int64_t i = 0; spec.scoring == 2 && i < experts; ++i) score[i] = logit[i];
    for (int64_t i = 0; i < experts; ++i) choice[i] = bias ? score[i] + bias[i] : score[i];
    if (spec.groups > 1) keep_best_groups(spec, choice, group_score, taken);
    for (int64_t i = 0; i < experts; ++i) taken[i] = false;
    for (int64_t c = t * spec.top_k; c < (t + 1) * spec.top_k; ++c) {
      const int64_t best = best_of(choice, taken, experts);
      taken[best] = true;
      ids[c] = static_cast<int32_t>(best);
      weights[c] = score[best];
    }
    weigh(spec, weights + t * spec.top_k);
  });
}
