// Segments between ranks of one host.
#include "module.h"

namespace moeserve {

void bind_shm(nanobind::module_&) {}

}  // namespace moeserve
