// Tokens on their way to the ranks of their experts, and the experts' sums on their way back: the
// records and rows of moeserve/kernels/wire.py, read and written where they lie.
#pragma once

struct Record {
  Kind payload;
  int64_t hidden, chosen, feature_bytes, scale_at, slots_at, bytes;
};

Record record_of(Kind payload, int64_t hidden, int64_t chosen) {
  const int64_t size = hidden * (payload == Kind::fp32 ? 4 : payload == Kind::bf16 ? 2 : 1);
  const int64_t scale_at = ceil_div(size, 4) * 4, slots_at = scale_at + 8 + 4 * chosen;
  return {payload, hidden, chosen, size, scale_at, slots_at, slots_at + ceil_div(chosen, 2) * 4};
}

Record record_of(const Mixture& w, int64_t chosen) {
  return record_of(w.experts.gate_up.kind, w.experts.down.n, chosen);
}

// Slots of the caller's Room.
template <class T>
T* take(Room& room, int64_t count) {
  return reinterpret_cast<T*>(room.take(ceil_div(count * sizeof(T), 4)));
}

constexpr int64_t kPiece = sizeof(void*) / 4;  // floats of a pointer

int64_t size_for(const Copies& copies, int64_t rank) {
  return copies.starts[rank + 1] - copies.starts[rank];
}

// Whether copies are counted and in order, and every one is of a row that is there.
bool in_order(const Copies& copies, int64_t rows) {
  if (copies.starts[0] != 0 || copies.starts[copies.ranks] != copies.count) return false;
  for (int64_t r = 0; r < copies.ranks; ++r)
    if (size_for(copies, r) < 0) return false;
  for (int64_t n = 0; n < copies.count; ++n)
    if (copies.token[n] < 0 || copies.token[n] >= rows) return false;
  return true;
}

// Copies sorted by row: those of row t are order[first[t] : first[t + 1]], in order of ranks.
void sort_by_row(const Copies& copies, int64_t rows, int32_t* first, int32_t* order) {
  for (int64_t t = 0; t <= rows; ++t) first[t] = 0;
  for (int64_t n = 0; n < copies.count; ++n) ++first[copies.token[n]];
  int32_t total = 0;
  for (int64_t t = 0; t <= rows; ++t) {
    const int32_t count = first[t];
    first[t] = total;
    total += count;
  }
  for (int64_t n = 0; n < copies.count; ++n)
    order[first[copies.token[n]]++] = static_cast<int32_t>(n);
  for (int64_t t = rows; t > 0; --t) first[t] = first[t - 1];
  first[0] = 0;
}

// Where the record of each copy is to be written. False if an area is too small.
bool place_copies(const Copies& copies, const Segments& areas, int64_t record, char** place) {
  if (areas.count != copies.ranks) return false;
  for (int64_t r = 0; r < copies.ranks; ++r) {
    if (size_for(copies, r) * record > areas.bytes[r]) return false;
    for (int64_t n = 0; n < size_for(copies, r); ++n)
      place[copies.starts[r] + n] = areas.at[r] + n * record;
  }
  return true;
}

// The records of all segments in turn; the number of them, or -1 where one is cut off.
int64_t count_records(const Segments& from, int64_t record) {
  int64_t rows = 0;
  for (int64_t s = 0; s < from.count; ++s) {
    if (from.bytes[s] < 0 || from.bytes[s] % record) return -1;
    rows += from.bytes[s] / record;
  }
  return rows;
}

void find_records(const Segments& from, int64_t record, const char** row) {
  for (int64_t s = 0; s < from.count; ++s)
    for (int64_t at = 0; at < from.bytes[s]; at += record) *row++ = from.at[s] + at;
}

void write_slots(const Record& record, const int16_t* slots, char* to) {
  __builtin_memset(to + record.bytes - 4, 0, 4);
  __builtin_memcpy(to + record.slots_at, slots, 2 * record.chosen);
}

// The features of a row as products want them; the scale, if they have one.
float write_features(const Record& record, const float* x, char* to) {
  const int64_t hidden = record.hidden;
  if (record.payload == Kind::fp32) {
    __builtin_memcpy(to, x, 4 * hidden);
    return 0.0f;
  }
  __builtin_memset(to + record.scale_at - 4, 0, 4);
  if (record.payload == Kind::bf16) {
    int64_t h = 0;
    for (; h + kLanes <= hidden; h += kLanes) narrow(load(x + h), to + 2 * h);
    char rest[2 * kLanes];
    narrow(load(x + h, hidden - h), rest);
    __builtin_memcpy(to + 2 * h, rest, 2 * (hidden - h));
    return 0.0f;
  }
  int32_t total;
  if (hidden % kLine == 0) return quantize(x, hidden, to, kLine, &total);
  char* line = static_cast<char*>(scratch(1, ceil_div(hidden, kLine) * kLine));
  const float scale = quantize(x, hidden, line, kLine, &total);
  __builtin_memcpy(to, line, hidden);
  return scale;
}

