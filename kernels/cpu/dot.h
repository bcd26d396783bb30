// The loop along K: one panel times a few rows. Everything above it is bookkeeping.
//
// A panel is 32 lanes (output features). K goes in steps of one 32-bit word per lane: one fp32, two
// bf16 or four int8 features, so that a step is 128 bytes and a panel one sequential stream. Rows
// come in tiles: chunk c (16 steps) of row r of a tile of R rows is the 64 bytes at
// (c * R + r) * 64, so a tile is one sequential stream too, and a word of it is spread over lanes.
//
// int8 weights are kept as code + 128: VPDPBUSD multiplies unsigned by signed bytes. Sets without
// it take the 128 off again and keep the sum in 16 bits for one pair: 2 * 128 * 127 fits. kOffset
// is what a product adds to every code. Integer sums are exact, so their order is free.
//
// int4 panels: a word is 8 features, 0..3 in its low nibbles and 4..7 in its high ones.
#pragma once

constexpr int kSteps = 16;
constexpr int kLine = 64;                         // bytes of one row in a chunk
constexpr int kChunk = kSteps * kPanel * 4;       // bytes of a panel in a chunk, but of int4:
constexpr int kHalf = kPanel * 16, kHalfLine = 32;  // 32 features of a panel, of a row
constexpr int kWords = kPanel / kWidth;           // registers per step

// Rows per tile: kWords accumulators a row, and room for the weights and a row's word.
#if defined(__AVX512F__)
constexpr int kTile = 14, kTile4 = 12;
#elif defined(__aarch64__)
constexpr int kTile = 2, kTile4 = 2;
#elif defined(__AVX2__)
constexpr int kTile = 2, kTile4 = 2;
#else
constexpr int kTile = 1, kTile4 = 1;
#endif

typedef int32_t IAny __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int16_t S __attribute__((vector_size(4 * kWidth)));
typedef uint8_t B __attribute__((vector_size(4 * kWidth)));

INLINE I load_words(const char* p) { return (I) * (const IAny*)p; }
INLINE I spread_word(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word - I{};
}

// What to fetch while a panel is multiplied: `lines` cache lines for every 512 bytes (a unit) of it,
// from `from[0]` on and, from unit `turn` on (a multiple of 4), from `from[1]` on.
struct Ahead {
  const char* from[2];
  int64_t turn;
  int lines;
};

// Into the second cache: it can wait for more lines at a time than the first, which holds the rows.
INLINE void fetch(const char*& at, int lines) {
  for (int i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at, 0, 2);
}

struct Fp32 {
  using Sum = V;
  INLINE V add(V sum, I w, I x) { return fma((V)x, (V)w, sum); }
};

struct Bf16 {
  using Sum = V;
  INLINE V add(V sum, I w, I x) {
#if defined(__AVX512BF16__)
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    constexpr int32_t kOdd = -65536;
    sum = fma((V)(x & kOdd), (V)(w & kOdd), sum);
    return fma((V)(x << 16), (V)(w << 16), sum);
#endif
  }
};

// sum += w . x over four bytes, where w is less than 128.
INLINE I add_small(I sum, I w, I x) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
  return sum + (I)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return sum + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
  const S even = ((S)w << 8 >> 8) * ((S)x << 8 >> 8), odd = ((S)w >> 8) * ((S)x >> 8);
  const I both = (I)(even + odd);
  return sum + (both << 16 >> 16) + (both >> 16);
#endif
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int32_t kOffset = 128;
#else
constexpr int32_t kOffset = 0;
#endif

struct Int8 {
  using Sum = I;
  INLINE I add(I sum, I w, I x) {
    if constexpr (kOffset) return add_small(sum, w, x);
    const I code = w ^ (int32_t)0x80808080;
#if defined(__AVX512BW__)
    const __m512i c = (__m512i)code, z = (__m512i)x;
    const __m512i turned = _mm512_mask_sub_epi8(z, _mm512_movepi8_mask(c), _mm512_setzero_si512(), z);
    return add_small(sum, (I)_mm512_abs_epi8(c), (I)turned);
#elif defined(__AVX2__)
    const __m256i c = (__m256i)code;
    return add_small(sum, (I)_mm256_abs_epi8(c), (I)_mm256_sign_epi8((__m256i)x, c));
#else
    return add_small(sum, code, x);
#endif
  }
};

