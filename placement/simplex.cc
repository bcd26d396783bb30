#include "simplex.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace moeserve {
namespace {

constexpr double kTolerance = 1e-7, kLeastPivot = 1e-8, kNothing = 1e-13;
constexpr int64_t kRefresh = 1000;  // pivots between two inversions
constexpr int64_t kListed = 24;     // columns that are looked at for several pivots
constexpr int64_t kNone = std::numeric_limits<int64_t>::min();

double uniform(uint64_t& state) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return double(state >> 11) / double(1ull << 53);
}

}  // namespace

Simplex::Simplex(int64_t items, int64_t size, int64_t places, const double* alone_E, bool counted)
    : items_(items), size_(size), rows_(items + counted), counted_(counted),
      alone_R_(alone_E, alone_E + items), right_R_(rows_, 1.0), inverse_RR_(rows_ * rows_, 0.0),
      dual_R_(rows_), step_R_(rows_), basis_R_(rows_) {
  uint64_t random = 1;
  const double perturbed = std::clamp(1e-5 * double(rows_ * rows_) / 256, 1e-5, 1e-3);
  for (double& x : right_R_) x += perturbed * (uniform(random) - 0.5);
  if (counted) {
    right_R_[items] += double(places - 1);
    alone_R_.push_back(0);
    item_CM_.assign(size, -1);  // an empty column: a place that is not used
    cost_C_.push_back(0);
  }
  level_R_ = right_R_;
  for (int64_t r = 0; r < rows_; ++r) {
    basis_R_[r] = -1 - r;
    inverse_RR_[r * rows_ + r] = 1;
  }
}

void Simplex::add(int64_t columns, const int32_t* item_CM, const double* cost_C) {
  item_CM_.insert(item_CM_.end(), item_CM, item_CM + columns * size_);
  cost_C_.insert(cost_C_.end(), cost_C, cost_C + columns);
}

void Simplex::dearer(double factor) {
  for (double& x : alone_R_) x *= factor;
}

void Simplex::solve() {
  sum_duals();
  // A bound against circling: any end is valid.
  for (int64_t left = 40 * rows_ + int64_t(cost_C_.size()); left > 0; --left) {
    if (listed_.empty() && !list_cheapest()) break;
    const int64_t enters = cheapest_listed();
    if (enters != kNone && !pivot(enters)) break;
  }
  listed_.clear();
  sum_duals();
}

std::vector<double> Simplex::share_C() const {
  std::vector<double> share_C(cost_C_.size(), 0.0);
  for (int64_t r = 0; r < rows_; ++r)
    if (basis_R_[r] >= 0) share_C[basis_R_[r]] = level_R_[r];
  if (counted_) share_C.erase(share_C.begin());
  return share_C;
}

double Simplex::reduced(int64_t c) const {
  if (c < 0) return alone_R_[-1 - c] - dual_R_[-1 - c];
  double sum = cost_C_[c] - (counted_ ? dual_R_[items_] : 0.0);
  for (int64_t m = 0; m < size_; ++m)
    if (const int32_t e = item_CM_[c * size_ + m]; e >= 0) sum -= dual_R_[e];
  return sum;
}

bool Simplex::cheap(int64_t c, double reduced) const {
  return reduced < -kTolerance * (1 + std::abs(cost(c)));
}

// Columns that are cheaper than the duals, items outside of all columns among them: the cheapest
// kListed.
bool Simplex::list_cheapest() {
  std::vector<std::pair<double, int64_t>> found;
  for (int64_t c = -items_; c < int64_t(cost_C_.size()); ++c)
    if (const double x = reduced(c); cheap(c, x)) found.emplace_back(x, c);
  const int64_t count = std::min<int64_t>(kListed, int64_t(found.size()));
  std::partial_sort(found.begin(), found.begin() + count, found.end());
  for (int64_t i = 0; i < count; ++i) listed_.push_back(found[i].second);
  return count > 0;
}

// Of the list, which loses those that are not cheaper any more; kNone when none is left.
int64_t Simplex::cheapest_listed() {
  int64_t best = kNone;
  double least = 0;
  size_t kept = 0;
  for (const int64_t c : listed_) {
    const double x = reduced(c);
    if (!cheap(c, x)) continue;
    listed_[kept++] = c;
    if (x < least) least = x, best = c;
  }
  listed_.resize(kept);
  return best;
}

