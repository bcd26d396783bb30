// The layout of a KV cache, and writing to it. A block is its keys [P, G, D], then, unless the cache
// is latent, its values [P, G, V].
#pragma once

INLINE int64_t element_bytes(const Cache& cache) { return cache.type == KvType::kFloat32 ? 4 : 2; }

int64_t kv_bytes_per_block(const Cache& cache) {
  const int64_t values = cache.head_size + (cache.latent ? 0 : cache.value_size);
  return cache.block_size * cache.kv_heads * values * element_bytes(cache);
}

// Keys or values as rows of T; strides in elements.
template <class T>
struct Rows {
  T* data;
  int64_t block_size, block_stride, position_stride, head_stride;
};

template <class T>
Rows<T> rows_of(const Cache& cache, bool values) {
  const int64_t size = values && !cache.latent ? cache.value_size : cache.head_size;
  const int64_t before = values && !cache.latent ? cache.head_size : 0;
  T* data = static_cast<T*>(cache.data) + cache.block_size * cache.kv_heads * before;
  return {data, cache.block_size, kv_bytes_per_block(cache) / static_cast<int64_t>(sizeof(T)),
          cache.kv_heads * size, size};
}

// To nearest, ties to even; NaN stays a (quiet) NaN.
INLINE bf16 narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void put(float* to, const float* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(float));
}

INLINE void put(bf16* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow(from[i]);
}

template <class T>
void write_rows(const Rows<T>& to, const float* x, int64_t rows, int64_t heads, int64_t size,
                const int64_t* slots) {
  each_row(rows, heads * size, [&](int64_t t) {
    T* row = to.data + slots[t] / to.block_size * to.block_stride +
             slots[t] % to.block_size * to.position_stride;
    for (int64_t g = 0; g < heads; ++g)
      put(row + g * to.head_stride, x + (t * heads + g) * size, size);
  });
}

template <class T>
void write_both(const Cache& cache, const float* k, const float* v, int64_t rows,
                const int64_t* slots) {
  write_rows(rows_of<T>(cache, false), k, rows, cache.kv_heads, cache.head_size, slots);
  if (!cache.latent)
    write_rows(rows_of<T>(cache, true), v, rows, cache.kv_heads, cache.value_size, slots);
}

bool write_kv(const Cache& cache, const float* k, const float* v, int64_t rows,
              const int64_t* slots) {
  for (int64_t t = 0; t < rows; ++t)
    if (slots[t] < 0 || slots[t] >= cache.num_blocks * cache.block_size) return false;
  if (cache.type == KvType::kFloat32)
    write_both<float>(cache, k, v, rows, slots);
  else
    write_both<bf16>(cache, k, v, rows, slots);
  return true;
}
