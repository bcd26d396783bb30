// Activations as the weights want them: rows of fp32 become rows of words (see dot.h).
#pragma once

// Rows of activations for one kind of weights. `scale` belongs to int8 and int4, `sums` too: the
// sum of a row's codes, for int4 one per group.
struct Inputs {
  char* data;
  float* scale;
  int32_t* sums;
};

constexpr int64_t bytes_of(const Form& form, int64_t rows) {
  return rows * (form.lines * kLine + 64 + 4 * form.groups);
}

// Lays out `rows` rows from `memory` on, and moves `memory` past them.
Inputs take_inputs(const Form& form, int64_t rows, char*& memory) {
  Inputs r;
  r.data = memory;
  r.scale = reinterpret_cast<float*>(memory + rows * form.lines * kLine);
  r.sums = reinterpret_cast<int32_t*>(r.scale + rows);
  memory += ceil_div(bytes_of(form, rows), 64) * 64;
  return r;
}

typedef int8_t Code __attribute__((vector_size(kWidth)));
typedef int8_t CodeAny __attribute__((vector_size(kWidth), aligned(1), may_alias));

INLINE void narrow_codes(I codes, char* to) {
  *(CodeAny*)to = (CodeAny)__builtin_convertvector(codes, Code);
}

// The greatest magnitude's bits: those of NaN and infinity are above those of any number.
int32_t greatest_bits(const float* x, int64_t k) {
  I most_of[kParts] = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    const F16 v = load(x + i, k - i);
    for (int p = 0; p < kParts; ++p) {
      const I bits = (I)v.part[p] & 0x7fffffff;
      most_of[p] = bits > most_of[p] ? bits : most_of[p];
    }
  }
  int32_t found = 0;
  for (int p = 0; p < kParts; ++p)
    for (int i = 0; i < kWidth; ++i) found = most_of[p][i] > found ? most_of[p][i] : found;
  return found;
}

// matrix.quantize_rows of one row. Lines of 64 codes go to `to`, `stride` bytes apart; the scale
// is returned, and the sum of the codes.
float quantize(const float* x, int64_t k, char* to, int64_t stride, int32_t* total) {
  constexpr float kTiny = 7.8886090522101181e-31f;  // 2^-100: 127 over it is a number
  constexpr float kShift = 12582912.0f;             // 1.5 * 2^23: adding it rounds to an integer
  const int32_t bits = greatest_bits(x, k);
  const bool sound = bits < 0x7f800000;
  float size;
  __builtin_memcpy(&size, &bits, sizeof size);
  const bool some = sound && size >= kTiny;
  const V factor = spread(some ? 127.0f / size : 0.0f);
  I sum[kParts] = {};
  for (int64_t line = 0; line * 64 < k; ++line, to += stride)
    for (int i = 0; i < 64; i += kLanes) {
      const int64_t at = line * 64 + i;
      const F16 v = sound && at < k ? load(x + at, k - at) : zero();
      for (int p = 0; p < kParts; ++p) {
        const I code = (I)(v.part[p] * factor + spread(kShift)) - (I)spread(kShift);
        sum[p] = sum[p] + code;
        narrow_codes(code, to + i + p * kWidth);
      }
    }
  *total = 0;
  for (int p = 0; p < kParts; ++p)
    for (int i = 0; i < kWidth; ++i) *total += sum[p][i];
  return !sound ? __builtin_nanf("") : some ? size / 127.0f : 0.0f;
}

// Groups start on a multiple of 32 codes: spreads them where they do not, and sums each.
void sum_groups(const Form& form, int64_t k, char* codes, int64_t stride, int32_t* sums) {
  const auto at = [&](int64_t i) -> char& { return codes[i / 64 * stride + i % 64]; };
  if (form.group % 32 && form.groups > 1) {
    for (int64_t g = form.groups - 1; g >= 0; --g) {
      const int64_t size = least(form.group, k - g * form.group), place = g * form.halves * 32;
      for (int64_t i = size - 1; i >= 0; --i) at(place + i) = at(g * form.group + i);
      const int64_t end = (g + 1 < form.groups ? form.halves : form.last_halves) * 32;
      for (int64_t i = size; i < end; ++i) at(place + i) = 0;
    }
  }
  int64_t half = 0;
  for (int64_t g = 0; g < form.groups; ++g) {
    int32_t total = 0;
    const int64_t end = half + (g + 1 < form.groups ? form.halves : form.last_halves);
    for (; half < end; ++half) {
      const char* from = &at(half * 32);
      for (int i = 0; i < 32; ++i) total += static_cast<int8_t>(from[i]);
    }
    sums[g] = total;
  }
}

// To nearest, ties to even; NaN stays a (quiet) NaN. Sixteen floats to sixteen bf16.
INLINE void narrow(F16 x, char* to) {
  typedef uint16_t Half __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
  for (int p = 0; p < kParts; ++p) {
    const U bits = (U)x.part[p];
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U kept = x.part[p] != x.part[p] ? (bits >> 16) | 0x40 : rounded;
    *(Half*)(to + p * 2 * kWidth) = (Half)__builtin_convertvector(kept, H);
  }
}

// One row of `k` floats; its lines go to `to`, `stride` bytes apart.
void prepare(Kind kind, const Form& form, const float* x, int64_t k, char* to, int64_t stride,
             float* scale, int32_t* sums) {
  if (kind == Kind::int8) {
    *scale = quantize(x, k, to, stride, sums);
  } else if (kind == Kind::int4) {
    int32_t total;
    for (int64_t line = ceil_div(k, 64); line < form.lines; ++line)
      __builtin_memset(to + line * stride, 0, kLine);
    *scale = quantize(x, k, to, stride, &total);
    sum_groups(form, k, to, stride, sums);
  } else {
    const int64_t per_line = kind == Kind::fp32 ? 16 : 32;
    for (int64_t line = 0; line < form.lines; ++line, to += stride)
      for (int64_t i = 0; i < per_line; i += kLanes) {
        const int64_t at = line * per_line + i;
        const F16 v = at < k ? load(x + at, k - at) : zero();
        if (kind == Kind::fp32)
          store(reinterpret_cast<float*>(to), v);
        else
          narrow(v, to + i * 2);
      }
  }
}

void quantize_per_token(const float* x, int64_t rows, int64_t k, int8_t* codes, float* scale) {
  each_row(rows, 2 * k, [&](int64_t t) {
    char* line = static_cast<char*>(scratch(1, ceil_div(k, 64) * 64));
    int32_t total;
    scale[t] = quantize(x + t * k, k, line, 64, &total);
    __builtin_memcpy(codes + t * k, line, k);
  });
}
