// Which copies of a batch's tokens go to which rank; moeserve/comm/assign.py is the meaning of it.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "module.h"

namespace nb = nanobind;

namespace moeserve {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where the experts of a layer lie. The slots of expert e are slot[first[e]] .. slot[first[e + 1]],
// ascending; slot s lies on rank s / slots_per_rank.
struct Table {
  std::vector<int32_t> first, slot;
  int32_t world, slots_per_rank;
};

void make_table(Table* self, std::vector<int32_t> expert_of_slot, int32_t experts, int32_t world) {
  const auto slots = static_cast<int32_t>(expert_of_slot.size());
  if (world < 1 || slots % world) throw std::invalid_argument("slots do not divide over the ranks");
  std::vector<int32_t> first(experts + 1, 0), slot(slots);
  for (int32_t e : expert_of_slot) {
    if (e < 0 || e >= experts) throw std::invalid_argument("a slot holds an unknown expert");
    ++first[e + 1];
  }
  for (int32_t e = 0; e < experts; ++e) first[e + 1] += first[e];
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int32_t s = 0; s < slots; ++s) slot[next[expert_of_slot[s]]++] = s;
  new (self) Table{std::move(first), std::move(slot), world, slots / world};
}

// Records of a step, before they are written: who gets a copy of a token, with which slots.
struct Copies {
  int32_t* start;  // [units + 1]
  int32_t* token;  // [N]
  int16_t* slot;   // [N][chosen]
};

// From the slot of every choice (-1: none) to copies, one for every (token, unit of slots).
void gather(const int32_t* slots, int64_t tokens, int64_t chosen, int32_t units, int32_t per_unit,
            Copies to) {
  std::vector<int32_t> last(units, -1), next(units, 0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < chosen; ++c) {
      const int32_t s = slots[t * chosen + c];
      if (s < 0) continue;
      const int32_t unit = s / per_unit;
      if (last[unit] != t) ++next[unit];
      last[unit] = static_cast<int32_t>(t);
    }
  to.start[0] = 0;
  for (int32_t u = 0; u < units; ++u) {
    to.start[u + 1] = to.start[u] + next[u];
    next[u] = to.start[u] - 1;
    last[u] = -1;
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < chosen; ++c) {
      const int32_t s = slots[t * chosen + c];
      if (s < 0) continue;
      const int32_t unit = s / per_unit;
      int32_t& n = next[unit];
      if (last[unit] != t) {
        last[unit] = static_cast<int32_t>(t);
        to.token[++n] = static_cast<int32_t>(t);
        std::fill_n(to.slot + n * chosen, chosen, int16_t{-1});
      }
      to.slot[n * chosen + c] = static_cast<int16_t>(s % per_unit);
    }
}

// Among the copies of an expert: one on a rank that the token goes to anyway, else on a unit that
// it goes to anyway, each unless it has `kSlack` pairs more than the least loaded copy; else that.
// Of equals the first in order of slots.
constexpr int32_t kSlack = 4;

int32_t choose(const int32_t* from, const int32_t* to, int32_t per_rank, int32_t ranks_per_unit,
               const std::vector<int32_t>& load, const std::vector<uint8_t>& used,
               const std::vector<uint8_t>& used_unit) {
  int32_t best[3] = {-1, -1, -1};  // on a used rank, on a used unit, anywhere
  const auto better = [&](int32_t s, int32_t than) {
    return than < 0 || load[s / per_rank] < load[than / per_rank];
  };
  for (const int32_t* s = from; s < to; ++s) {
    const int32_t rank = *s / per_rank;
    if (used[rank] && better(*s, best[0])) best[0] = *s;
    if (used_unit[rank / ranks_per_unit] && better(*s, best[1])) best[1] = *s;
    if (better(*s, best[2])) best[2] = *s;
  }
  const int32_t least = load[best[2] / per_rank];
  for (int32_t tier = 0; tier < 2; ++tier)
    if (best[tier] >= 0 && load[best[tier] / per_rank] <= least + kSlack) return best[tier];
  return best[2];
}

std::vector<int32_t> assign(const Table& table, uintptr_t ids_at, int64_t tokens, int64_t chosen,
                            int32_t home, int32_t ranks_per_unit, uintptr_t start, uintptr_t token,
                            uintptr_t slot) {
  const int32_t per_rank = table.slots_per_rank, units = table.world / ranks_per_unit;
  const auto experts = static_cast<int32_t>(table.first.size()) - 1;
  const int32_t* ids = at<const int32_t>(ids_at);
  std::vector<int32_t> slots(tokens * chosen), load(table.world, 0);
  std::vector<uint8_t> used(table.world), used_unit(units);
  for (int64_t t = 0; t < tokens; ++t) {
    std::fill(used.begin(), used.end(), 0);
    std::fill(used_unit.begin(), used_unit.end(), 0);
    used[home] = used_unit[home / ranks_per_unit] = 1;
    const auto take = [&](int64_t c, int32_t s) {
      const int32_t rank = s / per_rank;
      slots[t * chosen + c] = s;
      used[rank] = used_unit[rank / ranks_per_unit] = 1;
      ++load[rank];
    };
    for (int64_t c = 0; c < chosen; ++c) {
      const int32_t e = ids[t * chosen + c];
      if (e < 0 || e >= experts) throw std::invalid_argument("an expert id is unknown");
      if (table.first[e + 1] - table.first[e] == 1) take(c, table.slot[table.first[e]]);
    }
    for (int64_t c = 0; c < chosen; ++c) {
      const int32_t e = ids[t * chosen + c], from = table.first[e], to = table.first[e + 1];
      if (to - from > 1)
        take(c, choose(&table.slot[from], &table.slot[to], per_rank, ranks_per_unit, load, used,
                       used_unit));
    }
  }
  const Copies copies{at<int32_t>(start), at<int32_t>(token), at<int16_t>(slot)};
  gather(slots.data(), tokens, chosen, units, per_rank * ranks_per_unit, copies);
  std::vector<int32_t> counts(units);
  for (int32_t u = 0; u < units; ++u) counts[u] = copies.start[u + 1] - copies.start[u];
  return counts;
}

// Copies of records that came: `slots_at` bytes into each record lie its slots of this unit.
std::vector<int32_t> spread(std::vector<uintptr_t> segments, std::vector<int64_t> rows,
                            int64_t row_bytes, int64_t slots_at, int64_t chosen, int32_t ranks,
                            int32_t per_rank, uintptr_t start, uintptr_t token, uintptr_t slot) {
  int64_t all = 0;
  for (int64_t count : rows) all += count;
  std::vector<int32_t> slots(all * chosen);
  int32_t* to = slots.data();
  for (std::size_t i = 0; i < segments.size(); ++i)
    for (int64_t row = 0; row < rows[i]; ++row)
      for (int64_t c = 0; c < chosen; ++c) {
        const int16_t s = at<const int16_t>(segments[i] + row * row_bytes + slots_at)[c];
        if (s >= ranks * per_rank) throw std::invalid_argument("a record names an unknown slot");
        *to++ = s;
      }
  const Copies copies{at<int32_t>(start), at<int32_t>(token), at<int16_t>(slot)};
  gather(slots.data(), all, chosen, ranks, per_rank, copies);
  std::vector<int32_t> counts(ranks);
  for (int32_t r = 0; r < ranks; ++r) counts[r] = copies.start[r + 1] - copies.start[r];
  return counts;
}

}  // namespace

void bind_assign(nb::module_& m) {
  nb::class_<Table>(m, "Table").def("__init__", make_table).def("assign", assign);
  m.def("spread", spread);
}

}  // namespace moeserve
