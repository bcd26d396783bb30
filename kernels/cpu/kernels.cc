// All kernels for one instruction set. CMake compiles this file once per set with ISA naming the
// namespace. Nothing from the standard library may be instantiated here: the linker could keep a
// copy made for a set that the machine lacks. Hence the fragments (*.inc): they have no includes of
// their own and are read here, once per set, in this order; README.md says what each holds.
//
// Law 1 in this file: every output element is one chain of operations whose order depends on its
// own row only. Work is divided by rows, columns and heads, never along a sum.
#include "kernels.h"

#include "pool.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace moeserve::ISA {
namespace {

#include "vec.inc"

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// Fewer multiplications than this are done before another thread would have woken.
constexpr int64_t kWorthSharing = 1 << 17;

template <class Body>
void each(int64_t count, int64_t work, const Body& body) {
  if (work < kWorthSharing) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const auto item = [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
  run_items(count, item, const_cast<Body*>(&body));
}

template <class Body>
void each_row(int64_t rows, int64_t work_per_row, const Body& body) {
  const int64_t grain = most(1, (kWorthSharing / 8) / most(1, work_per_row));
  each(ceil_div(rows, grain), rows * work_per_row, [&](int64_t i) {
    for (int64_t t = i * grain; t < least(rows, (i + 1) * grain); ++t) body(t);
  });
}

#include "dot.inc"
#include "form.inc"
#include "prepare.inc"
#include "pack.inc"
#include "gemm.inc"
#include "exact_sum.inc"
#include "moe.inc"
namespace paged {
#include "units.inc"
#include "kv.inc"
#include "xxh3.inc"
#include "kv_runs.inc"
#include "attend32.inc"
#include "attend_state.inc"
#include "attend_products.inc"
#include "attend_softmax.inc"
#include "attend_latent.inc"
#include "attend.inc"
#include "attention.inc"
}  // namespace paged
using paged::export_kv;
using paged::export_runs;
using paged::import_kv;
using paged::import_runs;
using paged::kv_bytes_per_block;
using paged::paged_attention;
using paged::write_kv;
#include "rows.inc"
#include "layer.inc"
#include "dispatch.inc"
#include "combine.inc"

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

}  // namespace

extern const Kernels kernels = {
    NAME(ISA),
    packed_bytes, pack, pack_floats, round_and_pack,
    linear,     moe_ffn,    units,
    quantize_per_token,
    rms_norm,   glu,        rope,
    route_topk, kv_bytes_per_block,
    write_kv,   export_kv,  import_kv,  export_runs, import_runs,
    paged_attention,
    attend_gqa, attend_mla, dense,
    route,      moe,
    pack_tokens, relay_tokens, run_experts, relay_sums, pack_sums, combine, shared,
    head,
};

}  // namespace moeserve::ISA
