// The layout of a KV cache, and writing to it.
//
// fp32: a block is its keys [P, G, D], then, unless the cache is latent, its values [P, G, V].
//
// bf16 and int8 are held in units (units.h). A unit of keys is 2 or 4 features of one position, a
// unit of values 2 or 4 positions of one feature. A block is [G][P / 16] groups of 16 positions:
//   keys    [unit][16 positions], the two parts of a latent each padded to whole units;
//   values  [V / 16][16 / positions per unit][16 features], unless latent: then keys are values;
//   scales  [16 positions] each of the key's parts and of the values: int8 only.
// Keys of int8 are bytes with 128 added. Where P is no multiple of 16 a block is [G][P] positions
// with the same bytes in a row: keys, values, scales; `gather` brings them into groups.
#pragma once

constexpr int kGroup = 16;

// Sizes of what one position of one head takes.
struct Layout {
  int64_t head_units, rest_units;    // of keys: the key, or a latent's value part, and its rest
  int64_t head_size, rest_size;      // the features of both
  int64_t value_tiles;               // 16 values each
  int64_t key_bytes, value_bytes;    // per position
  int64_t scales;
  int64_t position_bytes, block_bytes;
  int per_unit, element;
};

Layout layout_of(const Cache& c) {
  Layout l{};
  l.element = c.type == KvType::kInt8 ? 1 : 2;
  l.per_unit = 4 / l.element;
  l.head_size = c.latent ? c.value_size : c.head_size;
  l.rest_size = c.head_size - l.head_size;
  l.head_units = ceil_div(l.head_size, l.per_unit);
  l.rest_units = ceil_div(l.rest_size, l.per_unit);
  l.value_tiles = ceil_div(c.value_size, kLanes);
  l.key_bytes = 4 * (l.head_units + l.rest_units);
  l.value_bytes = c.latent ? 0 : l.value_tiles * kLanes * l.element;
  if (c.type == KvType::kInt8) l.scales = c.latent && !l.rest_units ? 1 : 2;
  l.position_bytes = l.key_bytes + l.value_bytes + 4 * l.scales;
  l.block_bytes = c.kv_heads * c.block_size * l.position_bytes;
  return l;
}

int64_t kv_bytes_per_block(const Cache& c) {
  if (c.type != KvType::kFloat32) return layout_of(c).block_bytes;
  return c.block_size * c.kv_heads * (c.head_size + (c.latent ? 0 : c.value_size)) * 4;
}

// fp32 keys or values; strides in floats.
struct Rows {
  float* data;
  int64_t block_size, block_stride, position_stride, head_stride;
};

Rows rows_of(const Cache& c, bool values) {
  const bool behind = values && !c.latent;
  const int64_t size = behind ? c.value_size : c.head_size;
  float* data = static_cast<float*>(c.data);
  if (behind) data += c.block_size * c.kv_heads * c.head_size;
  return {data, c.block_size, kv_bytes_per_block(c) / 4, c.kv_heads * size, size};
}

// Where a position's numbers lie: key unit j at key + j * unit_stride, value f in value_at(f).
struct Place {
  uint8_t *key, *value, *scale;
  int64_t unit_stride, scale_stride;
  bool grouped;
};

Place place_of(const Cache& c, const Layout& l, int64_t block, int64_t offset, int64_t head) {
  uint8_t* data = static_cast<uint8_t*>(c.data) + block * l.block_bytes +
                  head * c.block_size * l.position_bytes;
  if (c.block_size % kGroup) {
    data += offset * l.position_bytes;
    return {data, data + l.key_bytes, data + l.key_bytes + l.value_bytes, 4, 4, false};
  }
  const int64_t lane = offset % kGroup;
  data += (offset - lane) * l.position_bytes;
  uint8_t* value = data + kGroup * l.key_bytes;
  return {data + 4 * lane,
          value + lane / l.per_unit * 64 + lane % l.per_unit * l.element,
          value + kGroup * l.value_bytes + 4 * lane,
          64,
          64,
          true};
}

INLINE uint8_t* value_at(const Place& p, const Layout& l, int64_t f) {
  if (!p.grouped) return p.value + f * l.element;
  return p.value + f / kLanes * (kLanes * kGroup * l.element) + f % kLanes * 4;
}

