// Matrices into panels, from rows that lie wherever a mapped file has them.
#pragma once

constexpr int64_t row_bytes_of(Kind kind, int64_t k) {
  return kind == Kind::fp32 ? k * 4 : kind == Kind::bf16 ? k * 2 : kind == Kind::int8 ? k : k / 2;
}

int64_t rows_in(const Blocks& from) {
  int64_t n = 0;
  for (int64_t b = 0; b < from.per_matrix; ++b) n += from.rows[b];
  return n;
}

const char* row_at(const Blocks& from, int64_t matrix, int64_t row, int64_t row_bytes) {
  const void* const* block = from.at + matrix * from.per_matrix;
  int64_t b = 0;
  for (; row >= from.rows[b]; ++b) row -= from.rows[b];
  return static_cast<const char*>(block[b]) + row * row_bytes;
}

// Calls body(index of the panel, its 32 rows) for every panel, with null for lanes past the end.
// Whoever takes an item fills about a huge page of its own: the system zeroes one as it is first
// written, and two threads that meet in one would each zero it.
template <class Body>
void each_panel(const Blocks& from, bool paired, int64_t row_bytes, int64_t panel_bytes,
                const Body& body) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t n = rows_in(from), panels = panels_of(n, paired), half = kPanel / 2;
  const int64_t all = from.count * panels, share = ceil_div(all, 4 * threads());
  const int64_t grain = most(1, least(share, kHugePage / panel_bytes));
  each(ceil_div(all, grain), all * panel_bytes, [&](int64_t item) {
    for (int64_t index = item * grain; index < least(all, (item + 1) * grain); ++index) {
      const int64_t p = index % panels;
      const char* rows[kPanel];
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t row = !paired ? p * kPanel + lane : p * half + lane % half;
        const bool real = row < (paired ? n / 2 : n);
        const int64_t at = paired && lane >= half ? n / 2 + row : row;
        rows[lane] = real ? row_at(from, index / panels, at, row_bytes) : nullptr;
      }
      body(index, rows);
    }
  });
}

void pack(Kind kind, const Blocks& from, int64_t k, int64_t group, bool paired, void* to) {
  const Form form = form_of(kind, k, group);
  const int64_t row_bytes = row_bytes_of(kind, k);
  const int64_t ahead = (paired ? 1 : 2) * kPanel / 2 * row_bytes;
  each_panel(from, paired, row_bytes, form.panel_bytes,
             [&](int64_t index, const char* const* rows) {
               char* panel = static_cast<char*>(to) + index * form.panel_bytes;
               pack_panel(kind, rows, k, form, ahead, panel);
             });
}

void pack_floats(const Blocks& from, int64_t columns, bool paired, float* to) {
  const int64_t panel = columns * kPanel;
  each_panel(from, paired, columns * 4, panel * 4, [&](int64_t index, const char* const* rows) {
    for (int64_t lane = 0; lane < kPanel; ++lane)
      for (int64_t c = 0; c < columns; ++c) {
        const float* row = reinterpret_cast<const float*>(rows[lane]);
        to[index * panel + c * kPanel + lane] = row ? row[c] : 0.0f;
      }
  });
}

// matrix.to_int8 of one row. Returns its scale; NaN where the row holds NaN or an infinity.
template <class T>
float round_row(const T* x, int64_t k, char* to) {
  I most_of[kParts] = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    const F16 v = load(x + i, k - i);
    for (int p = 0; p < kParts; ++p) {
      const I bits = (I)v.part[p] & 0x7fffffff;
      most_of[p] = bits > most_of[p] ? bits : most_of[p];
    }
  }
  int32_t bits = 0;
  for (int p = 0; p < kParts; ++p)
    for (int i = 0; i < kWidth; ++i) bits = most_of[p][i] > bits ? most_of[p][i] : bits;
  if (bits >= 0x7f800000) return __builtin_nanf("");
  float size;
  __builtin_memcpy(&size, &bits, sizeof size);
  const float scale = size / 127.0f;
  const V by = spread(scale > 0 ? scale : 1.0f), high = spread(127.0f), low = spread(-127.0f);
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  for (int64_t i = 0; i < k; i += kLanes, to += kLanes) {
    const F16 v = load(x + i, k - i);
    for (int p = 0; p < kParts; ++p) {
      V q = v.part[p] / by;
      q = q > high ? high : q;
      q = q < low ? low : q;
      narrow_codes((I)(q + spread(kShift)) - (I)spread(kShift), to + p * kWidth);
    }
  }
  return scale;
}

bool round_and_pack(Kind kind, const Blocks& from, int64_t k, bool paired, void* to,
                    float* scale) {
  const Form form = form_of(Kind::int8, k, 0);
  const int64_t stride = form.lines * kLine, row_bytes = row_bytes_of(kind, k);
  const int64_t ahead = (paired ? 1 : 2) * kPanel / 2 * row_bytes;
  bool sound = true;
  each_panel(from, paired, row_bytes, form.panel_bytes,
             [&](int64_t index, const char* const* rows) {
               char* room = static_cast<char*>(scratch(1, kPanel * stride));
               const char* codes[kPanel];
               for (int64_t lane = 0; lane < kPanel; ++lane) {
                 char* row = room + lane * stride;
                 float found = 0.0f;
                 for (int64_t at = 0; rows[lane] && at < row_bytes; at += kLine)
                   __builtin_prefetch(rows[lane] + ahead + at, 0, 2);
                 if (rows[lane])
                   found = kind == Kind::bf16
                               ? round_row(reinterpret_cast<const bf16*>(rows[lane]), k, row)
                               : round_row(reinterpret_cast<const float*>(rows[lane]), k, row);
                 if (found != found) __atomic_store_n(&sound, false, __ATOMIC_RELAXED);
                 scale[index * kPanel + lane] = found;
                 codes[lane] = rows[lane] ? row : nullptr;
               }
               pack_panel(Kind::int8, codes, k, form, 0,
                          static_cast<char*>(to) + index * form.panel_bytes);
             });
  return sound;
}
