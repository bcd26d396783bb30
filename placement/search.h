// The loops of the placement search that cost time. Each has a twin in
// moeserve/placement/solvers/twin.py which takes the same decisions; tests hold them equal.
//
// Letters in shapes: T tokens, K experts per token, E experts, S slots of one layer, D devices,
// N nodes, W workloads.
#pragma once

#include <cstdint>
#include <vector>

namespace moeserve {

struct LayerGrouping {
  int64_t tokens, width, slots, devices, nodes, workloads;
  const int32_t* slot_TK;     // slot used by each choice of each token, -1 where there is none
  const int32_t* node_D;
  const uint8_t* weight_DT;   // price of token t occupying device d
  const uint8_t* weight_NT;   // price of token t occupying node n; unread when nodes == 1
  const int64_t* load_SW;
  const int64_t* cap_DW;
  const int64_t* bond_SS;     // price of two slots sharing a device; null for none
  const int64_t* price_SD;    // price of a slot lying on a device; null for none
  const int32_t* draw;        // 1024 samples of an exponential variable, times 1024
  int64_t penalty;            // price of one unit of load above a cap
  int64_t heat;               // initial temperature
  int64_t steps;
  uint64_t seed;
};

struct GroupedLayer {
  int64_t cost, excess;
};

// Anneals by swapping slots of different devices. `device_S` holds the start and receives the
// best arrangement whose load excess is the least met, and then whose cost is.
GroupedLayer group(const LayerGrouping& in, int32_t* device_S);

// Upper bound on the places saved in total when every slot has at most `partners` neighbours: in
// units of 1/720720 place.
int64_t saved_bound(int64_t tokens, int64_t width, int64_t slots, const int32_t* slot_TK,
                    int64_t partners);

// Replicates, packs and refines one layer; `expert_S` receives slot -> expert, device by device.
// Returns the largest load / speed over devices and workloads.
double balance(int64_t experts, int64_t workloads, int64_t devices, int64_t slots,
               const double* load_EW, const double* speed_D, int64_t recounts, int32_t* expert_S);

// Cheapest perfect assignment: `column_R[r]` is the column of row r.
void assign(int64_t size, const double* cost_RC, int32_t* column_R);

}  // namespace moeserve