// To nearest, ties to even; NaN stays a (quiet) NaN.
INLINE bf16 narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// codes[i] = round(x[i] * (127 / most)); returns the scale, most / 127. As matrix.quantize_rows.
float quantize(const float* x, int64_t n, int8_t* codes) {
  F16 high = zero(), bad = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const F16 v = load(x + i, n - i);
    high = at_least(at_least(high, v), zero() - v);
    bad = fma(v, zero(), bad);
  }
  const float most = greatest(high);
  const bool sound = sum(bad) == 0.0f;
  const F16 factor = splat(sound && most > 0.0f ? 127.0f / most : 0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F16 v = sound ? load(x + i, n - i) : zero();
    uint8_t whole[kLanes];
    store_bytes(whole, nearest(at_least(at_most(v * factor, splat(127.0f)), splat(-127.0f))));
    __builtin_memcpy(codes + i, whole, least(kLanes, n - i));
  }
  return sound ? most / 127.0f : __builtin_nanf("");
}

void write_key(const Place& at, const Layout& l, const float* k, int8_t* codes) {
  uint8_t* to = at.key;
  for (int part = 0; part < 2; ++part) {
    const int64_t size = part ? l.rest_size : l.head_size;
    if (!size) continue;
    if (l.element == 2) {
      for (int64_t d = 0; d < size; d += 2, to += at.unit_stride) {
        const bf16 unit[2] = {narrow(k[d]), d + 1 < size ? narrow(k[d + 1]) : bf16{0}};
        __builtin_memcpy(to, unit, 4);
      }
    } else {
      const float scale = quantize(k, size, codes);
      __builtin_memcpy(at.scale + part * at.scale_stride, &scale, 4);
      for (int64_t d = size; d % 4; ++d) codes[d] = 0;
      for (int64_t d = 0; d < size; d += 4, to += at.unit_stride) {
        uint32_t unit;
        __builtin_memcpy(&unit, codes + d, 4);
        unit ^= 0x80808080u;
        __builtin_memcpy(to, &unit, 4);
      }
    }
    k += size;
  }
}

void write_value(const Place& at, const Layout& l, const float* v, int64_t size, int8_t* codes) {
  if (l.element == 2) {
    for (int64_t f = 0; f < size; ++f) {
      const bf16 x = narrow(v[f]);
      __builtin_memcpy(value_at(at, l, f), &x, 2);
    }
    return;
  }
  const float scale = quantize(v, size, codes);
  __builtin_memcpy(at.scale + at.scale_stride, &scale, 4);
  for (int64_t f = 0; f < size; ++f) *value_at(at, l, f) = static_cast<uint8_t>(codes[f]);
}

void write_floats(const Cache& c, const Rows& to, const float* x, int64_t size, int64_t slot) {
  float* row = to.data + slot / c.block_size * to.block_stride +
               slot % c.block_size * to.position_stride;
  __builtin_memcpy(row, x, c.kv_heads * size * sizeof(float));
}

bool write_kv(const Cache& c, const float* k, const float* v, int64_t rows, const int64_t* slots) {
  for (int64_t t = 0; t < rows; ++t)
    if (slots[t] < 0 || slots[t] >= c.num_blocks * c.block_size) return false;
  const int64_t heads = c.kv_heads, k_size = c.head_size, v_size = c.latent ? 0 : c.value_size;
  if (c.type == KvType::kFloat32) {
    const Rows keys = rows_of(c, false), values = rows_of(c, true);
    each_row(rows, heads * (k_size + v_size), [&](int64_t t) {
      write_floats(c, keys, k + t * heads * k_size, k_size, slots[t]);
      if (!c.latent) write_floats(c, values, v + t * heads * v_size, v_size, slots[t]);
    });
    return true;
  }
  const Layout l = layout_of(c);
  each_row(rows, 2 * heads * (k_size + v_size), [&](int64_t t) {
    int8_t* codes = static_cast<int8_t*>(scratch(1, most(k_size, v_size) + kLanes));
    for (int64_t g = 0; g < heads; ++g) {
      const Place at = place_of(c, l, slots[t] / c.block_size, slots[t] % c.block_size, g);
      write_key(at, l, k + (t * heads + g) * k_size, codes);
      if (!c.latent) write_value(at, l, v + (t * heads + g) * v_size, v_size, codes);
    }
  });
  return true;
}
