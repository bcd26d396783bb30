// The table of kernels that every instruction set fills. Pointers and sizes only; the caller has
// checked shapes and dtypes. Letters are those of moeserve/kernels/ops.py.
#pragma once

#include <cstdint>

namespace moeserve {

// What a weight is kept as; moeserve/kernels/ops.py says what a product of each does.
enum class Kind : int { fp32, bf16, int8, int4 };

// A matrix [N, K], or several one after the other, in panels of 32 rows (lanes); the layout of a
// panel is in dot.h. Lanes past N are zero. Where `paired`, panel p holds rows 16 p .. of the
// matrix's first half and the rows of its second half that go with them: gate and up.
struct Matrix {
  Kind kind;
  const void* data;
  const float* scale;    // int8: one per lane; int4: [panels][groups][32]; else null
  const float* bias;     // one per lane, or null
  const uint8_t* zero;   // int4: as scale, or null where every zero is `same_zero`
  const int8_t* levels;  // int4: what its 16 codes stand for, or null
  int64_t n, k;
  int64_t group;      // int4: features per group
  int32_t same_zero;  // int4
};

constexpr int kPanel = 32;

struct Experts {
  Matrix gate_up;  // n = 2 I, k = H, paired: a panel ends in 16 finished activations
  Matrix down;     // n = H, k = I
  int64_t count;
  bool clamped;  // GPT-OSS's activation instead of SwiGLU
};

struct Cache {
  const void* data;
  int64_t block_stride, position_stride, head_stride;  // in elements
  bool is_bf16;
};

struct Attention {
  const float* q;  // [T, A, D]
  Cache k, v;
  float* out;                            // [T, A, V]
  const int32_t *starts, *context, *blocks;  // [S + 1], [S], [S, M]
  const float* sinks;                    // [A] or null
  int64_t sequences, table_width, block_size, num_blocks;
  int64_t heads, kv_heads, head_size, value_size;
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
  // Of one matrix; `group` is int4's.
  int64_t (*packed_bytes)(Kind kind, int64_t n, int64_t k, int64_t group, bool paired);
  // `count` matrices [n, k], rows of k features (int4: two a byte, the even one low), into panels.
  // The layout is the same for every instruction set.
  void (*pack)(Kind kind, const void* from, int64_t count, int64_t n, int64_t k, int64_t group,
               bool paired, void* to);
  // Floats [count, n, columns] to [count, panels, columns, 32].
  void (*pack_floats)(const float* from, int64_t count, int64_t n, int64_t columns, bool paired,
                      float* to);
  // One matrix per head, packed one after the other; a plain linear has one head.
  void (*linear)(const float* x, int64_t rows, int64_t heads, const Matrix& w, float* out);
  // False if an id is not an expert.
  bool (*moe_ffn)(const float* x, int64_t rows, const Experts& w, const int32_t* ids,
                  const float* weights, int64_t chosen, float* out);
  // codes [rows][k] and one scale per row.
  void (*quantize_per_token)(const float* x, int64_t rows, int64_t k, int8_t* codes, float* scale);
  void (*rms_norm)(const float* x, int64_t rows, int64_t size, const float* weight, float eps,
                   float* out);
  void (*glu)(const float* x, int64_t rows, int64_t inner, bool clamped, float* out);
  void (*rope)(const float* x, int64_t rows, int64_t heads, int64_t size, const float* cos,
               const float* sin, int64_t pairs, bool interleaved, float* out);
  void (*route_topk)(const float* logits, int64_t rows, Routing spec, const float* bias,
                     int32_t* ids, float* weights);
  // False if a slot is outside the cache.
  bool (*write_kv)(const Cache& cache, int64_t num_blocks, int64_t block_size, const float* x,
                   int64_t rows, int64_t heads, int64_t size, const int64_t* slots);
  // False if a sequence needs a block that its table does not name, or a row it does not have.
  bool (*paged_attention)(const Attention& batch);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}

}  // namespace moeserve
