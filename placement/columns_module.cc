// moeserve.placement._columns: the pricing problems over numpy arrays. The only caller is
// moeserve/placement/solvers/columns/pricing.py, whose problems have checked shapes; the GIL is not
// held meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "columns.h"
#include "simplex.h"

namespace nb = nanobind;

namespace {

template <class T, int N>
using In = nb::ndarray<const T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

// The vector as an array that owns it.
template <class T>
auto owned(std::vector<T>&& from, size_t columns) {
  auto* kept = new std::vector<T>(std::move(from));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(
      kept->data(), {kept->size() / columns, columns}, owner);
}

moeserve::ColumnProblem problem(const In<int32_t, 2>& item_PK, const In<int32_t, 1>& weight_P,
                                const In<int64_t, 1>& load_E, const In<int64_t, 1>& price_E,
                                int64_t size, bool at_most, int64_t least, int64_t most) {
  moeserve::ColumnProblem in{};
  in.patterns = int64_t(item_PK.shape(0));
  in.width = int64_t(item_PK.shape(1));
  in.items = int64_t(load_E.shape(0));
  in.size = size;
  in.at_most = at_most;
  in.item_PK = item_PK.data();
  in.weight_P = weight_P.data();
  in.load_E = load_E.data();
  in.least_load = least;
  in.most_load = most;
  in.price_E = price_E.data();
  return in;
}

nb::tuple price(In<int32_t, 2> item_PK, In<int32_t, 1> weight_P, In<int64_t, 1> load_E,
                In<int64_t, 1> price_E, int64_t size, bool at_most, int64_t least_load,
                int64_t most_load, int64_t threshold, int64_t most, bool fewer, int64_t nodes,
                double seconds, bool cpu) {
  const auto in =
      problem(item_PK, weight_P, load_E, price_E, size, at_most, least_load, most_load);
  moeserve::Priced found;
  bool complete = false;
  {
    nb::gil_scoped_release release;
    found = moeserve::price(in, threshold, most, fewer, {nodes, seconds, cpu}, &complete);
  }
  return nb::make_tuple(owned(std::move(found.item_CM), size_t(size)),
                        owned(std::move(found.reduced_C), 1), owned(std::move(found.floor_E), 1),
                        complete, found.nodes);
}

nb::tuple descend(In<int32_t, 2> item_PK, In<int32_t, 1> weight_P, In<int64_t, 1> load_E,
                  In<int64_t, 1> price_E, int64_t size, bool at_most, int64_t least_load,
                  int64_t most_load, In<int32_t, 2> start_CM, int64_t threshold, int64_t most,
                  uint64_t seed) {
  const auto in =
      problem(item_PK, weight_P, load_E, price_E, size, at_most, least_load, most_load);
  const int64_t starts = int64_t(start_CM.shape(0));
  const int32_t* start = start_CM.data();
  moeserve::Priced found;
  {
    nb::gil_scoped_release release;
    found = moeserve::descend(in, starts, start, threshold, most, seed);
  }
  return nb::make_tuple(owned(std::move(found.item_CM), size_t(size)),
                        owned(std::move(found.reduced_C), 1));
}

nb::tuple cover(In<int32_t, 2> item_PK, In<int32_t, 1> weight_P, In<int64_t, 1> load_E,
                In<int64_t, 1> price_E, int64_t size, int64_t least_load, int64_t most_load,
                In<int32_t, 2> item_CM, In<int64_t, 1> reduced_C, int64_t whole, int64_t budget,
                int64_t nodes, double seconds, bool cpu) {
  const auto in = problem(item_PK, weight_P, load_E, price_E, size, false, least_load, most_load);
  const int64_t columns = int64_t(reduced_C.shape(0));
  const int32_t* item = item_CM.data();
  const int64_t* reduced = reduced_C.data();
  moeserve::Cover found;
  {
    nb::gil_scoped_release release;
    found = moeserve::cover(in, columns, item, reduced, whole, budget, {nodes, seconds, cpu});
  }
  return nb::make_tuple(owned(std::move(found.block_E), 1), found.value, found.complete,
                        found.nodes);
}

void add(moeserve::Simplex& master, In<int32_t, 2> item_CM, In<double, 1> cost_C) {
  master.add(int64_t(cost_C.shape(0)), item_CM.data(), cost_C.data());
}

nb::tuple solve(moeserve::Simplex& master) {
  {
    nb::gil_scoped_release release;
    master.solve();
  }
  return nb::make_tuple(owned(std::vector<double>(master.dual_R()), 1),
                        owned(master.share_C(), 1));
}

}  // namespace

NB_MODULE(_columns, m) {
  m.def("price", &price);
  m.def("descend", &descend);
  m.def("cover", &cover);
  nb::class_<moeserve::Simplex>(m, "Simplex")
      .def("__init__",
           [](moeserve::Simplex* at, int64_t size, int64_t places, In<double, 1> alone_E,
              bool counted) {
             new (at) moeserve::Simplex(int64_t(alone_E.shape(0)), size, places, alone_E.data(),
                                        counted);
           })
      .def("add", &add)
      .def("dearer", &moeserve::Simplex::dearer)
      .def("solve", &solve);
}
