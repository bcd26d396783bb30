// Reads of files into memory by threads of its own: what is needed now first, what is read ahead
// after it. Pages of the files do not stay in the page cache.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

namespace moeserve {

// Where bytes come from and where they go. `direct` is a descriptor opened with O_DIRECT, or -1;
// `buffered` one without. Whoever submits keeps the memory and both descriptors until the ticket
// has ended.
struct Read {
  int direct, buffered;
  int64_t offset, nbytes;
  char* to;
};

enum class Outcome : int { done, late, cancelled, failed, truncated, unknown };

// How a read ended. `at` is the byte of the file where it failed, `error` its errno.
struct Ending {
  Outcome outcome;
  int64_t at;
  int error;
};

struct MoverCounts {
  std::atomic<int64_t> bytes{0}, calls{0}, reads{0}, cancelled{0}, buffered{0};
  std::atomic<int64_t> waits{0}, waited_ns{0};
};

class Mover {
 public:
  // At most `most` tickets at once.
  Mover(int threads, int64_t most);
  ~Mover();
  Mover(const Mover&) = delete;

  // The first of as many tickets as there are reads, numbered on; -1, and nothing is read, where
  // there would be too many.
  int64_t submit(const std::vector<Read>& reads, bool ahead);
  // A ticket that has ended is forgotten; one that is late is not.
  Ending wait(int64_t ticket, double seconds);
  // Before everything that is read ahead; nothing where it has begun.
  void promote(int64_t ticket);
  // Whether nothing of it has been or will be read; the ticket is forgotten then.
  bool cancel(int64_t ticket);
  const MoverCounts& counts() const { return counts_; }

 private:
  // A piece of a read that one call may read.
  struct Part {
    int64_t ticket;
    Read read;
  };
  struct State {
    int64_t parts, begun, at;
    int error;
    bool truncated;
  };

  void work();
  bool take(std::vector<Part>& parts);
  void run(const std::vector<Part>& parts);
  void end(const std::vector<Part>& parts, int64_t got, int error, bool truncated);

  std::mutex mutex_;
  std::condition_variable queued_, ended_;
  std::deque<Part> now_, ahead_;
  std::unordered_map<int64_t, State> open_;
  int64_t next_ = 0;
  const int64_t most_;
  bool stopping_ = false;
  MoverCounts counts_;
  std::vector<std::thread> threads_;
};

}  // namespace moeserve