// Sums of bf16 products treat denormals as zero, in and out, as VDPBF16PS does.
struct Flush {
#if defined(__AVX512BF16__)
  ~Flush() {}
#elif defined(__x86_64__)
  uint32_t before;
  INLINE void set(uint32_t mode) { asm volatile("ldmxcsr %0" ::"m"(mode) : "memory"); }
  Flush() {
    asm volatile("stmxcsr %0" : "=m"(before)::"memory");
    set(before | 0x8040);
  }
  ~Flush() { set(before); }
#elif defined(__aarch64__)
  uint64_t before;
  INLINE void set(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
  Flush() {
    asm volatile("mrs %0, fpcr" : "=r"(before)::"memory");
    set(before | (1u << 24));
  }
  ~Flush() { set(before); }
#else
  ~Flush() {}
#endif
};
struct Keep {
  ~Keep() {}
};
template <class Op>
struct ModeOf {
  using Type = Keep;
};
template <>
struct ModeOf<Bf16> {
  using Type = Flush;
};

// out[r][lane], the bits of Op's sum: K ascending, one accumulator per output.
template <class Op, int R>
__attribute__((noinline)) void panel_sums(const char* panel, const char* x, int64_t chunks,
                                          const Ahead& ahead, float* out) {
  const typename ModeOf<Op>::Type mode;
  typename Op::Sum sum[R][kWords] = {};
  for (int part = 0; part < 2; ++part) {
    const char* next = ahead.from[part];
    const int64_t turn = ahead.turn / 4;
    for (int64_t c = part ? turn : 0; c < (part ? chunks : turn); ++c) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        fetch(next, ahead.lines);
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          I w[kWords];
#pragma GCC unroll 8
          for (int i = 0; i < kWords; ++i)
            w[i] = load_words(panel + (step * kWords + i) * 4 * kWidth);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const I word = spread_word(x + r * kLine + step * 4);
#pragma GCC unroll 8
            for (int i = 0; i < kWords; ++i) sum[r][i] = Op::add(sum[r][i], w[i], word);
          }
        }
        panel += 4 * kPanel * 4;
        x += 4 * 4;
      }
      x += (R - 1) * kLine;
    }
  }
  typedef typename Op::Sum Any __attribute__((aligned(4), may_alias));
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kWords; ++i)
      *(Any*)(out + r * kPanel + i * kWidth) = sum[r][i];
}

// What a panel of int4 needs beside its codes.
struct Grouped {
  const float* scale;   // [groups][32]
  const uint8_t* zero;  // [groups][32], or null: `same`
  const int32_t* sums;  // of the rows' codes, [R][groups]
  const int8_t* levels;
  int64_t groups, halves, last_halves;  // 32s of features per group, in the last one
  int32_t same;
};

INLINE I look_up(I codes, I table) {
#if defined(__AVX512BW__)
  return (I)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes);
#elif defined(__AVX2__)
  return (I)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes);
#elif defined(__aarch64__)
  return (I)vqtbl1q_s8((int8x16_t)table, (uint8x16_t)codes);
#else
  B found;
  for (int i = 0; i < 4 * kWidth; ++i) found[i] = ((B)table)[((B)codes)[i]];
  return (I)found;
#endif
}

// out[r][lane] = sum over groups, ascending, of (exact sum) * scale, each step one fma.
template <int R, bool kLevels, bool kSame>
__attribute__((noinline)) void panel_sums4(const char* panel, const char* x, const Grouped& w,
                                           const Ahead& ahead, float* out) {
  constexpr int32_t kLow = 0x0f0f0f0f;
  I table{};
  if (kLevels)
    for (int i = 0; i < 4 * kWidth; ++i)
      ((B&)table)[i] = static_cast<uint8_t>(w.levels[i % 16] + 128);
  for (int i = 0; i < R * kPanel; ++i) out[i] = 0.0f;
  const char* next = ahead.from[0];
  int64_t half = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    I sum[R][kWords];
    for (int r = 0; r < R; ++r) {
      const int32_t codes = w.sums[r * w.groups + g];
      for (int i = 0; i < kWords; ++i) {
        if (kSame) {
          sum[r][i] = I{} - w.same * codes;
        } else {
          typedef uint8_t Bytes __attribute__((vector_size(kWidth), aligned(1), may_alias));
          const Bytes zero = *(const Bytes*)(w.zero + g * kPanel + i * kWidth);
          sum[r][i] = __builtin_convertvector(zero, I) * -codes;
        }
      }
    }
    const int64_t end = half + (g + 1 < w.groups ? w.halves : w.last_halves);
    for (; half < end; ++half) {
      if (half == ahead.turn) next = ahead.from[1];
      fetch(next, ahead.lines);
      const char* row = x + (half >> 1) * (R * kLine) + (half & 1) * kHalfLine;
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        I w8[2][kWords];
#pragma GCC unroll 8
        for (int i = 0; i < kWords; ++i) {
          const I both = load_words(panel + (step * kWords + i) * 4 * kWidth);
          w8[0][i] = both & kLow;
          w8[1][i] = (both >> 4) & kLow;
          if (kLevels) w8[0][i] = look_up(w8[0][i], table), w8[1][i] = look_up(w8[1][i], table);
        }
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const I word = spread_word(row + r * kLine + step * 8 + h * 4);
#pragma GCC unroll 8
            for (int i = 0; i < kWords; ++i)
              sum[r][i] = kLevels ? Int8::add(sum[r][i], w8[h][i], word)
                                  : add_small(sum[r][i], w8[h][i], word);
          }
      }
      panel += kHalf;
    }
    for (int i = 0; i < kWords; ++i) {
      const V scale = (V) * (const VAny*)(w.scale + g * kPanel + i * kWidth);
      for (int r = 0; r < R; ++r) {
        VAny* total = (VAny*)(out + r * kPanel + i * kWidth);
        *total = (VAny)fma(__builtin_convertvector(sum[r][i], V), scale, (V)*total);
      }
    }
  }
}