bool Simplex::pivot(int64_t enters) {
  const int64_t R = rows_;
  for (int64_t r = 0; r < R; ++r) {
    const double* row = &inverse_RR_[r * R];
    double sum = enters < 0 ? row[-1 - enters] : counted_ ? row[items_] : 0.0;
    for (int64_t m = 0; enters >= 0 && m < size_; ++m)
      if (const int32_t e = item_CM_[enters * size_ + m]; e >= 0) sum += row[e];
    step_R_[r] = sum;
  }
  double least = std::numeric_limits<double>::infinity();
  for (int64_t r = 0; r < R; ++r)
    if (step_R_[r] > kLeastPivot) least = std::min(least, level_R_[r] / step_R_[r]);
  int64_t leaves = -1;
  for (int64_t r = 0; r < R; ++r)
    if (step_R_[r] > kLeastPivot && level_R_[r] / step_R_[r] <= least + 1e-12 &&
        (leaves < 0 || step_R_[r] > step_R_[leaves]))
      leaves = r;
  if (leaves < 0) return false;
  least = std::max(0.0, least);
  double* row = &inverse_RR_[leaves * R];
  const double gain = reduced(enters), divisor = step_R_[leaves];
  for (int64_t k = 0; k < R; ++k) {
    row[k] /= divisor;
    dual_R_[k] += gain * row[k];
  }
  for (int64_t r = 0; r < R; ++r) {
    if (r == leaves || std::abs(step_R_[r]) <= kNothing) continue;
    level_R_[r] = std::max(0.0, level_R_[r] - least * step_R_[r]);
    double* other = &inverse_RR_[r * R];
    for (int64_t k = 0; k < R; ++k) other[k] -= step_R_[r] * row[k];
  }
  level_R_[leaves] = least;
  basis_R_[leaves] = enters;
  if (++since_ >= kRefresh) refresh();
  return true;
}

void Simplex::sum_duals() {
  std::fill(dual_R_.begin(), dual_R_.end(), 0.0);
  for (int64_t r = 0; r < rows_; ++r)
    for (int64_t k = 0; k < rows_; ++k)
      dual_R_[k] += cost(basis_R_[r]) * inverse_RR_[r * rows_ + k];
}

// The inverse anew, by elimination with the largest pivots.
void Simplex::refresh() {
  const int64_t R = rows_, W = 2 * R;
  std::vector<double> wide(R * W, 0.0);
  for (int64_t c = 0; c < R; ++c) {
    wide[c * W + R + c] = 1;
    if (basis_R_[c] < 0) {
      wide[(-1 - basis_R_[c]) * W + c] = 1;
      continue;
    }
    if (counted_) wide[items_ * W + c] = 1;
    for (int64_t m = 0; m < size_; ++m)
      if (const int32_t e = item_CM_[basis_R_[c] * size_ + m]; e >= 0) wide[e * W + c] = 1;
  }
  for (int64_t c = 0; c < R; ++c) {
    int64_t top = c;
    for (int64_t r = c + 1; r < R; ++r)
      if (std::abs(wide[r * W + c]) > std::abs(wide[top * W + c])) top = r;
    if (std::abs(wide[top * W + c]) < kLeastPivot) return;  // keep what there is
    if (top != c) std::swap_ranges(&wide[top * W], &wide[top * W] + W, &wide[c * W]);
    const double divisor = wide[c * W + c];
    for (int64_t k = c; k < W; ++k) wide[c * W + k] /= divisor;
    for (int64_t r = 0; r < R; ++r) {
      const double factor = wide[r * W + c];
      if (r == c || factor == 0) continue;
      for (int64_t k = c; k < W; ++k) wide[r * W + k] -= factor * wide[c * W + k];
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    double level = 0;
    for (int64_t k = 0; k < R; ++k) {
      inverse_RR_[r * R + k] = wide[r * W + R + k];
      level += inverse_RR_[r * R + k] * right_R_[k];
    }
    level_R_[r] = std::max(0.0, level);
  }
  since_ = 0;
  sum_duals();
}

}  // namespace moeserve
