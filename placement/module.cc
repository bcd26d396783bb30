// moeserve.placement._search: the search loops over numpy arrays. The only caller is
// moeserve/placement/solvers/search.py, which checks every shape; the GIL is not held meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "search.h"

namespace nb = nanobind;

namespace {

template <class T, int N>
using In = nb::ndarray<const T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<T, nb::numpy, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

nb::tuple group(In<int32_t, 2> slot_TK, Out<int32_t, 1> device_S, In<int32_t, 1> node_D,
                In<uint8_t, 2> weight_DT, In<uint8_t, 2> weight_NT, In<int64_t, 2> load_SW,
                In<int64_t, 2> cap_DW, In<int64_t, 2> bond_SS, In<int64_t, 2> price_SD,
                In<int32_t, 1> draw, int64_t penalty, int64_t heat, int64_t steps,
                uint64_t seed) {
  moeserve::LayerGrouping in{};
  in.tokens = int64_t(slot_TK.shape(0));
  in.width = int64_t(slot_TK.shape(1));
  in.slots = int64_t(device_S.shape(0));
  in.devices = int64_t(node_D.shape(0));
  in.nodes = int64_t(weight_NT.shape(0));
  in.workloads = int64_t(load_SW.shape(1));
  in.slot_TK = slot_TK.data();
  in.node_D = node_D.data();
  in.weight_DT = weight_DT.data();
  in.weight_NT = weight_NT.data();
  in.load_SW = load_SW.data();
  in.cap_DW = cap_DW.data();
  in.bond_SS = bond_SS.shape(0) ? bond_SS.data() : nullptr;
  in.price_SD = price_SD.shape(0) ? price_SD.data() : nullptr;
  in.draw = draw.data();
  in.penalty = penalty;
  in.heat = heat;
  in.steps = steps;
  in.seed = seed;
  int32_t* device = device_S.data();
  moeserve::GroupedLayer done;
  {
    nb::gil_scoped_release release;
    done = moeserve::group(in, device);
  }
  return nb::make_tuple(done.cost, done.excess);
}

int64_t saved_bound(In<int32_t, 2> slot_TK, int64_t slots, int64_t partners) {
  const int64_t tokens = int64_t(slot_TK.shape(0)), width = int64_t(slot_TK.shape(1));
  const int32_t* slot = slot_TK.data();
  nb::gil_scoped_release release;
  return moeserve::saved_bound(tokens, width, slots, slot, partners);
}

double balance(In<double, 2> load_EW, In<double, 1> speed_D, int64_t recounts,
               Out<int32_t, 1> expert_S) {
  const int64_t experts = int64_t(load_EW.shape(0)), workloads = int64_t(load_EW.shape(1));
  const int64_t devices = int64_t(speed_D.shape(0)), slots = int64_t(expert_S.shape(0));
  const double *load = load_EW.data(), *speed = speed_D.data();
  int32_t* expert = expert_S.data();
  nb::gil_scoped_release release;
  return moeserve::balance(experts, workloads, devices, slots, load, speed, recounts, expert);
}

void assign(In<double, 2> cost_RC, Out<int32_t, 1> column_R) {
  const int64_t size = int64_t(column_R.shape(0));
  const double* cost = cost_RC.data();
  int32_t* column = column_R.data();
  nb::gil_scoped_release release;
  moeserve::assign(size, cost, column);
}

}  // namespace

NB_MODULE(_search, m) {
  m.def("group", &group);
  m.def("saved_bound", &saved_bound);
  m.def("balance", &balance);
  m.def("assign", &assign);
}
