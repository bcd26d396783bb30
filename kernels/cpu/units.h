// Four bytes at a time: a unit is two bf16 or four 8-bit numbers, and one lane of sixteen.
//
// A product of units sums along the unit. In bf16 it is fma(even, even, fma(odd, odd, sum)) with
// denormals as zero, which is what VDPBF16PS does; the others do the same with two operations,
// under `Flush`. In 8 bits it is exact. So every set with a fused multiply-add gives the same bits.
#pragma once

struct N16 {
  I part[kParts];
};

typedef int32_t IAny __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint8_t B __attribute__((vector_size(kWidth)));
typedef uint8_t BAny __attribute__((vector_size(kWidth), aligned(1), may_alias));

INLINE N16 load_units(const void* p) {
  N16 r;
  EACH_PART r.part[i] = (I) * (const IAny*)(static_cast<const char*>(p) + 4 * kWidth * i);
  return r;
}

INLINE N16 splat_unit(uint32_t unit) {
  N16 r;
  EACH_PART r.part[i] = static_cast<int32_t>(unit) - I{};
  return r;
}

INLINE N16 no_units() { return N16{}; }

INLINE F16 dot_bf16(F16 sum, N16 a, N16 b) {
#if defined(__AVX512BF16__)
  sum.part[0] =
      (V)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
#else
  EACH_PART {
    const V odd = fma((V)(a.part[i] & ~0xffff), (V)(b.part[i] & ~0xffff), sum.part[i]);
    sum.part[i] = fma((V)(a.part[i] << 16), (V)(b.part[i] << 16), odd);
  }
#endif
  return sum;
}

// `a` holds bytes 0..255, `b` -128..127.
INLINE N16 dot_bytes(N16 sum, N16 a, N16 b) {
#if defined(__AVX512VNNI__)
  sum.part[0] =
      (I)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)a.part[0], (__m512i)b.part[0]);
#elif defined(__AVXVNNI__)
  EACH_PART sum.part[i] = (I)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)a.part[i],
                                                     (__m256i)b.part[i]);
#elif defined(__AVX512F__)
  const __m512i x = (__m512i)a.part[0], y = (__m512i)b.part[0], low = _mm512_set1_epi16(255);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(x, low),
                                         _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(y, 8));
  sum.part[0] += (I)even + (I)odd;
#elif defined(__AVX2__)
  EACH_PART {
    const __m256i x = (__m256i)a.part[i], y = (__m256i)b.part[i], low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    sum.part[i] += (I)even + (I)odd;
  }
#else
  EACH_PART for (int shift = 0; shift < 32; shift += 8)
      sum.part[i] += ((a.part[i] >> shift) & 255) * ((b.part[i] << (24 - shift)) >> 24);
#endif
  return sum;
}

INLINE F16 to_float(N16 x) {
  F16 r;
  EACH_PART r.part[i] = __builtin_convertvector(x.part[i], V);
  return r;
}

INLINE N16 operator-(N16 a, N16 b) {
  EACH_PART a.part[i] = a.part[i] - b.part[i];
  return a;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

// The integers nearest to |x| < 2^22. NaN becomes some integer.
INLINE N16 nearest(F16 x) {
  N16 r;
#if defined(__AVX512F__)
  r.part[0] = (I)_mm512_cvtps_epi32((__m512)x.part[0]);
#else
  EACH_PART r.part[i] = (I)(x.part[i] + spread(kRound)) - (I)spread(kRound);
#endif
  return r;
}

INLINE void store_bytes(uint8_t* to, N16 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x.part[0]));
#elif defined(__AVX2__)
  // Packs work within halves; the last step puts their quarters in order.
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)x.part[0], low),
                                            _mm256_and_si256((__m256i)x.part[1], low));
  const __m256i bytes = _mm256_permutevar8x32_epi32(
      _mm256_packus_epi16(words, words), _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(bytes));
#else
  EACH_PART *(BAny*)(to + i * kWidth) = (BAny)__builtin_convertvector((U)x.part[i], B);
#endif
}

// Rounded to bf16, ties to even, and kept as floats. For numbers that are not negative, or NaN
// whose low half is zero: all that come of bf16 operands.
INLINE F16 round_bf16(F16 x) {
  EACH_PART {
    const U bits = (U)x.part[i];
    x.part[i] = (V)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
  }
  return x;
}

INLINE void store_bf16(bf16* to, F16 rounded) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)((U)rounded.part[0] >> 16)));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32((__m256i)((U)rounded.part[0] >> 16),
                                            (__m256i)((U)rounded.part[1] >> 16));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(words, 0xd8));
#else
  EACH_PART *(HAny*)(to + i * kWidth) =
      (HAny)__builtin_convertvector((U)rounded.part[i] >> 16, H);
#endif
}

// 2^x of x <= 0 within 3 units of the last place; 2^0 is exactly 1, below -125 it is 0, NaN stays.
INLINE V exp2(V x) {
  const V floor = spread(-125.0f), y = x < floor ? floor : x;
#if defined(__AVX512F__)
  const V n = (V)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const V shifted = y + spread(kRound), n = shifted - spread(kRound);
#endif
  const V r = y - n;
  V p = spread(1.326472569e-03f);
  p = fma(p, r, spread(9.671513090e-03f));
  p = fma(p, r, spread(5.550733751e-02f));
  p = fma(p, r, spread(2.402224208e-01f));
  p = fma(p, r, spread(6.931469776e-01f));
  p = fma(p, r, spread(1.0f));
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)floor, _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  const V whole = p * (V)(((I)shifted - (I)spread(kRound) + 127) << 23);
  return x < floor ? V{} : whole;
#endif
}

INLINE F16 exp2(F16 x) {
  EACH_PART x.part[i] = exp2(x.part[i]);
  return x;
}

INLINE float exp2(float x) { return exp2(spread(x))[0]; }

INLINE float first_lane(F16 x) { return x.part[0][0]; }

// The greatest of 16, in every lane; where there is NaN, any of them.
INLINE F16 greatest_everywhere(F16 x) {
#if defined(__AVX512F__)
  __m512 m = (__m512)x.part[0];
  m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0x4e));
  m = _mm512_max_ps(m, _mm512_shuffle_f32x4(m, m, 0xb1));
  m = _mm512_max_ps(m, _mm512_permute_ps(m, 0x4e));
  x.part[0] = (V)_mm512_max_ps(m, _mm512_permute_ps(m, 0xb1));
  return x;
#else
  return splat(greatest(x));
#endif
}

// Into the second cache: from memory, the few lines that the first one can wait for are too few.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// While it lives, denormals are zero on the way in and out.
class Flush {
 public:
#if defined(__x86_64__)
  Flush() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~Flush() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Flush() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1ull << 24)));
  }
  ~Flush() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};