bool pack_tokens(const float* x, const float* normed, const float* weights, int64_t rows,
                 const Mixture& w, const Copies& copies, const Segments& areas) {
  if (!in_order(copies, rows)) return false;
  const Record record = record_of(w, copies.chosen);
  const int64_t hidden = record.hidden, count = copies.count;
  Room room(rows + 1 + count * (1 + kPiece));
  int32_t *first = take<int32_t>(room, rows + 1), *order = take<int32_t>(room, count);
  char** place = take<char*>(room, count);
  if (!place_copies(copies, areas, record.bytes, place)) return false;
  sort_by_row(copies, rows, first, order);
  each_row(rows, 5 * hidden, [&](int64_t t) {
    char* whole = nullptr;
    for (int64_t i = first[t]; i < first[t + 1]; ++i) {
      char* to = place[order[i]];
      if (whole) {
        __builtin_memcpy(to, whole, record.slots_at);
      } else {
        const bool exact = w.combine == Combine::exact;
        const float two[2] = {write_features(record, normed + t * hidden, to),
                              exact ? unit_of(x + t * hidden, hidden, w.experts.down.kind) : 0.0f};
        __builtin_memcpy(to + record.scale_at, two, sizeof two);
        __builtin_memcpy(to + record.scale_at + 8, weights + t * record.chosen, 4 * record.chosen);
        whole = to;
      }
      write_slots(record, copies.slot + order[i] * record.chosen, to);
    }
  });
  return true;
}

bool relay_tokens(Kind payload, int64_t hidden, const Segments& from, const Copies& copies,
                  const Segments& areas) {
  const Record record = record_of(payload, hidden, copies.chosen);
  const int64_t rows = count_records(from, record.bytes), count = copies.count;
  if (rows < 0 || !in_order(copies, rows)) return false;
  Room room((rows + count) * kPiece);
  const char** row = take<const char*>(room, rows);
  char** place = take<char*>(room, count);
  if (!place_copies(copies, areas, record.bytes, place)) return false;
  find_records(from, record.bytes, row);
  each_row(count, record.bytes, [&](int64_t n) {
    __builtin_memcpy(place[n], row[copies.token[n]], record.slots_at);
    write_slots(record, copies.slot + n * record.chosen, place[n]);
  });
  return true;
}

// What `prepare` makes of a row, of features that were rounded already.
void read_features(const Record& record, const Form& form, const char* from, const Inputs& to) {
  int32_t total = 0;
  I sums = {};
  for (int64_t line = 0; line < form.lines; ++line) {
    char* at = to.data + line * kLine;
    const int64_t left = record.feature_bytes - line * kLine;
    if (left < kLine) __builtin_memset(at, 0, kLine);
    if (left > 0) __builtin_memcpy(at, from + line * kLine, least(left, kLine));
    for (int i = 0; record.payload == Kind::int8 && i < kLine; i += 4 * kWidth)
      sums = add_small(sums, (I)(0x01010101 - I{}), load_words(at + i));
  }
  for (int i = 0; i < kWidth; ++i) total += sums[i];
  if (record.payload == Kind::int8) to.sums[0] = total;
  if (record.payload == Kind::int4) sum_groups(form, record.hidden, to.data, kLine, to.sums);
  __builtin_memcpy(to.scale, from + record.scale_at, 4);
}

// The pairs of records whose experts are here.
bool find_pairs(const Record& record, const char* const* row, int64_t rows, int64_t experts,
                int32_t* first, int32_t* ids, float* weights, float* units) {
  int32_t pairs = 0;
  for (int64_t t = 0; t < rows; ++t) {
    first[t] = pairs;
    __builtin_memcpy(units + t, row[t] + record.scale_at + 4, 4);
    for (int64_t c = 0; c < record.chosen; ++c) {
      int16_t slot;
      __builtin_memcpy(&slot, row[t] + record.slots_at + 2 * c, 2);
      if (slot == -1) continue;
      if (slot < 0 || slot >= experts) return false;
      ids[pairs] = slot;
      __builtin_memcpy(weights + pairs, row[t] + record.scale_at + 8 + 4 * c, 4);
      ++pairs;
    }
  }
  first[rows] = pairs;
  return true;
}

