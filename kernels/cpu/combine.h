// Sums of contributions that do not depend on who makes parts of them: Combine.EXACT in
// moeserve/kernels/wire.py. A contribution is a whole number of the row's unit; the high limb of
// two counts 2^16 units.
#pragma once

constexpr int32_t kLowest = -2147483647 - 1;  // stands for a sum that is no number

int32_t grid_bits(Kind kind) { return kind == Kind::fp32 ? 20 : 11; }
int64_t limbs_of(Kind kind) { return kind == Kind::fp32 ? 2 : 1; }

INLINE float mean_square(const float* x, int64_t size) {
  F16 squares[4] = {zero(), zero(), zero(), zero()};
  for (int64_t h = 0; h < size; h += 4 * kLanes)
    for (int64_t i = 0; i < 4 && h + i * kLanes < size; ++i) {
      const F16 v = load(x + h + i * kLanes, size - h - i * kLanes);
      squares[i] = fma(v, v, squares[i]);
    }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return total / static_cast<float>(size);
}

float unit_of(const float* x, int64_t size, Kind kind) {
  const float mean = mean_square(x, size);
  if (!(mean < __builtin_inff())) return __builtin_nanf("");
  const float root = __builtin_sqrtf(mean);
  int32_t bits;
  __builtin_memcpy(&bits, &root, sizeof bits);
  bits = static_cast<int32_t>(most((bits >> 23) - 127, -40) - grid_bits(kind) + 127) << 23;
  float unit;
  __builtin_memcpy(&unit, &bits, sizeof unit);
  return unit;
}

void units(const float* x, int64_t rows, const Experts& w, float* out) {
  const int64_t size = w.down.n;
  each_row(rows, size, [&](int64_t t) { out[t] = unit_of(x + t * size, size, w.down.kind); });
}

// To nearest, ties to even; of no use beyond 2^31.
INLINE I nearest(V x) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (I)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
  return (I)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
  return (I)vcvtnq_s32_f32((float32x4_t)x);
#else
  constexpr float kWhole = 8388608.0f;  // 2^23: from here on there are whole numbers only
  const V size = (V)((I)x & 0x7fffffff);
  const V whole = size < kWhole ? (size + kWhole) - kWhole : size;
  const V held = whole < 2147483648.0f ? whole : V{};
  const I found = __builtin_convertvector(held, I);
  return x < 0.0f ? -found : found;
#endif
}

// Limbs of sums, as bits, and the bits of the greatest contribution: those of what is no number are
// above those of any number.
template <int64_t kLimbs>
struct Whole {
  F16 sum[kLimbs] = {};
  I most[kParts] = {};
};

INLINE void add_whole(V& sum, I x) { sum = (V)((U)sum + (U)x); }

// `factor` is the weight in units of the first limb.
template <int64_t kLimbs>
INLINE void add(Whole<kLimbs>& to, F16 y, F16 factor) {
  EACH_PART {
    const V v = y.part[i] * factor.part[i];
    const I whole = nearest(v), size = (I)v & 0x7fffffff;
    to.most[i] = size > to.most[i] ? size : to.most[i];
    add_whole(to.sum[0].part[i], whole);
    if constexpr (kLimbs == 2) {
      const V rest = v - __builtin_convertvector(whole, V);
      add_whole(to.sum[1].part[i], nearest(rest * 65536.0f));
    }
  }
}

// The factor of weight 1. Powers of two: a weight times it times y is y's share in units, exactly.
template <int64_t kLimbs>
float factor_of(float unit) {
  return 1.0f / unit * (kLimbs == 2 ? 1.0f / 65536.0f : 1.0f);
}

// Of 2^(30 - ceil(log2 chosen)).
int32_t bound_bits(int64_t chosen) {
  int32_t power = 30;
  for (int64_t n = 1; n < chosen; n *= 2) --power;
  return (power + 127) << 23;
}

template <int64_t kLimbs>
INLINE void settle(Whole<kLimbs>& whole, int32_t bound) {
  EACH_PART {
    const I lost = whole.most[i] > bound - I{};
    const I kept = (I)whole.sum[0].part[i];
    whole.sum[0].part[i] = (V)(lost ? kLowest - I{} : kept);
  }
}

INLINE F16 number(F16 sum, float unit) {
  EACH_PART {
    const I whole = (I)sum.part[i];
    const V value = __builtin_convertvector(whole, V) * spread(unit);
    sum.part[i] = whole == kLowest - I{} ? spread(__builtin_nanf("")) : value;
  }
  return sum;
}

// Exact in fp64, then rounded once.
INLINE F16 number(F16 high, F16 low, float unit) {
  typedef double D __attribute__((vector_size(8 * kWidth)));
  EACH_PART {
    const I whole = (I)high.part[i];
    const D both = __builtin_convertvector(whole, D) * 65536.0 +
                   __builtin_convertvector((I)low.part[i], D);
    const V value = __builtin_convertvector(both, V) * spread(unit);
    high.part[i] = whole == kLowest - I{} ? spread(__builtin_nanf("")) : value;
  }
  return high;
}

template <int64_t kLimbs>
INLINE F16 number(const Whole<kLimbs>& whole, float unit) {
  if constexpr (kLimbs == 2) return number(whole.sum[0], whole.sum[1], unit);
  else return number(whole.sum[0], unit);
}
