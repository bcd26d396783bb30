// Handles of what a decoder calls in every step: addresses and sizes, gathered once, so that a call
// passes a handle and a few integers. Included by module.cc. Whoever holds a handle holds the
// memory it points to.
#pragma once

Matrix absent() { return {}; }

// One of the first two, then the third or the last two.
struct Layer {
  std::optional<Gqa> gqa;
  std::optional<Mla> mla;
  std::optional<Dense> dense;
  std::optional<Router> router;
  std::optional<Mixture> mixture;
};

struct Stack {
  std::vector<Layer> layers;
};

// A step, and the rows of the rotary tables that its tokens use.
struct Pass {
  Step step;
  std::vector<float> cos, sin;
};

// Raises where a position is outside the tables.
void make_pass(Pass* self, uintptr_t positions_at, int64_t rows, uintptr_t cos_at,
               uintptr_t sin_at, int64_t table, int64_t pairs, bool interleaved, uintptr_t slots,
               uintptr_t starts, uintptr_t context, uintptr_t blocks, int64_t sequences,
               int64_t table_width) {
  rouse_threads();
  const int64_t* positions = at<const int64_t>(positions_at);
  for (int64_t t = 0; t < rows; ++t)
    if (positions[t] < 0 || positions[t] >= table)
      throw nb::index_error("a position is outside the rotary tables");
  new (self) Pass();
  for (auto [from, to] : {std::pair{cos_at, &self->cos}, std::pair{sin_at, &self->sin}}) {
    to->resize(rows * pairs + 1);
    for (int64_t t = 0; t < rows; ++t)
      std::copy_n(at<const float>(from) + positions[t] * pairs, pairs, to->data() + t * pairs);
  }
  self->step = {rows,
                self->cos.data(),
                self->sin.data(),
                pairs,
                interleaved,
                at<const int64_t>(slots),
                at<const int32_t>(starts),
                at<const int32_t>(context),
                at<const int32_t>(blocks),
                sequences,
                table_width};
}

void bind_handles(nb::module_& m) {
  nb::class_<Cache>(m, "Cache").def(
      "__init__", [](Cache* self, uintptr_t data, int64_t blocks, int64_t block_size,
                     int64_t kv_heads, int64_t head_size, int64_t value_size, int type,
                     bool latent) {
        new (self) Cache(cache(data, blocks, block_size, kv_heads, head_size, value_size, type,
                               latent));
      });
  nb::class_<Pass>(m, "Step").def("__init__", make_pass);
  nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, uintptr_t weight, float eps) {
    new (self) Norm{at<const float>(weight), eps};
  });
  nb::class_<Gqa>(m, "Gqa").def(
      "__init__", [](Gqa* self, const Norm& norm, const Matrix& qkv, const Matrix& o,
                     int64_t heads, int64_t kv_heads, int64_t head_size, float scale,
                     const Norm& q_norm, int64_t q_norm_size, const Norm& k_norm,
                     int64_t k_norm_size, float clip, int64_t window, uintptr_t sinks) {
        new (self) Gqa{norm,   qkv,    o,           heads,       kv_heads, head_size, scale,
                       q_norm, k_norm, q_norm_size, k_norm_size, clip,     window,
                       at<const float>(sinks)};
      });
  nb::class_<Mla>(m, "Mla").def(
      "__init__", [](Mla* self, const Norm& norm, const Matrix& down, const Norm& q_norm,
                     const Matrix* q_up, const Norm& latent_norm, const Matrix& into_latent,
                     const Matrix& out_of_latent, const Matrix& o, int64_t heads, int64_t nope,
                     int64_t rotated, int64_t latent, float scale) {
        new (self) Mla{norm,  down,  q_norm,  q_up ? *q_up : absent(), latent_norm, into_latent,
                       out_of_latent, o, heads, nope, rotated, latent, scale};
      }, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
      nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  nb::class_<Mlp>(m, "Mlp").def("__init__", [](Mlp* self, const Matrix& gate_up,
                                               const Matrix& down) {
    new (self) Mlp{gate_up, down};
  });
  nb::class_<Dense>(m, "Dense").def("__init__", [](Dense* self, const Norm& norm, const Mlp& mlp) {
    new (self) Dense{norm, mlp};
  });
  nb::class_<Router>(m, "Router").def(
      "__init__", [](Router* self, const Norm& norm, const Matrix& matrix, int64_t top_k,
                     int scoring, bool normalise, float scale, int64_t groups,
                     int64_t kept_groups, bool top2, uintptr_t bias) {
        const Routing spec{matrix.n, top_k, groups, kept_groups, scoring, normalise, top2, scale};
        new (self) Router{norm, matrix, spec, at<const float>(bias)};
      });
  nb::class_<Mixture>(m, "Mixture")
      .def("__init__", [](Mixture* self, int combine, const Experts& experts) {
        new (self) Mixture{experts, {}, {}, {}, static_cast<Combine>(combine)};
      })
      .def("__init__", [](Mixture* self, int combine, const Experts& experts, const Mlp& shared) {
        new (self) Mixture{experts, shared, {}, {}, static_cast<Combine>(combine)};
      })
      .def("__init__", [](Mixture* self, int combine, const Experts& experts, const Matrix& gate,
                          const Experts& gated) {
        new (self) Mixture{experts, {}, gate, gated, static_cast<Combine>(combine)};
      });
  nb::class_<Layer>(m, "Layer")
      .def("__init__", [](Layer* self, const Gqa& attention, const Dense& dense) {
        new (self) Layer{attention, {}, dense, {}, {}};
      })
      .def("__init__", [](Layer* self, const Mla& attention, const Dense& dense) {
        new (self) Layer{{}, attention, dense, {}, {}};
      })
      .def("__init__", [](Layer* self, const Gqa& attention, const Router& router,
                          const Mixture& mixture) {
        new (self) Layer{attention, {}, {}, router, mixture};
      })
      .def("__init__", [](Layer* self, const Mla& attention, const Router& router,
                          const Mixture& mixture) {
        new (self) Layer{{}, attention, {}, router, mixture};
      });
  nb::class_<Stack>(m, "Stack").def("__init__", [](Stack* self, std::vector<const Layer*> layers) {
    new (self) Stack();
    for (const Layer* layer : layers) self->layers.push_back(*layer);
  });
  nb::class_<Head>(m, "Head").def("__init__", [](Head* self, const Norm& norm,
                                                 const Matrix& matrix) {
    new (self) Head{norm, matrix};
  });
}

