// moeserve.kernels.cpu._cpu: the kernels of the best instruction set this machine has, by raw
// pointers. handles.inc and wire_calls.inc are read at the end of its namespace.
// moeserve/kernels/cpu/ops.py is the only caller and checks every shape.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <ctime>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "probe.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

#if defined(__x86_64__)
// GCC 12 does not know the name. Leaf 7.1, EAX bit 4.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// Best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::kernels);
  if (vnni) found.push_back(&avx512vnni::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (avx2 && has_avx_vnni()) found.push_back(&avxvnni::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

// Kernels called from Python since the process began; the CPU time of their callers inside them
// while it is measured: that of others who share the machine is not in it.
std::atomic<uint64_t> calls{0}, nanoseconds{0};
std::atomic<bool> timed{false};

uint64_t thread_time() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

class Counted {
 public:
  Counted() : timed_(timed.load(std::memory_order_relaxed)) {
    calls.fetch_add(1, std::memory_order_relaxed);
    if (timed_) began_ = thread_time();
  }
  ~Counted() {
    if (timed_) nanoseconds.fetch_add(thread_time() - began_);
  }

 private:
  bool timed_;
  uint64_t began_ = 0;
};

const Kernels& table() { return *chosen.load(std::memory_order_relaxed); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.push_back(kernels->name);
  return names;
}

void set_isa(const std::string& name) {
  for (const Kernels* kernels : runnable())
    if (name == kernels->name) return chosen.store(kernels);
  throw std::invalid_argument("instruction set '" + name + "' is not one of _cpu.isas()");
}

void share_among(int count) {
  if (count < 1) throw std::invalid_argument("threads must be at least 1");
  set_threads(count);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t packed_bytes(int kind, int64_t n, int64_t k, int64_t group, bool paired) {
  return table().packed_bytes(static_cast<Kind>(kind), n, k, group, paired);
}

// Addresses of blocks, all of the first matrix first, and the rows of each block of a matrix.
using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

RowBlocks blocks(const Addresses& from, const Sizes& rows) {
  static_assert(sizeof(uintptr_t) == sizeof(void*));
  const int64_t per_matrix = static_cast<int64_t>(rows.size());
  if (!per_matrix || from.size() % rows.size())
    throw std::invalid_argument("blocks must divide over the matrices");
  return {reinterpret_cast<const void* const*>(from.data()), rows.data(), per_matrix,
          static_cast<int64_t>(from.size()) / per_matrix};
}

void pack(int kind, const Addresses& from, const Sizes& rows, int64_t k, int64_t group,
          bool paired, uintptr_t to) {
  table().pack(static_cast<Kind>(kind), blocks(from, rows), k, group, paired, at<void>(to));
}

void pack_floats(const Addresses& from, const Sizes& rows, int64_t columns, bool paired,
                 uintptr_t to) {
  table().pack_floats(blocks(from, rows), columns, paired, at<float>(to));
}

bool round_and_pack(int kind, const Addresses& from, const Sizes& rows, int64_t k, bool paired,
                    uintptr_t to, uintptr_t scale) {
  return table().round_and_pack(static_cast<Kind>(kind), blocks(from, rows), k, paired,
                                at<void>(to), at<float>(scale));
}

// Asks for huge pages where memory has not been touched yet; the system may decline.
void use_huge_pages(uintptr_t data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(at<void>(data), bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

Matrix matrix(int kind, int64_t n, int64_t k, uintptr_t data, uintptr_t scale, uintptr_t bias,
              uintptr_t zero, uintptr_t levels, int64_t group, int same_zero) {
  return {static_cast<Kind>(kind),
          at<const void>(data),
          at<const float>(scale),
          at<const float>(bias),
          at<const uint8_t>(zero),
          at<const int8_t>(levels),
          n,
          k,
          group,
          same_zero};
}

void linear(uintptr_t x, int64_t rows, int64_t heads, const Matrix& w, uintptr_t out) {
  table().linear(at<const float>(x), rows, heads, w, at<float>(out));
}

bool moe_ffn(uintptr_t x, int64_t rows, const Experts& w, uintptr_t ids, uintptr_t weights,
             int64_t chosen, uintptr_t units, uintptr_t out) {
  return table().moe_ffn(at<const float>(x), rows, w, at<const int32_t>(ids),
                         at<const float>(weights), chosen, at<const float>(units),
                         at<float>(out));
}

void units(uintptr_t x, int64_t rows, const Experts& w, uintptr_t out) {
  table().units(at<const float>(x), rows, w, at<float>(out));
}

void quantize_per_token(uintptr_t x, int64_t rows, int64_t k, uintptr_t codes, uintptr_t scale) {
  table().quantize_per_token(at<const float>(x), rows, k, at<int8_t>(codes), at<float>(scale));
}

void rms_norm(uintptr_t x, int64_t rows, int64_t size, uintptr_t weight, float eps,
              uintptr_t out) {
  table().rms_norm(at<const float>(x), rows, size, at<const float>(weight), eps, at<float>(out));
}

void glu(uintptr_t x, int64_t rows, int64_t inner, bool clamped, uintptr_t out) {
  table().glu(at<const float>(x), rows, inner, clamped, at<float>(out));
}

void rope(uintptr_t x, int64_t rows, int64_t heads, int64_t size, uintptr_t cos, uintptr_t sin,
          int64_t pairs, bool interleaved, uintptr_t out) {
  table().rope(at<const float>(x), rows, heads, size, at<const float>(cos), at<const float>(sin),
               pairs, interleaved, at<float>(out));
}

void route_topk(uintptr_t logits, int64_t rows, int64_t experts, int64_t top_k, int scoring,
                bool normalise, float scale, int64_t groups, int64_t kept_groups, bool top2,
                uintptr_t bias, uintptr_t ids, uintptr_t weights) {
  const Routing spec{experts, top_k, groups, kept_groups, scoring, normalise, top2, scale};
  table().route_topk(at<const float>(logits), rows, spec, at<const float>(bias), at<int32_t>(ids),
                     at<float>(weights));
}

// `_cpu.Cache`. `passes` of attention have gone over it, each of which had written the keys and
// values of all its rows before it was counted: whoever reads the count may read these.
struct OwnedCache : Cache {
  explicit OwnedCache(const Cache& of) : Cache(of) {}
  void count_pass() const { passes.fetch_add(1, std::memory_order_release); }
  mutable std::atomic<int64_t> passes{0};
};

int64_t passes(const OwnedCache& kv) { return kv.passes.load(std::memory_order_acquire); }

Cache cache(uintptr_t data, int64_t blocks, int64_t block_size, int64_t kv_heads,
            int64_t head_size, int64_t value_size, int type, bool latent) {
  return {at<void>(data), blocks,     block_size,
          kv_heads,       head_size,  value_size,
          static_cast<KvType>(type),  latent};
}

int64_t kv_bytes_per_block(int64_t block_size, int64_t kv_heads, int64_t head_size,
                           int64_t value_size, int type, bool latent) {
  return table().kv_bytes_per_block(
      cache(0, 0, block_size, kv_heads, head_size, value_size, type, latent));
}

bool write_kv(const OwnedCache& kv, uintptr_t k, uintptr_t v, int64_t rows, uintptr_t slots) {
  return table().write_kv(kv, at<const float>(k), at<const float>(v), rows,
                          at<const int64_t>(slots));
}

// Blocks leave and enter beside steps, whose loops must find the pool free.
bool export_kv(const OwnedCache& kv, uintptr_t blocks, int64_t count, uintptr_t bytes) {
  const Alone alone;
  return table().export_kv(kv, at<const int64_t>(blocks), count, at<uint8_t>(bytes));
}

bool import_kv(const OwnedCache& kv, uintptr_t blocks, int64_t count, uintptr_t bytes) {
  const Alone alone;
  return table().import_kv(kv, at<const int64_t>(blocks), count, at<const uint8_t>(bytes));
}

bool paged_attention(const OwnedCache& kv, uintptr_t q, int64_t heads, uintptr_t starts,
                     uintptr_t context, uintptr_t tables, int64_t sequences, int64_t table_width,
                     float scale, int64_t window, uintptr_t sinks, uintptr_t out) {
  Attention batch{};
  batch.q = at<const float>(q);
  batch.kv = kv;
  batch.out = at<float>(out);
  batch.starts = at<const int32_t>(starts);
  batch.context = at<const int32_t>(context);
  batch.blocks = at<const int32_t>(tables);
  batch.sinks = at<const float>(sinks);
  batch.sequences = sequences;
  batch.table_width = table_width;
  batch.heads = heads;
  batch.window = window;
  batch.scale = scale;
  return table().paged_attention(batch);
}

#include "handles.inc"
#include "wire_calls.inc"

}  // namespace
}  // namespace moeserve

NB_MODULE(_cpu, m) {
  using namespace moeserve;
  const nb::call_guard<Counted, nb::gil_scoped_release> unlocked;
  chosen.store(runnable().front());
  m.def("isas", isas);
  m.def("isa", [] { return std::string(table().name); });
  m.def("set_isa", set_isa);
  m.def("threads", threads);
  m.def("set_threads", share_among);
  m.def("cpus_of_nodes", cpus_of_nodes);
  m.def("calls", [] { return calls.load(); });
  m.def("measure", [](bool on) { timed.store(on); });
  m.def("nanoseconds", [] { return nanoseconds.load(); });
  nb::class_<Matrix>(m, "Matrix").def("__init__", [](Matrix* self, int kind, int64_t n, int64_t k,
                                                     uintptr_t data, uintptr_t scale,
                                                     uintptr_t bias, uintptr_t zero,
                                                     uintptr_t levels, int64_t group,
                                                     int same_zero) {
    new (self) Matrix(matrix(kind, n, k, data, scale, bias, zero, levels, group, same_zero));
  });
  nb::class_<Experts>(m, "Experts")
      .def("__init__", [](Experts* self, const Matrix& gate_up, const Matrix& down, int64_t count,
                          bool clamped, int64_t record_bytes, uintptr_t order) {
        new (self) Experts{gate_up, down, count, clamped, record_bytes, at<const int32_t>(order)};
      })
      .def_prop_ro("payload",
                   [](const Experts& self) { return static_cast<int>(self.gate_up.kind); })
      .def_prop_ro("contribution",
                   [](const Experts& self) { return static_cast<int>(self.down.kind); });
  m.def("probe_ways", probe_ways);
  m.def("probe", probe, unlocked);
  m.def("packed_bytes", packed_bytes);
  m.def("pack", pack, unlocked);
  m.def("pack_floats", pack_floats, unlocked);
  m.def("round_and_pack", round_and_pack, unlocked);
  m.def("use_huge_pages", use_huge_pages, unlocked);
  m.def("linear", linear, unlocked);
  m.def("moe_ffn", moe_ffn, unlocked);
  m.def("units", units, unlocked);
  m.def("quantize_per_token", quantize_per_token, unlocked);
  m.def("rms_norm", rms_norm, unlocked);
  m.def("glu", glu, unlocked);
  m.def("rope", rope, unlocked);
  m.def("route_topk", route_topk, unlocked);
  m.def("kv_bytes_per_block", kv_bytes_per_block);
  m.def("write_kv", write_kv, unlocked);
  m.def("export_kv", export_kv, unlocked);
  m.def("import_kv", import_kv, unlocked);
  m.def("passes", passes);
  m.def("paged_attention", paged_attention, unlocked);
  bind_layer_calls(m);
  bind_wire_calls(m);
}
