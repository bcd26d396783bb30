// The table of kernels that every instruction set fills. Pointers and sizes only; the caller has
// checked shapes and dtypes. Letters are those of moeserve/kernels/ops.py.
#pragma once

#include <cstdint>

namespace moeserve {

// What a weight is kept as; moeserve/kernels/ops.py says what a product of each does.
enum class Kind : int { fp32, bf16, int8, int4 };

// A matrix [N, K], or several one after the other, in panels of 32 rows (lanes); the layout of a
// panel is in dot.inc. Lanes past N are zero. Where `paired`, panel p holds rows 16 p .. of the
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

// `count` matrices before they are packed. Each has `per_matrix` blocks of rows, one under the
// other, which may lie apart: block b of matrix m begins at at[m * per_matrix + b] and has rows[b].
struct RowBlocks {
  const void* const* at;
  const int64_t* rows;
  int64_t per_matrix, count;
};

// Each array of a matrix has those of all experts one after the other. Or, with `record_bytes`, all
// that an expert needs is one record, so that a step of so many bytes leads from any array of one
// expert to the next one's; expert e is record order[e] then, or e where `order` is null.
struct Experts {
  Matrix gate_up;  // n = 2 I, k = H, paired: a panel ends in 16 finished activations
  Matrix down;     // n = H, k = I
  int64_t count;
  bool clamped;  // GPT-OSS's activation instead of SwiGLU
  int64_t record_bytes;
  const int32_t* order;
};

enum class KvType : int { kFloat32, kBfloat16, kInt8 };

// The KV of one layer: `num_blocks` blocks of kv_bytes_per_block bytes. kv.inc has their layout.
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

struct Norm {
  const float* weight;
  float eps;
};

// What all layers of a forward pass share.
struct Step {
  int64_t rows;
  const float *cos, *sin;  // [T, R]
  int64_t pairs;
  bool interleaved;
  const int64_t* slots;                      // [T]
  const int32_t *starts, *context, *blocks;  // [S + 1], [S], [S, M]
  int64_t sequences, table_width;
};

// The parts of a layer; moeserve/kernels/fused.py says what they compute.
struct Gqa {
  Norm norm;
  Matrix qkv, o;
  int64_t heads, kv_heads, head_size;
  float scale;
  Norm q_norm, k_norm;                // no weight: none
  int64_t q_norm_size, k_norm_size;  // of a head or of the row
  float clip;                         // infinity: none
  int64_t window;
  const float* sinks;
};

struct Mla {
  Norm norm;
  Matrix down;
  Norm q_norm;
  Matrix q_up;  // no data: `down` has the queries themselves
  Norm latent_norm;
  Matrix into_latent, out_of_latent, o;  // the first two one per head
  int64_t heads, nope, rotated, latent;
  float scale;
};

struct Mlp {
  Matrix gate_up, down;  // no data: none
};

struct Dense {
  Norm norm;
  Mlp mlp;
};

struct Router {
  Norm norm;
  Matrix matrix;
  Routing spec;
  const float* bias;
};

// moeserve/kernels/wire.py says what each does.
enum class Combine : int { exact, ordered, fast };

struct Mixture {
  Experts experts;
  Mlp shared;
  Matrix gate;  // no data: no gated shared expert
  Experts gated;
  Combine combine;
};

// Bytes from every rank or for it.
struct Segments {
  char* const* at;
  const int64_t* bytes;
  int64_t count;
};

// Copy n is of row token[n]; those for rank r are starts[r] : starts[r + 1].
struct Copies {
  const int32_t* starts;  // [ranks + 1]
  const int32_t* token;   // [count]
  const int16_t* slot;    // [count][chosen]
  int64_t ranks, count, chosen;
};

struct Head {
  Norm norm;
  Matrix matrix;
};

struct Kernels {
  const char* name;
  // Of one matrix; `group` is int4's.
  int64_t (*packed_bytes)(Kind kind, int64_t n, int64_t k, int64_t group, bool paired);
  // Rows of k features (int4: two a byte, the even one low) into panels. The layout is the same for
  // every instruction set.
  void (*pack)(Kind kind, const RowBlocks& from, int64_t k, int64_t group, bool paired, void* to);
  // Rows of floats to [count, panels, columns, 32].
  void (*pack_floats)(const RowBlocks& from, int64_t columns, bool paired, float* to);
  // Rows of fp32 or bf16 to int8, as moeserve/kernels/matrix.py does, and one scale per lane. False
  // if a row holds NaN or an infinity; what is packed then is of no use.
  bool (*round_and_pack)(Kind kind, const RowBlocks& from, int64_t k, bool paired, void* to,
                         float* scale);
  // One matrix per head, packed one after the other; a plain linear has one head.
  void (*linear)(const float* x, int64_t rows, int64_t heads, const Matrix& w, float* out);
  // False if an id is not an expert. With `units` of the rows the sum is exact, else a chain.
  bool (*moe_ffn)(const float* x, int64_t rows, const Experts& w, const int32_t* ids,
                  const float* weights, int64_t chosen, const float* units, float* out);
  // Of the residual rows that the experts' sums are added to.
  void (*units)(const float* x, int64_t rows, const Experts& w, float* out);
  // codes [rows][k] and one scale per row.
  void (*quantize_per_token)(const float* x, int64_t rows, int64_t k, int8_t* codes, float* scale);
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
  // Whole blocks as the bytes that moeserve/kernels/kv_layout.py describes, one after the other,
  // and back. False if a block is outside the cache.
  bool (*export_kv)(const Cache& cache, const int64_t* blocks, int64_t count, uint8_t* bytes);
  bool (*import_kv)(const Cache& cache, const int64_t* blocks, int64_t count,
                    const uint8_t* bytes);
  // False if a sequence needs a block that its table does not name, or a row it does not have.
  bool (*paged_attention)(const Attention& batch);
  // These add to x. False as the kernels that they are made of.
  bool (*attend_gqa)(float* x, const Gqa& w, const Step& step, const Cache& cache);
  bool (*attend_mla)(float* x, const Mla& w, const Step& step, const Cache& cache);
  void (*dense)(float* x, int64_t rows, const Dense& w);
  void (*route)(const float* x, int64_t rows, const Router& w, float* normed, int32_t* ids,
                float* weights);
  bool (*moe)(float* x, int64_t rows, const Mixture& w, const float* normed, const int32_t* ids,
              int64_t chosen, const float* weights);
  // Tokens on their way to other ranks and back: dispatch.inc, combine.inc. False (or -1) where a
  // row, a slot or a size is not as it must be. The records have `chosen` slots each, features of
  // kind `payload`.
  bool (*pack_tokens)(const float* x, const float* normed, const float* weights, int64_t rows,
                      const Mixture& w, const Copies& copies, const Segments& areas);
  bool (*relay_tokens)(Kind payload, int64_t hidden, const Segments& from, const Copies& copies,
                       const Segments& areas);
  // These two return the rows of `out`.
  int64_t (*run_experts)(const Mixture& w, int64_t chosen, const Segments& from, void* out);
  int64_t (*relay_sums)(const Mixture& w, const Copies& copies, const Segments& returned,
                        int64_t rows, void* out);
  bool (*pack_sums)(const Mixture& w, int64_t chosen, const void* sums, const Segments& from,
                    const Segments& areas, int64_t* written);
  // `extra` is the shared expert's rows, or null.
  bool (*combine)(float* x, const float* weights, int64_t rows, const Mixture& w,
                  const Copies& copies, const Segments& returned, const float* extra);
  void (*shared)(const float* normed, int64_t rows, const Mixture& w, float* out);
  // Of the wanted rows of x, all of which exist.
  void (*head)(const float* x, const int64_t* wanted, int64_t rows, const Head& w, float* out);
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