// So few rows are done before another thread could use the interpreter: it stays locked.
constexpr int64_t kQuickRows = 8;

void route(uintptr_t x, int64_t rows, const Router& w, uintptr_t normed, uintptr_t ids,
           uintptr_t weights) {
  const auto run = [&] {
    table().route(at<const float>(x), rows, w, at<float>(normed), at<int32_t>(ids),
                  at<float>(weights));
  };
  if (rows <= kQuickRows) return run();
  nb::gil_scoped_release unlocked;
  run();
}

// All layers, a cache for each. The ids of a routed layer follow those of the one before it.
// False as the kernels that they are made of.
bool forward_layers(uintptr_t x_at, const Stack& stack, const Pass& pass, std::vector<const Cache*> caches,
         uintptr_t ids_at) {
  if (caches.size() != stack.layers.size()) return false;
  const nb::gil_scoped_release unlocked;
  const Step& step = pass.step;
  const Kernels& kernels = table();
  float* x = at<float>(x_at);
  int32_t* ids = at<int32_t>(ids_at);
  for (std::size_t l = 0; l < stack.layers.size(); ++l) {
    const Layer& layer = stack.layers[l];
    if (!(layer.gqa ? kernels.attend_gqa(x, *layer.gqa, step, *caches[l])
                    : kernels.attend_mla(x, *layer.mla, step, *caches[l])))
      return false;
    if (layer.dense) {
      kernels.dense(x, step.rows, *layer.dense);
      continue;
    }
    const int64_t chosen = layer.router->spec.top_k, hidden = layer.router->matrix.k;
    float* normed = static_cast<float*>(scratch(3, 4 * step.rows * (hidden + chosen)));
    float* weights = normed + step.rows * hidden;
    kernels.route(x, step.rows, *layer.router, normed, ids, weights);
    if (!kernels.moe(x, step.rows, *layer.mixture, normed, ids, chosen, weights)) return false;
    ids += step.rows * chosen;
  }
  return true;
}

// False if an id is not a row of the table.
bool embed(uintptr_t to_rows, bool is_bf16, int64_t vocabulary, int64_t size, uintptr_t ids_at,
           int64_t rows, uintptr_t out_at) {
  const int64_t* ids = at<const int64_t>(ids_at);
  float* out = at<float>(out_at);
  for (int64_t t = 0; t < rows; ++t)
    if (ids[t] < 0 || ids[t] >= vocabulary) return false;
  for (int64_t t = 0; t < rows; ++t, out += size) {
    if (!is_bf16) {
      std::memcpy(out, at<const float>(to_rows) + ids[t] * size, size * sizeof(float));
      continue;
    }
    const uint16_t* row = at<const uint16_t>(to_rows) + ids[t] * size;
    for (int64_t h = 0; h < size; ++h) {
      const uint32_t bits = static_cast<uint32_t>(row[h]) << 16;
      std::memcpy(out + h, &bits, sizeof bits);
    }
  }
  return true;
}

// False if a wanted row is not one of x.
bool head(uintptr_t x, int64_t rows, uintptr_t wanted_at, int64_t wanted, const Head& w,
          uintptr_t out) {
  const int64_t* row = at<const int64_t>(wanted_at);
  for (int64_t r = 0; r < wanted; ++r)
    if (row[r] < 0 || row[r] >= rows) return false;
  table().head(at<const float>(x), row, wanted, w, at<float>(out));
  return true;
}

void bind_parts(nb::module_& m) {
  const nb::call_guard<Counted> counted;
  const nb::call_guard<Counted, nb::gil_scoped_release> unlocked;
  bind_handles(m);
  m.def("attend_gqa", [](uintptr_t x, const Gqa& w, const Pass& pass, const Cache& kv) {
    return table().attend_gqa(at<float>(x), w, pass.step, kv);
  }, unlocked);
  m.def("attend_mla", [](uintptr_t x, const Mla& w, const Pass& pass, const Cache& kv) {
    return table().attend_mla(at<float>(x), w, pass.step, kv);
  }, unlocked);
  m.def("dense", [](uintptr_t x, int64_t rows, const Dense& w) {
    table().dense(at<float>(x), rows, w);
  }, unlocked);
  m.def("route", route, counted);
  m.def("forward_layers", forward_layers, counted);
  m.def("moe", [](uintptr_t x, int64_t rows, const Mixture& w, uintptr_t normed, uintptr_t ids,
                  int64_t chosen, uintptr_t weights) {
    return table().moe(at<float>(x), rows, w, at<const float>(normed), at<const int32_t>(ids),
                       chosen, at<const float>(weights));
  }, unlocked);
  m.def("embed", embed, unlocked);
  m.def("head", head, unlocked);
}
