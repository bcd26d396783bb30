// How the matrices of a kind lie in memory, and how one panel gets there (see pack.h).
#pragma once

// Of one matrix: everything that follows from its kind, K and group.
struct Form {
  int64_t lines;        // of 64 bytes in a row of activations; also the chunks of a panel
  int64_t panel_bytes;
  int64_t groups, group, halves, last_halves;  // int4; 1 group otherwise
};

Form form_of(Kind kind, int64_t k, int64_t group) {
  if (kind != Kind::int4) {
    const int64_t per_line = kind == Kind::fp32 ? 16 : kind == Kind::bf16 ? 32 : 64;
    const int64_t lines = ceil_div(k, per_line);
    return {lines, lines * kChunk, 1, k, 0, 0};
  }
  group = most(1, least(group, k));
  const int64_t groups = ceil_div(k, group), halves = ceil_div(group, 32);
  const int64_t last = ceil_div(k - (groups - 1) * group, 32), all = (groups - 1) * halves + last;
  return {ceil_div(all, 2), all * kHalf, groups, group, halves, last};
}

int64_t panels_of(int64_t n, bool paired) {
  return paired ? ceil_div(n / 2, kPanel / 2) : ceil_div(n, kPanel);
}

int64_t packed_bytes(Kind kind, int64_t n, int64_t k, int64_t group, bool paired) {
  return panels_of(n, paired) * form_of(kind, k, group).panel_bytes;
}

// Eight nibbles 0..7 become 0 4 1 5 2 6 3 7: see int4 panels in dot.h.
INLINE uint32_t deal_nibbles(uint32_t x) {
  x = (x & 0xff0000ff) | (x >> 8 & 0x0000ff00) | (x << 8 & 0x00ff0000);
  return (x & 0xf00ff00f) | (x >> 4 & 0x00f000f0) | (x << 4 & 0x0f000f00);
}

// 16 words of a row; past its end they are zero.
INLINE void read_words(const char* row, int64_t bytes, int64_t word, uint32_t* to) {
  const int64_t left = bytes - word * 4;
  if (left >= kLine) {
    __builtin_memcpy(to, row + word * 4, kLine);
    return;
  }
  for (int i = 0; i < kSteps; ++i) to[i] = 0;
  __builtin_memcpy(to, row + word * 4, left);
}

// Four words of int4: the 32 features of half `half` of group `g`.
INLINE void read_half(const uint8_t* row, int64_t k, const Form& form, int64_t g, int64_t half,
                      uint32_t* to) {
  const int64_t first = g * form.group + half * 32;
  const int64_t end = least(k, (g + 1) * form.group);
  if (form.group % 32 == 0 && first + 32 <= end) {
    __builtin_memcpy(to, row + first / 2, 16);
    return;
  }
  for (int i = 0; i < 4; ++i) to[i] = 0;
  for (int64_t f = first; f < least(first + 32, end); ++f)
    to[(f - first) / 8] |= (row[f / 2] >> (f % 2 * 4) & 15u) << ((f - first) % 8 * 4);
}

typedef uint32_t Quad __attribute__((vector_size(16)));

// Words [32 rows][16] to steps [count][32 lanes], `count` a multiple of 4: squares of 4 by 4.
INLINE void turn_words(const uint32_t (*words)[kSteps], int64_t count, uint32_t* to) {
  for (int64_t step = 0; step < count; step += 4)
    for (int64_t lane = 0; lane < kPanel; lane += 4) {
      Quad row[4];
      for (int i = 0; i < 4; ++i) row[i] = *(const Quad*)(words[lane + i] + step);
      const Quad a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Quad b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Quad c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Quad d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      const Quad turned[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5),
                              __builtin_shufflevector(a, b, 2, 3, 6, 7),
                              __builtin_shufflevector(c, d, 0, 1, 4, 5),
                              __builtin_shufflevector(c, d, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) *(Quad*)(to + (step + i) * kPanel + lane) = turned[i];
    }
}

#if defined(__AVX512F__)
// A line of each of 16 rows to 16 half steps. Written past the caches: what is packed is read much
// later, and to fetch a line only to overwrite it costs more than all the rest.
INLINE void turn_lines(const char* const* rows, int64_t at, uint32_t flip, char* to) {
  __m512i row[kSteps], two[kSteps], four[kSteps];
  for (int i = 0; i < kSteps; ++i)
    row[i] = _mm512_xor_si512(_mm512_loadu_si512(rows[i] + at), _mm512_set1_epi32((int)flip));
  for (int i = 0; i < kSteps; i += 2) {
    two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < kSteps; i += 4)
    for (int j = 0; j < 2; ++j) {
      four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + 2 + j]);
      four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + 2 + j]);
    }
  const auto write = [&](int step, __m512i x) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + step * kPanel * 4), x);
  };
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
    write(j, _mm512_shuffle_i32x4(a, b, 0x88));
    write(4 + j, _mm512_shuffle_i32x4(c, d, 0x88));
    write(8 + j, _mm512_shuffle_i32x4(a, b, 0xdd));
    write(12 + j, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}
#endif

// The next panel's rows are `ahead` bytes further on. `to` lies on a line.
void pack_panel(Kind kind, const char* const* rows, int64_t k, const Form& form, int64_t ahead,
                char* to) {
  alignas(64) uint32_t words[kPanel][kSteps];
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  if (kind == Kind::int4) {
    for (int64_t g = 0; g < form.groups; ++g)
      for (int64_t h = 0; h < (g + 1 < form.groups ? form.halves : form.last_halves); ++h) {
        for (int lane = 0; lane < kPanel; ++lane) {
          for (int i = 0; i < 4; ++i) words[lane][i] = 0;
          if (rows[lane])
            read_half(reinterpret_cast<const uint8_t*>(rows[lane]), k, form, g, h, words[lane]);
          for (int i = 0; i < 4; ++i) words[lane][i] = deal_nibbles(words[lane][i]);
        }
        turn_words(words, 4, out);
        out += 4 * kPanel;
      }
    return;
  }
  const int64_t bytes = k * (kind == Kind::fp32 ? 4 : kind == Kind::bf16 ? 2 : 1);
  const uint32_t flip = kind == Kind::int8 ? 0x80808080 : 0;
  int64_t c = 0;
#if defined(__AVX512F__)
  bool full = true;
  for (int lane = 0; lane < kPanel; ++lane) full = full && rows[lane];
  for (; full && (c + 1) * kLine <= bytes; ++c, out += kSteps * kPanel) {
    for (int lane = 0; lane < kPanel; ++lane)
      __builtin_prefetch(rows[lane] + ahead + c * kLine, 0, 2);
    for (int half = 0; half < 2; ++half)
      turn_lines(rows + half * 16, c * kLine, flip, reinterpret_cast<char*>(out + half * 16));
  }
  _mm_sfence();
#endif
  for (; c < form.lines; ++c, out += kSteps * kPanel) {
    for (int lane = 0; lane < kPanel; ++lane) {
      if (!rows[lane]) {
        for (int i = 0; i < kSteps; ++i) words[lane][i] = 0;
      } else {
        __builtin_prefetch(rows[lane] + ahead + c * kLine, 0, 2);
        read_words(rows[lane], bytes, c * kSteps, words[lane]);
      }
      for (int i = 0; i < kSteps; ++i) words[lane][i] ^= flip;
    }
    turn_words(words, kSteps, out);
  }
}
