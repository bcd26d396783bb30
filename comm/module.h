// What each file of this folder adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace moeserve {

void bind_assign(nanobind::module_& m);
void bind_shm(nanobind::module_& m);
void bind_tcp(nanobind::module_& m);
void bind_mesh(nanobind::module_& m);

}  // namespace moeserve
