#include "mover.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

namespace moeserve {

namespace {

constexpr int64_t kPage = 4096;  // what O_DIRECT wants offsets, lengths and addresses in
constexpr int64_t kMost = 4 << 20;  // bytes of one call: what is urgent waits for one at most
constexpr std::size_t kVectors = 64;

bool follows(const Read& a, const Read& b) {
  return a.direct == b.direct && a.buffered == b.buffered && a.offset + a.nbytes == b.offset;
}

bool aligned(const Read& r) {
  return r.offset % kPage == 0 && r.nbytes % kPage == 0 &&
         reinterpret_cast<uintptr_t>(r.to) % kPage == 0;
}

// The pieces of memory behind the first `done` bytes.
std::vector<iovec> rest(std::vector<iovec> all, int64_t done) {
  std::size_t first = 0;
  while (first < all.size() && done >= int64_t(all[first].iov_len))
    done -= int64_t(all[first++].iov_len);
  all.erase(all.begin(), all.begin() + first);
  if (!all.empty()) {
    all[0].iov_base = static_cast<char*>(all[0].iov_base) + done;
    all[0].iov_len -= std::size_t(done);
  }
  return all;
}

}  // namespace

Mover::Mover(int threads, int64_t most) : most_(most) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Mover::~Mover() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  queued_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int64_t Mover::submit(const std::vector<Read>& reads, bool ahead) {
  int64_t first;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (int64_t(open_.size() + reads.size()) > most_) return -1;
    first = next_;
    std::deque<Part>& queue = ahead ? ahead_ : now_;
    for (const Read& read : reads) {
      const int64_t ticket = next_++;
      State state{0, 0, 0, 0, false};
      for (int64_t at = 0; at < read.nbytes; at += kMost, ++state.parts)
        queue.push_back({ticket, {read.direct, read.buffered, read.offset + at,
                                  std::min(kMost, read.nbytes - at), read.to + at}});
      open_.emplace(ticket, state);
    }
    counts_.reads += int64_t(reads.size());
  }
  queued_.notify_all();
  return first;
}

Ending Mover::wait(int64_t ticket, double seconds) {
  const auto begun = std::chrono::steady_clock::now();
  const auto deadline = begun + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                    std::chrono::duration<double>(seconds));
  std::unique_lock<std::mutex> lock(mutex_);
  auto found = open_.find(ticket);
  if (found == open_.end()) return {Outcome::unknown, 0, 0};
  if (found->second.parts) {
    if (seconds <= 0) return {Outcome::late, 0, 0};  // who only looks has not waited
    ++counts_.waits;
    while (found->second.parts) {
      const bool late = ended_.wait_until(lock, deadline) == std::cv_status::timeout;
      found = open_.find(ticket);
      if (found == open_.end()) return {Outcome::cancelled, 0, 0};
      if (late && found->second.parts) break;
    }
    counts_.waited_ns += std::chrono::duration_cast<std::chrono::nanoseconds>(
                             std::chrono::steady_clock::now() - begun).count();
    if (found->second.parts) return {Outcome::late, 0, 0};
  }
  const State state = found->second;
  open_.erase(found);
  if (state.truncated) return {Outcome::truncated, state.at, 0};
  if (state.error) return {Outcome::failed, state.at, state.error};
  return {Outcome::done, 0, 0};
}

void Mover::promote(int64_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto mine = [ticket](const Part& part) { return part.ticket != ticket; };
  const auto first = std::stable_partition(ahead_.begin(), ahead_.end(), mine);
  now_.insert(now_.end(), first, ahead_.end());
  ahead_.erase(first, ahead_.end());
}

bool Mover::cancel(int64_t ticket) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(ticket);
    if (found == open_.end() || found->second.begun || !found->second.parts) return false;
    const auto mine = [ticket](const Part& part) { return part.ticket == ticket; };
    for (std::deque<Part>* queue : {&now_, &ahead_})
      queue->erase(std::remove_if(queue->begin(), queue->end(), mine), queue->end());
    open_.erase(found);
    ++counts_.cancelled;
  }
  ended_.notify_all();
  return true;
}

void Mover::work() {
  std::vector<Part> parts;
  while (take(parts)) run(parts);
}

// The next part and those behind it that follow it in the file, up to what one call reads.
bool Mover::take(std::vector<Part>& parts) {
  parts.clear();
  std::unique_lock<std::mutex> lock(mutex_);
  queued_.wait(lock, [this] { return stopping_ || !now_.empty() || !ahead_.empty(); });
  if (stopping_) return false;
  std::deque<Part>& queue = now_.empty() ? ahead_ : now_;
  int64_t nbytes = 0;
  do {
    nbytes += queue.front().read.nbytes;
    ++open_.at(queue.front().ticket).begun;
    parts.push_back(queue.front());
    queue.pop_front();
  } while (!queue.empty() && parts.size() < kVectors &&
           nbytes + queue.front().read.nbytes <= kMost &&
           follows(parts.back().read, queue.front().read));
  return true;
}

void Mover::run(const std::vector<Part>& parts) {
  std::vector<iovec> into;
  int64_t nbytes = 0;
  bool direct = parts[0].read.direct >= 0;
  for (const Part& part : parts) {
    into.push_back({part.read.to, std::size_t(part.read.nbytes)});
    nbytes += part.read.nbytes;
    direct = direct && aligned(part.read);
  }
  const Read& first = parts[0].read;
  int64_t got = 0;
  int error = 0;
  bool truncated = false, cached = false;
  while (got < nbytes) {
    // The end of a file is not a whole page, and what is behind it is for the other descriptor.
    const bool whole = direct && got % kPage == 0;
    const std::vector<iovec> left = rest(into, got);
    const ssize_t n = preadv(whole ? first.direct : first.buffered, left.data(),
                             int(left.size()), first.offset + got);
    ++counts_.calls;
    if (n > 0) {
      got += n;
      cached = cached || !whole;
    } else if (n == 0) {
      truncated = true;
      break;
    } else if (errno == EINVAL && whole) {
      direct = false;  // this file system, or its blocks, will not have it
    } else if (errno != EINTR) {
      error = errno;
      break;
    }
  }
  if (cached) {
    ++counts_.buffered;
    posix_fadvise(first.buffered, first.offset, nbytes, POSIX_FADV_DONTNEED);
  }
  counts_.bytes += got;
  end(parts, got, error, truncated);
}

void Mover::end(const std::vector<Part>& parts, int64_t got, int error, bool truncated) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t behind = 0;
    for (const Part& part : parts) {
      behind += part.read.nbytes;
      State& state = open_.at(part.ticket);
      --state.parts;
      if (behind <= got || state.error || state.truncated) continue;
      state.at = parts[0].read.offset + got;
      state.error = error;
      state.truncated = truncated;
    }
  }
  ended_.notify_all();
}

}  // namespace moeserve
