// moeserve.kernels._cpu: the kernels of the best instruction set this machine has, by raw pointers.
// moeserve/kernels/cpu.py is the only caller and checks every shape.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "probe.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

// Best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
      found.push_back(&avx512bf16::kernels);
    found.push_back(&avx512::kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

// Kernels called from Python since the process began.
std::atomic<uint64_t> calls{0};

struct Counted {
  Counted() { calls.fetch_add(1, std::memory_order_relaxed); }
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

template <class T>
void pack_panel(const T* from, int64_t n, int64_t k_size, int64_t first, int64_t second,
                int64_t first_end, T* to) {
  const int64_t half = kPanel / 2;
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t row = lane < half ? first + lane : second + lane - half;
    const bool real = row < (lane < half ? first_end : n);
    for (int64_t k = 0; k < k_size; ++k) to[k * kPanel + lane] = real ? from[row * k_size + k] : T{};
  }
}

// `count` matrices [n, k] into panels. `paired` puts 16 rows of the upper half of the matrix and
// the 16 rows of the lower half that go with them into each panel.
template <class T>
void pack(uintptr_t from, int64_t count, int64_t n, int64_t k_size, bool paired, uintptr_t to) {
  const int64_t half = kPanel / 2;
  const int64_t panels = paired ? (n / 2 + half - 1) / half : (n + kPanel - 1) / kPanel;
  const auto body = [=](int64_t item) {
    const int64_t p = item % panels;
    const int64_t first = paired ? p * half : p * kPanel;
    const int64_t second = paired ? n / 2 + p * half : first + half;
    pack_panel(at<const T>(from) + item / panels * n * k_size, n, k_size, first, second,
               paired ? n / 2 : n, at<T>(to) + item * k_size * kPanel);
  };
  run_items(
      count * panels,
      [](void* context, int64_t item) { (*static_cast<decltype(body)*>(context))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

void pack_any(uintptr_t from, int64_t count, int64_t n, int64_t k, bool paired, bool is_bf16,
              uintptr_t to) {
  is_bf16 ? pack<uint16_t>(from, count, n, k, paired, to)
          : pack<uint32_t>(from, count, n, k, paired, to);
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
             int64_t chosen, uintptr_t out) {
  return table().moe_ffn(at<const float>(x), rows, w, at<const int32_t>(ids),
                         at<const float>(weights), chosen, at<float>(out));
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

bool write_kv(uintptr_t data, int64_t blocks, int64_t block_size, int64_t kv_heads,
              int64_t head_size, int64_t value_size, int type, bool latent, uintptr_t k,
              uintptr_t v, int64_t rows, uintptr_t slots) {
  return table().write_kv(
      cache(data, blocks, block_size, kv_heads, head_size, value_size, type, latent),
      at<const float>(k), at<const float>(v), rows, at<const int64_t>(slots));
}

bool paged_attention(uintptr_t data, int64_t blocks, int64_t block_size, int64_t kv_heads,
                     int64_t head_size, int64_t value_size, int type, bool latent, uintptr_t q,
                     int64_t heads, uintptr_t starts, uintptr_t context, uintptr_t tables,
                     int64_t sequences, int64_t table_width, float scale, int64_t window,
                     uintptr_t sinks, uintptr_t out) {
  Attention batch{};
  batch.q = at<const float>(q);
  batch.kv = cache(data, blocks, block_size, kv_heads, head_size, value_size, type, latent);
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

#include "parts.h"

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
  nb::class_<Matrix>(m, "Matrix").def("__init__", [](Matrix* self, int kind, int64_t n, int64_t k,
                                                     uintptr_t data, uintptr_t scale,
                                                     uintptr_t bias, uintptr_t zero,
                                                     uintptr_t levels, int64_t group,
                                                     int same_zero) {
    new (self) Matrix(matrix(kind, n, k, data, scale, bias, zero, levels, group, same_zero));
  });
  nb::class_<Experts>(m, "Experts")
      .def("__init__", [](Experts* self, const Matrix& gate_up, const Matrix& down, int64_t count,
                          bool clamped) { new (self) Experts{gate_up, down, count, clamped}; });
  m.def("probe_ways", probe_ways);
  m.def("probe", probe, unlocked);
  m.def("pack", pack_any, unlocked);
  m.def("linear", linear, unlocked);
  m.def("moe_ffn", moe_ffn, unlocked);
  m.def("quantize_per_token", quantize_per_token, unlocked);
  m.def("rms_norm", rms_norm, unlocked);
  m.def("glu", glu, unlocked);
  m.def("rope", rope, unlocked);
  m.def("route_topk", route_topk, unlocked);
  m.def("kv_bytes_per_block", kv_bytes_per_block);
  m.def("write_kv", write_kv, unlocked);
  m.def("paged_attention", paged_attention, unlocked);
  bind_parts(m);
}
