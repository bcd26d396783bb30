// The table of kernels that every instruction set fills. Pointers and sizes only; the caller has
// checked shapes and dtypes. Letters are those of moeserve/kernels/ops.py.
#pragma once

#include <cstdint>

namespace moeserve {

// A matrix [N, K] in panels of 32 rows of it, K-major: panel p, feature k, lane j at
// data[(p * K + k) * 32 + j]. The lanes past N are zero. `bias` has one float per lane, or is null.
struct Matrix {
  const void* data;
  const float* bias;
  int64_t n, k;
  bool is_bf16;
};

constexpr int kPanel = 32;

// Experts' gate/up panels hold 16 gate rows and the 16 up rows that go with them, so that one
// panel ends in 16 finished activations. Expert e starts at e * panels * K * 32.
struct Experts {
  Matrix gate_up;  // n = 2 I, k = H
  Matrix down;     // n = H, k = I
  int64_t count;
  bool clamped;  // GPT-OSS's activation instead of SwiGLU
};

enum class KvType : int { kFloat32, kBfloat16, kInt8 };

// The KV of one layer: `num_blocks` blocks of kv_bytes_per_block bytes. kv.h has their layout.
// `latent`: one head, and the value is the key's first value_size features.
struct Cache {
  void* data;
  int64_t num_blocks, block_size, kv_heads, head_size, value_size;
  KvType type;
  bool latent;
};

struct Attention {
  const float* q;  // [T, A, D]
  Cache kv;
  float* out;                                // [T, A, V]
  const int32_t *starts, *context, *blocks;  // [S + 1], [S], [S, M]
  const float* sinks;                        // [A] or null
  int64_t sequences, table_width, heads;
  int64_t window;  // 0: all
  float scale;
};

struct Routing {
  int64_t experts, top_k, groups, kept_groups;
  int scoring;  // 0 softmax, 1 sigmoid, 2 topk_softmax
  bool normalise, top2;
  float scale;
};

struct Kernels {
  const char* name;
  // One matrix per head, packed one after the other; a plain linear has one head.
  void (*linear)(const float* x, int64_t rows, int64_t heads, Matrix w, float* out);
  // False if an id is not an expert.
  bool (*moe_ffn)(const float* x, int64_t rows, Experts w, const int32_t* ids,
                  const float* weights, int64_t chosen, float* out);
  void (*rms_norm)(const float* x, int64_t rows, int64_t size, const float* weight, float eps,
                   float* out);
  void (*glu)(const float* x, int64_t rows, int64_t inner, bool clamped, float* out);
  void (*rope)(const float* x, int64_t rows, int64_t heads, int64_t size, const float* cos,
               const float* sin, int64_t pairs, bool interleaved, float* out);
  void (*route_topk)(const float* logits, int64_t rows, Routing spec, const float* bias,
                     int32_t* ids, float* weights);
  int64_t (*kv_bytes_per_block)(const Cache& cache);
  // k is [rows, G, D], v [rows, G, V] or null where the cache is latent. False if a slot is
  // outside the cache.
  bool (*write_kv)(const Cache& cache, const float* k, const float* v, int64_t rows,
                   const int64_t* slots);
  // False if a sequence needs a block that its table does not name, or a row it does not have.
  bool (*paged_attention)(const Attention& batch);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace moeserve