int64_t run_experts(const Mixture& w, int64_t chosen, const Segments& from, void* out) {
  const Record record = record_of(w, chosen);
  const int64_t rows = count_records(from, record.bytes);
  if (rows < 0) return -1;
  Room room(rows * (2 * chosen + 2 + kPiece) + 1);
  const char** row = take<const char*>(room, rows);
  int32_t *first = take<int32_t>(room, rows + 1), *ids = take<int32_t>(room, rows * chosen);
  float *weights = room.take(rows * chosen), *units = room.take(rows);
  find_records(from, record.bytes, row);
  if (!find_pairs(record, row, rows, w.experts.count, first, ids, weights, units)) return -1;
  const Form form = form_of(record.payload, record.hidden, w.experts.gate_up.group);
  const auto read = [&](int64_t t, const Inputs& to) { read_features(record, form, row[t], to); };
  const Ending ending = w.combine == Combine::exact     ? Ending::sums
                        : w.combine == Combine::ordered ? Ending::each
                                                        : Ending::chain;
  const Pairs pairs{rows, chosen, first, ids, weights, units};
  if (!run_moe(w.experts, pairs, read, ending, out)) return -1;
  return w.combine == Combine::ordered ? first[rows] : rows;
}

// Rows of sums on the wire: `size` bytes an element.
int64_t sum_bytes(const Mixture& w, int64_t size) {
  const int64_t limbs = w.combine == Combine::exact ? limbs_of(w.experts.down.kind) : 1;
  return ceil_div(size * limbs * w.experts.down.n, 4) * 4;
}

int64_t heading(int64_t rows) { return ceil_div(rows, 64) * 64; }

int64_t count_slots(const int16_t* slots, int64_t chosen) {
  int64_t found = 0;
  for (int64_t c = 0; c < chosen; ++c) found += slots[c] >= 0;
  return found;
}

bool is_narrow(const float* sums, int64_t size) {
  I wide[kParts] = {};
  for (int64_t h = 0; h < size; h += kLanes) {
    const F16 bits = load(sums + h, size - h);
    EACH_PART {
      const I sum = (I)bits.part[i];
      wide[i] |= (sum > 32767 - I{}) | (sum < -32767 - I{});
    }
  }
  int32_t any = 0;
  for (int i = 0; i < kParts; ++i)
    for (int lane = 0; lane < kWidth; ++lane) any |= wide[i][lane];
  return !any;
}

// A row of int32 to int16, or of fp32 to bf16.
template <bool kSums>
void write_halves(const float* from, int64_t size, char* to) {
  typedef int16_t Half __attribute__((vector_size(2 * kWidth)));
  typedef int16_t HalfAny __attribute__((vector_size(2 * kWidth), aligned(1), may_alias));
  if (size % 2) __builtin_memset(to + 2 * size, 0, 2);
  for (int64_t h = 0; h < size; h += kLanes) {
    char whole[2 * kLanes];
    const bool full = h + kLanes <= size;
    char* at = full ? to + 2 * h : whole;
    const F16 bits = load(from + h, size - h);
    if constexpr (kSums) {
      EACH_PART *(HalfAny*)(at + 2 * kWidth * i) =
          (HalfAny)__builtin_convertvector((I)bits.part[i], Half);
    } else {
      narrow(bits, at);
    }
    if (!full) __builtin_memcpy(to + 2 * h, whole, 2 * (size - h));
  }
}

// Rows that are as wide as they lie; the records say how many.
bool pack_as_they_are(const Record& record, int64_t row_bytes, const char* sums,
                      const Segments& from, const Segments& areas, int64_t* written) {
  for (int64_t s = 0; s < from.count; ++s) {
    int64_t rows = 0;
    for (int64_t at = record.slots_at; at < from.bytes[s]; at += record.bytes)
      rows += count_slots(reinterpret_cast<const int16_t*>(from.at[s] + at), record.chosen);
    written[s] = rows * row_bytes;
    if (written[s] > areas.bytes[s]) return false;
    if (rows) __builtin_memcpy(areas.at[s], sums, written[s]);
    sums += written[s];
  }
  return true;
}

