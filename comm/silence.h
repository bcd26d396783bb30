// Which ranks have been silent for too long: moeserve/comm/control/silence.py in C++, its twin.
//
// A rank is late when nothing was received from it for longer than the limit while this one was
// itself running: one that was stopped does not blame the others for its own sleep. Seconds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace moeserve {

class Silence {
 public:
  Silence(const std::vector<uint32_t>& ranks, double now, double limit_s, double period_s)
      : limit_s_(limit_s), period_s_(period_s), looked_(now) {
    for (uint32_t rank : ranks) received_at_[rank] = now;
  }

  void record(uint32_t rank, double now) { received_at_[rank] = now; }

  // Late ranks and how long they have been silent; what has arrived is recorded before.
  std::vector<std::pair<uint32_t, double>> late(double now) {
    double slept = now - looked_ - 2 * period_s_;
    looked_ = now;
    std::vector<std::pair<uint32_t, double>> found;
    for (auto& [rank, received] : received_at_) {
      if (slept > 0) received = std::min(now, received + slept);
      if (now - received > limit_s_) found.emplace_back(rank, now - received);
    }
    return found;
  }

 private:
  double limit_s_, period_s_, looked_;
  std::map<uint32_t, double> received_at_;
};

}  // namespace moeserve
