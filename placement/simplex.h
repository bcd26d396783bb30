// The master problem of a column generation: min cost @ x, each item in columns of total 1, and at
// most `places` columns where they are counted. Primal simplex on a kept inverse, the right-hand
// side perturbed against degeneracy; each solve begins at the last basis. Its twin is SimplexMaster
// in moeserve/placement/solvers/columns/master.py, and either ends where it may: what is wanted are
// prices, and any prices will do (moeserve/placement/solvers/columns/generation.py).
//
// Letters in shapes: E items, M items of a column, C columns, R rows (the items, then the places).
#pragma once

#include <cstdint>
#include <vector>

namespace moeserve {

class Simplex {
 public:
  // `alone_E` is what an item outside of all columns costs at first.
  Simplex(int64_t items, int64_t size, int64_t places, const double* alone_E, bool counted);

  // -1 behind the last item of a column.
  void add(int64_t columns, const int32_t* item_CM, const double* cost_C);
  void dearer(double factor);  // outside of all columns
  void solve();

  const std::vector<double>& dual_R() const { return dual_R_; }
  std::vector<double> share_C() const;  // of the columns that were added
  int64_t items() const { return items_; }
  int64_t size() const { return size_; }

 private:
  // Columns are numbered as they come; -1 - r is that of row r alone.
  double reduced(int64_t c) const;
  bool cheap(int64_t c, double reduced) const;
  bool list_cheapest();
  int64_t cheapest_listed();
  bool pivot(int64_t enters);
  void refresh();
  void sum_duals();
  double cost(int64_t c) const { return c < 0 ? alone_R_[-1 - c] : cost_C_[c]; }

  int64_t items_, size_, rows_;
  bool counted_;
  std::vector<int32_t> item_CM_;
  std::vector<double> cost_C_, alone_R_, right_R_, level_R_, inverse_RR_, dual_R_, step_R_;
  std::vector<int64_t> listed_;
  std::vector<int64_t> basis_R_;  // columns
  int64_t since_ = 0;
};

}  // namespace moeserve
