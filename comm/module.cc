// moeserve.comm._comm, by raw addresses; moeserve/comm checks every shape.
#include "module.h"

NB_MODULE(_comm, m) {
  moeserve::bind_assign(m);
  moeserve::bind_shm(m);
  moeserve::bind_tcp(m);
  moeserve::bind_mesh(m);
}