bool pack_sums(const Mixture& w, int64_t chosen, const void* sums, const Segments& from,
               const Segments& areas, int64_t* written) {
  const Record record = record_of(w, chosen);
  const int64_t rows = count_records(from, record.bytes), hidden = record.hidden;
  if (rows < 0 || areas.count != from.count) return false;
  if (w.combine == Combine::ordered)
    return pack_as_they_are(record, 4 * hidden, static_cast<const char*>(sums), from, areas,
                            written);
  const bool exact = w.combine == Combine::exact;
  const int64_t limbs = exact ? limbs_of(w.experts.down.kind) : 1;
  const float* all = static_cast<const float*>(sums);
  Room room(rows * (1 + kPiece));
  char **place = take<char*>(room, rows), *size = take<char>(room, rows);
  each_row(rows, hidden, [&](int64_t n) {
    size[n] = !exact || (limbs == 1 && is_narrow(all + n * hidden, hidden)) ? 2 : 4;
  });
  for (int64_t s = 0, n = 0; s < from.count; ++s) {
    const int64_t here = from.bytes[s] / record.bytes, head = exact ? heading(here) : 0;
    written[s] = head;
    if (head > areas.bytes[s]) return false;
    if (head) __builtin_memset(areas.at[s] + here, 0, head - here);
    for (int64_t i = 0; i < here; ++i, ++n) {
      place[n] = areas.at[s] + written[s];
      if (exact) areas.at[s][i] = size[n];
      written[s] += sum_bytes(w, size[n]);
    }
    if (written[s] > areas.bytes[s]) return false;
  }
  each_row(rows, hidden, [&](int64_t n) {
    const float* row = all + n * limbs * hidden;
    if (size[n] == 4)
      __builtin_memcpy(place[n], row, 4 * limbs * hidden);
    else if (exact)
      write_halves<true>(row, hidden, place[n]);
    else
      write_halves<false>(row, hidden, place[n]);
  });
  return true;
}

// A row of sums that came back, and the bytes of an element.
struct Came {
  const char* row;
  int64_t size;
};

// Of every copy; ordered: of every choice of it that was there, else null. False if the segments
// are not what was asked for.
bool find_sums(const Mixture& w, const Copies& copies, const Segments& came, Came* found) {
  if (came.count != copies.ranks) return false;
  for (int64_t r = 0; r < copies.ranks; ++r) {
    const char* segment = came.at[r];
    const int64_t rows = size_for(copies, r), end = came.bytes[r];
    int64_t at = w.combine == Combine::exact ? heading(rows) : 0;
    if (at > end) return false;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = copies.starts[r] + i;
      if (w.combine == Combine::ordered) {
        for (int64_t c = n * copies.chosen; c < (n + 1) * copies.chosen; ++c) {
          found[c] = {copies.slot[c] >= 0 ? segment + at : nullptr, 4};
          at += copies.slot[c] >= 0 ? sum_bytes(w, 4) : 0;
        }
      } else {
        const int64_t size = w.combine == Combine::exact ? segment[i] : 2;
        if (size != 4 && (size != 2 || (w.combine == Combine::exact &&
                                        limbs_of(w.experts.down.kind) == 2)))
          return false;
        found[n] = {segment + at, size};
        at += sum_bytes(w, size);
      }
      if (at > end) return false;
    }
    if (at != end) return false;
  }
  return true;
}

// Sixteen sums of a limb from feature `h` on, as bits.
INLINE F16 bits_at(const Came& from, int64_t limb, int64_t h, int64_t hidden) {
  if (from.size == 4) {
    const float* row = reinterpret_cast<const float*>(from.row) + limb * hidden;
    return load(row + h, hidden - h);
  }
  F16 bits = load(reinterpret_cast<const bf16*>(from.row) + h, hidden - h);
  EACH_PART bits.part[i] = (V)((I)bits.part[i] >> 16);
  return bits;
}

// The sum of what came for one row, still integers; fast: floats.
struct Arrived {
  const Mixture& w;
  const Came* came;
  const int32_t* order;
  int64_t count;
};

INLINE F16 whole_at(const Arrived& a, int64_t limb, int64_t h, int64_t hidden) {
  F16 total = zero();
  I lost[kParts] = {};
  for (int64_t n = 0; n < a.count; ++n) {
    const F16 bits = bits_at(a.came[a.order[n]], limb, h, hidden);
    EACH_PART {
      if (limb == 0) lost[i] |= (I)bits.part[i] == kLowest - I{};
      add_whole(total.part[i], (I)bits.part[i]);
    }
  }
  EACH_PART {
    const I sum = (I)total.part[i];
    total.part[i] = (V)(lost[i] ? kLowest - I{} : sum);
  }
  return total;
}

INLINE F16 fast_at(const Arrived& a, int64_t h, int64_t hidden) {
  F16 total = zero();
  for (int64_t n = 0; n < a.count; ++n)
    total = total + load(reinterpret_cast<const bf16*>(a.came[a.order[n]].row) + h, hidden - h);
  return total;
}

