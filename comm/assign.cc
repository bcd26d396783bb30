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
// ascending; slot s lies on rank s / slots_per_rank. An empty slot (-1) is of no expert.
struct Table {
  std::vector<int32_t> first, slot;
  int32_t world, slots_per_rank;
};

void make_table(Table* self, std::vector<int32_t> expert_of_slot, int32_t experts, int32_t world) {
  const auto slots = static_cast<int32_t>(expert_of_slot.size());
  if (world < 1 || slots % world) throw std::invalid_argument("slots do not divide over the ranks");
  std::vector<int32_t> first(experts + 1, 0), slot(slots);
  for (int32_t e : expert_of_slot) {
    if (e < -1 || e >= experts) throw std::invalid_argument("a slot holds an unknown expert");
    if (e >= 0) ++first[e + 1];
  }
  for (int32_t e = 0; e < experts; ++e) first[e + 1] += first[e];
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (int32_t s = 0; s < slots; ++s)
    if (expert_of_slot[s] >= 0) slot[next[expert_of_slot[s]]++] = s;
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

// moeserve/placement/split.py: least loaded first, of equals the rank next after home, then by slot;
// but the first of those on a rank that the token visits anyway, if its load is within the slack.
int32_t choose(const Table& table, int32_t e, int32_t home, const std::vector<int32_t>& load,
               const std::vector<int64_t>& visit, int64_t token, int32_t slack) {
  int32_t least = -1, near = -1;
  const auto rank_of = [&](int32_t s) { return s / table.slots_per_rank; };
  const auto before = [&](int32_t s, int32_t than) {
    if (than < 0) return true;
    const int32_t a = rank_of(s), b = rank_of(than);
    if (load[a] != load[b]) return load[a] < load[b];
    return (a - home + table.world) % table.world < (b - home + table.world) % table.world;
  };
  for (int32_t i = table.first[e]; i < table.first[e + 1]; ++i) {
    const int32_t s = table.slot[i];
    if (before(s, least)) least = s;
    if (visit[rank_of(s)] == token && before(s, near)) near = s;
  }
  return near >= 0 && load[rank_of(near)] <= load[rank_of(least)] + slack ? near : least;
}

// The slot of every choice, -1 where there is none. `visit[r]` is the last token that went to rank r.
std::vector<int32_t> slots_of(const Table& table, const int32_t* ids, int64_t tokens,
                              int64_t chosen, int32_t home) {
  const auto experts = static_cast<int32_t>(table.first.size()) - 1;
  std::vector<int32_t> slots(tokens * chosen, -1), load(table.world, 0);
  int64_t pairs = 0, open = 0;
  for (int64_t i = 0; i < tokens * chosen; ++i) {
    const int32_t e = ids[i];
    if (e >= experts) throw std::invalid_argument("an expert id is unknown");
    if (e < 0) continue;
    ++pairs;
    if (table.first[e + 1] - table.first[e] > 1) {
      ++open;
      continue;
    }
    slots[i] = table.slot[table.first[e]];
    ++load[slots[i] / table.slots_per_rank];
  }
  if (!open) return slots;
  const int32_t slack = 3 + static_cast<int32_t>(pairs / (4 * table.world));
  std::vector<int64_t> visit(table.world, -1);
  for (int64_t t = 0; t < tokens; ++t) {
    visit[home] = t;
    for (int64_t i = t * chosen; i < (t + 1) * chosen; ++i)
      if (slots[i] >= 0) visit[slots[i] / table.slots_per_rank] = t;
    for (int64_t i = t * chosen; i < (t + 1) * chosen; ++i) {
      if (ids[i] < 0 || slots[i] >= 0) continue;
      slots[i] = choose(table, ids[i], home, load, visit, t, slack);
      ++load[slots[i] / table.slots_per_rank];
      visit[slots[i] / table.slots_per_rank] = t;
    }
  }
  return slots;
}

std::vector<int32_t> assign(const Table& table, uintptr_t ids, int64_t tokens, int64_t chosen,
                            int32_t home, int32_t ranks_per_unit, uintptr_t start, uintptr_t token,
                            uintptr_t slot) {
  const int32_t units = table.world / ranks_per_unit;
  const auto slots = slots_of(table, at<const int32_t>(ids), tokens, chosen, home);
  const Copies copies{at<int32_t>(start), at<int32_t>(token), at<int16_t>(slot)};
  gather(slots.data(), tokens, chosen, units, table.slots_per_rank * ranks_per_unit, copies);
  std::vector<int32_t> counts(units);
  for (int32_t u = 0; u < units; ++u) counts[u] = copies.start[u + 1] - copies.start[u];
  return counts;
}

// Copies of records that came: `slots_at` bytes into each record lie its slots of this unit.
std::vector<int32_t> relay(std::vector<uintptr_t> segments, std::vector<int64_t> rows,
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
  nb::class_<Table>(m, "AssignmentTable").def("__init__", make_table).def("assign", assign);
  m.def("relay", relay);
}

}  // namespace moeserve
