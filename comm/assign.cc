// Which copies of a batch's tokens go to which rank.
#include "module.h"

namespace moeserve {

void bind_assign(nanobind::module_&) {}

}  // namespace moeserve
