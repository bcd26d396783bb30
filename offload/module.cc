// moeserve.offload._mover, by raw addresses; moeserve/offload/mover.py is the only caller, and
// whoever calls it keeps the memory that is read into.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "mover.h"

namespace nb = nanobind;

namespace {

using moeserve::Mover;
// direct, buffered, offset, nbytes, address
using Wanted = std::tuple<int, int, int64_t, int64_t, uintptr_t>;

int64_t submit(Mover& mover, const std::vector<Wanted>& wanted, bool ahead) {
  std::vector<moeserve::Read> reads;
  reads.reserve(wanted.size());
  for (const auto& [direct, buffered, offset, nbytes, to] : wanted)
    reads.push_back({direct, buffered, offset, nbytes, reinterpret_cast<char*>(to)});
  return mover.submit(reads, ahead);
}

std::tuple<int, int64_t, int> wait(Mover& mover, int64_t ticket, double seconds) {
  const nb::gil_scoped_release unlocked;
  const moeserve::Ending ending = mover.wait(ticket, seconds);
  return {int(ending.outcome), ending.at, ending.error};
}

nb::dict counts(const Mover& mover) {
  const moeserve::MoverCounts& c = mover.counts();
  nb::dict found;
  found["bytes"] = c.bytes.load();
  found["calls"] = c.calls.load();
  found["reads"] = c.reads.load();
  found["cancelled"] = c.cancelled.load();
  found["buffered"] = c.buffered.load();
  found["waits"] = c.waits.load();
  found["waited_ns"] = c.waited_ns.load();
  return found;
}

}  // namespace

NB_MODULE(_mover, m) {
  nb::class_<Mover>(m, "Mover")
      .def(nb::init<int, int64_t>())
      .def("submit", &submit)
      .def("wait", &wait)
      .def("promote", &Mover::promote)
      .def("cancel", &Mover::cancel)
      .def("counts", &counts);
}