// Rows of one choice each, in order of rows and choices; the number of them.
int64_t relay_each(const Copies& copies, const Came* came, const int32_t* first,
                   const int32_t* order, int64_t rows, int64_t hidden, float* out) {
  int64_t written = 0;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = 0; c < copies.chosen; ++c)
      for (int64_t i = first[t]; i < first[t + 1]; ++i) {
        const char* row = came[order[i] * copies.chosen + c].row;
        if (row) __builtin_memcpy(out + written++ * hidden, row, 4 * hidden);
      }
  return written;
}

int64_t relay_sums(const Mixture& w, const Copies& copies, const Segments& came, int64_t rows,
                   void* out_at) {
  const bool ordered = w.combine == Combine::ordered, exact = w.combine == Combine::exact;
  const int64_t hidden = w.experts.down.n, limbs = exact ? limbs_of(w.experts.down.kind) : 1;
  const int64_t pieces = copies.count * (ordered ? copies.chosen : 1);
  if (!in_order(copies, rows)) return -1;
  Room room(rows + 1 + copies.count + pieces * (kPiece + 2));
  int32_t *first = take<int32_t>(room, rows + 1), *order = take<int32_t>(room, copies.count);
  Came* found = take<Came>(room, pieces);
  float* out = static_cast<float*>(out_at);
  if (!find_sums(w, copies, came, found)) return -1;
  sort_by_row(copies, rows, first, order);
  if (ordered) return relay_each(copies, found, first, order, rows, hidden, out);
  each_row(rows, 2 * limbs * hidden, [&](int64_t t) {
    const Arrived a{w, found, order + first[t], first[t + 1] - first[t]};
    for (int64_t limb = 0; limb < limbs; ++limb)
      for (int64_t h = 0; h < hidden; h += kLanes)
        store(out + (t * limbs + limb) * hidden + h,
              exact ? whole_at(a, limb, h, hidden) : fast_at(a, h, hidden), hidden - h);
  });
  return rows;
}

// The chain of a row's contributions in order of choices; one that went nowhere is left out.
INLINE F16 ordered_at(const Came* const* row, const float* weights, int64_t chosen, int64_t h,
                      int64_t hidden) {
  F16 total = zero();
  for (int64_t c = 0; c < chosen; ++c)
    if (row[c]) total = fma(splat(weights[c]), bits_at(*row[c], 0, h, hidden), total);
  return total;
}

bool combine(float* x, const float* weights, int64_t rows, const Mixture& w, const Copies& copies,
             const Segments& came, const float* extra) {
  const bool ordered = w.combine == Combine::ordered;
  const int64_t hidden = w.experts.down.n, chosen = copies.chosen;
  const int64_t pieces = copies.count * (ordered ? chosen : 1);
  const Kind kind = w.experts.down.kind;
  if (!in_order(copies, rows)) return false;
  Room room(rows + 1 + copies.count + pieces * (kPiece + 2));
  int32_t *first = take<int32_t>(room, rows + 1), *order = take<int32_t>(room, copies.count);
  Came* found = take<Came>(room, pieces);
  if (!find_sums(w, copies, came, found)) return false;
  sort_by_row(copies, rows, first, order);
  each_row(rows, 4 * hidden, [&](int64_t t) {
    const Arrived a{w, found, order + first[t], first[t + 1] - first[t]};
    float* row = x + t * hidden;
    const float unit = w.combine == Combine::exact ? unit_of(row, hidden, kind) : 0.0f;
    const Came** of = static_cast<const Came**>(scratch(1, chosen * sizeof(Came*)));
    for (int64_t c = 0; ordered && c < chosen; ++c) {
      of[c] = nullptr;
      for (int64_t i = 0; i < a.count; ++i) {
        const Came* piece = found + a.order[i] * chosen + c;
        if (piece->row) of[c] = piece;
      }
    }
    for (int64_t h = 0; h < hidden; h += kLanes) {
      const int64_t left = hidden - h;
      F16 sum;
      if (ordered)
        sum = ordered_at(of, weights + t * chosen, chosen, h, hidden);
      else if (w.combine == Combine::fast)
        sum = fast_at(a, h, hidden);
      else if (limbs_of(kind) == 1)
        sum = number(whole_at(a, 0, h, hidden), unit);
      else
        sum = number(whole_at(a, 0, h, hidden), whole_at(a, 1, h, hidden), unit);
      if (extra) sum = sum + load(extra + t * hidden + h, left);
      store(row + h, load(row + h, left) + sum, left);
    }
  });
  return true;
}
