// Sixteen floats at a time, on any instruction set. Included once per set, inside its namespace.
//
// F16 is one AVX-512 register, two of AVX2, four of SSE or NEON; lane i is always the same element
// and sums fold in the same order (8 + 8, 4 + 4, 2 + 2, 1 + 1), and a multiply-add rounds once also
// where no instruction does it, so that every set gives the same bits.
#pragma once

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;
constexpr float kNever = -__builtin_inff();

using bf16 = uint16_t;

typedef float V __attribute__((vector_size(4 * kWidth)));
typedef int32_t I __attribute__((vector_size(4 * kWidth)));
typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
typedef uint16_t H __attribute__((vector_size(2 * kWidth)));
typedef float VAny __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t HAny __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

struct F16 {
  V part[kParts];
};

#define INLINE static inline __attribute__((always_inline))

INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  // The product is exact in fp64. The sum is rounded to odd there: where it is inexact its last bit
  // is set, so that the second rounding falls as a single one would.
  typedef double D __attribute__((vector_size(8 * kWidth)));
  typedef int64_t L __attribute__((vector_size(8 * kWidth)));
  const D p = __builtin_convertvector(a, D) * __builtin_convertvector(b, D);
  const D t = __builtin_convertvector(c, D), s = p + t, v = s - p;
  const D lost = (p - (s - v)) + (t - v);
  const L bits = (L)s, finite = (bits & 0x7ff0000000000000) != 0x7ff0000000000000;
  const L inexact = (L)(lost != 0.0) & ((bits & 1) == 0) & finite;
  const L step = (L)((lost > 0.0) == (s > 0.0)) & 2;  // 2 away from zero, 0 towards it
  return __builtin_convertvector((D)(bits + (inexact & (step - 1))), V);
#endif
}

// x - 0 is x also for -0, where 0 + x is not.
INLINE V spread(float x) { return x - V{}; }

INLINE V widen(H h) {
#if defined(__AVX512F__)
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (V)(__builtin_convertvector(h, U) << 16);
#endif
}

#define EACH_PART for (int i = 0; i < kParts; ++i)

INLINE F16 zero() { return F16{}; }

INLINE F16 splat(float x) {
  F16 r;
  EACH_PART r.part[i] = spread(x);
  return r;
}

INLINE F16 load(const float* p) {
  F16 r;
  EACH_PART r.part[i] = (V) * (const VAny*)(p + i * kWidth);
  return r;
}

INLINE F16 load(const bf16* p) {
  F16 r;
  EACH_PART r.part[i] = widen((H) * (const HAny*)(p + i * kWidth));
  return r;
}

INLINE void store(float* p, F16 x) {
  EACH_PART *(VAny*)(p + i * kWidth) = (VAny)x.part[i];
}

// The first n of 16; the rest are zero and not read.
template <class T>
INLINE F16 load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T whole[kLanes] = {};
  __builtin_memcpy(whole, p, n * sizeof(T));
  return load(whole);
}

INLINE void store(float* p, F16 x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  float whole[kLanes];
  store(whole, x);
  __builtin_memcpy(p, whole, n * sizeof(float));
}

INLINE F16 fma(F16 a, F16 b, F16 c) {
  EACH_PART c.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return c;
}

INLINE F16 operator+(F16 a, F16 b) {
  EACH_PART a.part[i] = a.part[i] + b.part[i];
  return a;
}

INLINE F16 operator-(F16 a, F16 b) {
  EACH_PART a.part[i] = a.part[i] - b.part[i];
  return a;
}

INLINE F16 operator*(F16 a, F16 b) {
  EACH_PART a.part[i] = a.part[i] * b.part[i];
  return a;
}

INLINE F16 operator/(F16 a, F16 b) {
  EACH_PART a.part[i] = a.part[i] / b.part[i];
  return a;
}

// A NaN in `a` stays, as it does in torch's clamp.
INLINE F16 at_least(F16 a, F16 floor) {
  EACH_PART a.part[i] = a.part[i] < floor.part[i] ? floor.part[i] : a.part[i];
  return a;
}

INLINE F16 at_most(F16 a, F16 ceiling) {
  EACH_PART a.part[i] = a.part[i] > ceiling.part[i] ? ceiling.part[i] : a.part[i];
  return a;
}

INLINE float sum(F16 x) {
#if defined(__AVX512F__)
  const __m512 z = (__m512)x.part[0];
  const __m256 e = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
#elif defined(__AVX2__)
  const __m256 e = (__m256)(x.part[0] + x.part[1]);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
#else
  const V q = (x.part[0] + x.part[2]) + (x.part[1] + x.part[3]);
#endif
#if defined(__AVX2__)
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
#else
  return (q[0] + q[2]) + (q[1] + q[3]);
#endif
}

INLINE float greatest(F16 x) {
  float lanes[kLanes];
  store(lanes, x);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// e^x within 1.5 ulp: 2^n e^r with r in +-ln(2)/2 and a polynomial for e^r. exp(0) is exactly 1.
// Below the least normal float it is 0, above the greatest infinity; NaN stays NaN.
INLINE V exp(V x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V low = spread(-87.33654f), high = spread(88.72283f);
  V y = x < low ? low : x;
  y = y > high ? high : y;
  const V shifted = fma(y, spread(1.44269504f), spread(kShift));
  const V n = shifted - spread(kShift);
  V r = fma(n, spread(-0.693145752f), y);
  r = fma(n, spread(-1.42860677e-6f), r);
  V p = spread(1.9875691500e-4f);
  p = fma(p, r, spread(1.3981999507e-3f));
  p = fma(p, r, spread(8.3334519073e-3f));
  p = fma(p, r, spread(4.1665795894e-2f));
  p = fma(p, r, spread(1.6666665459e-1f));
  p = fma(p, r, spread(5.0000001201e-1f));
  p = fma(p, r * r, r) + spread(1.0f);
  // 2^n in two factors, since n may be 128.
  const I k = (I)shifted - (I)spread(kShift);
  const I half = k >> 1;
  p = p * (V)((half + 127) << 23) * (V)((k - half + 127) << 23);
  p = x < low ? V{} : p;
  return x > high ? spread(__builtin_inff()) : p;
}

INLINE F16 exp(F16 x) {
  EACH_PART x.part[i] = exp(x.part[i]);
  return x;
}

INLINE F16 sigmoid(F16 x) {
  const F16 one = splat(1.0f);
  return one / (one + exp(zero() - x));
}

INLINE float exp1(float x) { return exp(spread(x))[0]; }
