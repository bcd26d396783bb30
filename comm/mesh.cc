// What the ranks of a run agree on, and that they live: rounds, wake-ups, heartbeats, alarms.
//
// Rank r of R has a stream to each rank r + 2^i and from each rank r - 2^i (mod R), for 2^i < R. One
// thread per rank reads and writes them; it never needs the interpreter, so that a frozen one does
// not look like a dead rank. Python's threads only change what lies under the lock and wake it.
//
// A round is an all-gather of one record of every rank by Bruck's algorithm (Bruck et al. 1997,
// "Efficient algorithms for all-to-all communications in multiport message-passing systems"): in
// step i a rank sends the records of ranks r, r - 1, ... that it has, at most 2^i, to r + 2^i. So
// it sends ceil(log2 R) messages and (R - 1) records. Step i leaves when steps 0 .. i - 1 have come.
//
// Two sets of records suffice. Whoever posts round n + 1 has collected round n, which holds the
// record of every rank; so a rank that waits for round n hears of round n + 1 at most, and one that
// posts round n has collected round n - 1, whose set is then for round n + 1.
//
// Other messages go to all ranks: each rank passes on what it has not heard before. A message is a
// header and a body whose length is bounded by its kind; whoever breaks that is cut off.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "module.h"
#include "silence.h"

#ifdef __linux__
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

namespace nb = nanobind;

namespace moeserve {
namespace {

using Lock = std::unique_lock<std::mutex>;

constexpr size_t kStage = 64 << 10;
constexpr size_t kLongestActivity = 200;
constexpr size_t kLongestReason = 4096;
constexpr size_t kMostBlamed = 1024;
constexpr int64_t kSecond = 1000000000;
// A rank that was not idle tells of its round after so long, if the round is still open: ranks that
// are all busy need no telling.
constexpr int64_t kTellAfter = kSecond / 1000;
// What has not left when the mesh is closed gets so long.
constexpr int64_t kLinger = kSecond / 2;

enum Kind : uint32_t {
  kRound = 1,  // number: the round; body: the records of step i, on the stream of that step
  kBegun,      // number: a round that some rank has posted
  kBeat,       // body: what the sender is doing
  kAlarm,      // body: number of blamed ranks, these, the reason
  kEnd,        // the run is over
  kStop,       // some rank has to stop
  kAsk,        // number: a round; body: Question
  kAbsent,     // number: a round; body: Answer
};

struct Header {
  uint32_t kind;
  uint32_t length;
  uint64_t number;
};
static_assert(sizeof(Header) == 16);

// Who has not posted a round? Asked by a rank, for the n-th time.
struct Question {
  uint32_t asker;
  uint32_t sequence;
};

struct Answer {
  Question question;
  uint32_t rank;
};

int64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

double seconds(int64_t ns) { return static_cast<double>(ns) * 1e-9; }

// At most so many bytes, not ending within a character of UTF-8.
std::string shortened(const std::string& text, size_t most) {
  if (text.size() <= most) return text;
  while (most > 0 && (static_cast<uint8_t>(text[most]) & 0xC0) == 0x80) --most;
  return text.substr(0, most);
}

struct Stream {
  int fd;
  uint32_t rank;
  size_t step;   // 2^step ranks away
  bool dialled;  // to r + 2^step; else from r - 2^step
  bool open = true;
  std::string activity = "nothing yet";
  std::vector<char> out{};     // under the lock: to be written
  std::vector<char> wire{};    // of the thread: being written
  size_t written = 0;          // of wire
  std::vector<char> in{};      // of the thread: read and not handled
  std::string failure{};       // of the thread: why the stream ended
  uint64_t round = 0;          // the last that came here
  uint64_t begun = 0;          // the last that the rank is known to know of
};

struct Round {
  explicit Round(size_t bytes, size_t steps) : records(bytes), came(steps, false) {}
  void clear() {
    std::fill(came.begin(), came.end(), false);
    sent = prefix = 0;
    done = false;
  }
  std::vector<char> records;  // in order of ranks
  std::vector<bool> came;     // by step
  size_t sent = 0;            // steps
  size_t prefix = 0;          // steps that came, without a gap
  bool done = false;
};

struct Inquiry {
  uint32_t sequence = 0;
  bool asked = false;
  std::set<uint32_t> absent{};
};

struct Counters {
  uint64_t rounds = 0, round_messages = 0, round_bytes = 0, other_messages = 0, other_bytes = 0;
};

class Mesh {
 public:
  // Owns the connected sockets: dialled[i] to rank + 2^i, accepted[i] from rank - 2^i. names[r] is
  // what texts and alarms call rank r. news is a descriptor to which something is written when there
  // is an alarm, when a rank has to stop, and on closing; the mesh keeps a copy of its own.
  Mesh(uint32_t rank, const std::vector<uint32_t>& names, size_t record_bytes,
       const std::vector<int>& dialled, const std::vector<int>& accepted, double limit_s,
       double period_s, int news)
      : rank_(rank), world_(names.size()), names_(names), record_bytes_(record_bytes),
        steps_(dialled.size()), limit_s_(limit_s), period_s_(period_s),
        news_(fcntl(news, F_DUPFD_CLOEXEC, 0)), event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), stage_(kStage) {
    if (event_ < 0 || news_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    for (size_t i = 0; i < steps_; ++i) {
      size_t distance = size_t{1} << i;
      streams_.push_back({dialled[i], back(world_ - distance), i, true});
      streams_.push_back({accepted.at(i), back(distance), i, false});
    }
    for (int parity = 0; parity < 2; ++parity)
      rounds_.emplace_back(world_ * record_bytes, steps_);
    polled_.resize(streams_.size() + 1);
    start();
  }

  ~Mesh() { close(); }

  // Everybody is connected: from now on silence counts, and rounds are counted.
  void watch() {
    Lock lock(mutex_);
    first_ = posted_;
    counters_ = {};
    std::vector<uint32_t> ranks;
    for (const Stream& stream : streams_) ranks.push_back(stream.rank);
    silence_ = std::make_unique<Silence>(ranks, seconds(now_ns()), limit_s_, period_s_);
  }

  void post(nb::bytes record) {
    if (record.size() != record_bytes_) throw std::invalid_argument("a record of another size");
    const char* bytes = record.c_str();
    nb::gil_scoped_release free;
    Lock lock(mutex_);
    if (posted_ != collected_) throw std::logic_error("the last round was not collected");
    at(posted_).clear();  // as the set of the round after this one
    ++posted_;
    Round& round = at(posted_);
    std::memcpy(round.records.data() + rank_ * record_bytes_, bytes, record_bytes_);
    tell_at_ = now_ns() + (was_idle_ ? 0 : kTellAfter);
    was_idle_ = false;
    advance();
    kick();
  }

  // The records of the posted round in order of ranks; None where it is not complete after so long,
  // or at once where there is an alarm or it can never be.
  nb::object collect(int64_t ns) {
    bool done = false;
    {
      nb::gil_scoped_release free;
      Lock lock(mutex_);
      if (posted_ == collected_) throw std::logic_error("no round was posted");
      wait(lock, ns, [&] { return at(posted_).done || alarmed_ || closing_ || cut_off(); });
      done = at(posted_).done;
      if (done) collected_ = posted_;
    }
    if (!done) return nb::none();
    // Nobody writes to this set before this thread posts again.
    const std::vector<char>& records = at(posted_).records;
    return nb::bytes(records.data(), records.size());
  }

  // Ranks whose record of the posted round has not come.
  std::vector<uint32_t> missing() {
    Lock lock(mutex_);
    Round& round = at(posted_);
    std::vector<uint32_t> found;
    for (size_t i = 0; i < steps_; ++i)
      for (size_t j = 0; j < count(i) && !round.came[i]; ++j)
        found.push_back(back((size_t{1} << i) + j));
    std::sort(found.begin(), found.end());
    return found;
  }

  // Ask all who has not posted this rank's round; who has answered after so long, or sooner if
  // there is nothing to wait for any more.
  std::vector<uint32_t> absent(int64_t ns) {
    nb::gil_scoped_release free;
    Lock lock(mutex_);
    Inquiry& inquiry = inquiries_[rank_];
    inquiry = {inquiry.sequence + 1, true, {}};
    Question question{rank_, inquiry.sequence};
    flood(kAsk, posted_, &question, sizeof question);
    kick();
    wait(lock, ns, [&] { return at(posted_).done || alarmed_ || closing_; });
    return {inquiry.absent.begin(), inquiry.absent.end()};
  }

  // Whether another rank has begun the round that this one has not posted; false after so long,
  // when woken, or where there is an alarm or the end.
  bool wait_begun(int64_t ns) {
    nb::gil_scoped_release free;
    Lock lock(mutex_);
    was_idle_ = true;
    auto begun = [&] { return begun_ > posted_; };
    wait(lock, ns, [&] { return begun() || woken_ || alarmed_ || ended_ || closing_; });
    if (begun() && !alarmed_) return true;
    woken_ = false;
    return false;
  }

  void wake() {
    Lock lock(mutex_);
    woken_ = true;
    changed_.notify_all();
  }

  void set_activity(const std::string& text) {
    Lock lock(mutex_);
    activity_ = shortened(text, kLongestActivity);
  }

  void fail(const std::string& reason, const std::vector<uint32_t>& ranks) {
    Lock lock(mutex_);
    raise(shortened(reason, kLongestReason), ranks);
    kick();
  }

  void end() {
    Lock lock(mutex_);
    if (alarmed_ || ended_) return;
    conclude(nullptr);
    kick();
  }

  void ask_to_stop() {
    Lock lock(mutex_);
    stop(nullptr);
    kick();
  }

  // Reason and blamed ranks, or None.
  nb::object alarm() {
    if (!alarmed_) return nb::none();
    Lock lock(mutex_);
    return nb::make_tuple(nb::bytes(reason_.data(), reason_.size()), nb::cast(blamed_));
  }

  bool ended() const { return ended_; }
  bool stop_asked() const { return stop_asked_; }

  uint64_t posted() {
    Lock lock(mutex_);
    return posted_ - first_;
  }

  std::vector<uint64_t> counters() {
    Lock lock(mutex_);
    const Counters& c = counters_;
    return {c.rounds, c.round_messages, c.round_bytes, c.other_messages, c.other_bytes};
  }

  void close() {
    nb::gil_scoped_release free;
    {
      Lock lock(mutex_);
      if (!closing_) close_by_ = now_ns() + kLinger;
      closing_ = true;
      changed_.notify_all();
      tell_news();
      kick();
    }
    std::lock_guard<std::mutex> one(join_mutex_);
    if (!thread_.joinable()) return;
    thread_.join();
    Lock lock(mutex_);
    for (int* fd : {&event_, &news_}) {
      ::close(*fd);
      *fd = -1;  // to which writing does nothing
    }
  }

 private:
  // ---- What follows down to the thread is called under the lock.

  Round& at(uint64_t round) { return rounds_[round & 1]; }

  // How many records step i carries.
  size_t count(size_t step) const {
    size_t distance = size_t{1} << step;
    return std::min(distance, world_ - distance);
  }

  // The rank so far behind this one.
  uint32_t back(size_t distance) const {
    return static_cast<uint32_t>((rank_ + world_ - distance % world_) % world_);
  }

  template <typename Ready>
  void wait(Lock& lock, int64_t ns, Ready ready) {
    auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(ns);
    changed_.wait_until(lock, until, ready);
  }

  void kick() {
    uint64_t one = 1;
    [[maybe_unused]] ssize_t n = write(event_, &one, sizeof one);  // full: it is raised already
  }

  void tell_news() {
    uint64_t one = 1;
    [[maybe_unused]] ssize_t n = write(news_, &one, sizeof one);
  }

  void put(Stream& stream, Kind kind, uint64_t number, const void* body, size_t length) {
    if (!stream.open) return;
    Header header{kind, static_cast<uint32_t>(length), number};
    auto bytes = reinterpret_cast<const char*>(&header);
    stream.out.insert(stream.out.end(), bytes, bytes + sizeof header);
    bytes = static_cast<const char*>(body);
    if (length > 0) stream.out.insert(stream.out.end(), bytes, bytes + length);
    bool of_round = kind == kRound;
    ++(of_round ? counters_.round_messages : counters_.other_messages);
    (of_round ? counters_.round_bytes : counters_.other_bytes) += sizeof header + length;
  }

  void flood(Kind kind, uint64_t number, const void* body, size_t length,
             const Stream* except = nullptr) {
    for (Stream& stream : streams_)
      if (&stream != except) put(stream, kind, number, body, length);
  }

  // Send the steps of the posted round that may leave; see whether it is complete.
  void advance() {
    Round& round = at(posted_);
    if (posted_ == collected_ || round.done) return;
    while (round.prefix < steps_ && round.came[round.prefix]) ++round.prefix;
    for (; round.sent < steps_ && round.sent <= round.prefix; ++round.sent) send_step(round);
    if (round.prefix < steps_) return;
    round.done = true;
    tell_at_ = 0;
    ++counters_.rounds;
    changed_.notify_all();
  }

  void send_step(const Round& round) {
    size_t n = count(round.sent);
    joined_.resize(n * record_bytes_);
    for (size_t j = 0; j < n; ++j)
      std::memcpy(joined_.data() + j * record_bytes_,
                  round.records.data() + back(j) * record_bytes_, record_bytes_);
    put(streams_[2 * round.sent], kRound, posted_, joined_.data(), joined_.size());
  }

  void take_step(Stream& stream, uint64_t number, const char* body) {
    stream.round = number;
    Round& round = at(number);
    for (size_t j = 0; j < count(stream.step); ++j)
      std::memcpy(round.records.data() + back((size_t{1} << stream.step) + j) * record_bytes_,
                  body + j * record_bytes_, record_bytes_);
    round.came[stream.step] = true;
    heard_of(stream, number);
    advance();
  }

  void heard_of(Stream& stream, uint64_t number) {
    stream.begun = std::max(stream.begun, number);
    if (number <= begun_) return;
    begun_ = number;
    changed_.notify_all();
  }

  // Tell of a round once, those who may not know of it.
  void tell_of(uint64_t number) {
    if (told_ >= number) return;
    told_ = number;
    for (Stream& stream : streams_)
      if (stream.begun < number) put(stream, kBegun, number, nullptr, 0);
  }

  // Complete: the streams may have ended, what is needed has come. Cut off: it can never come.
  bool cut_off() {
    if (!ended_) return false;
    Round& round = at(posted_);
    for (const Stream& stream : streams_)
      if (!stream.dialled && !stream.open && !round.came[stream.step]) return true;
    return false;
  }

  // The first alarm is the one that counts; after the end there is none.
  void raise(const std::string& reason, std::vector<uint32_t> ranks,
             const Stream* except = nullptr) {
    if (alarmed_ || ended_) return;
    ranks.resize(std::min(ranks.size(), kMostBlamed));
    reason_ = reason;
    blamed_ = ranks;
    alarmed_ = true;
    uint32_t count = ranks.size();
    std::string body(reinterpret_cast<const char*>(&count), sizeof count);
    body.append(reinterpret_cast<const char*>(ranks.data()), ranks.size() * sizeof(uint32_t));
    body += reason;
    flood(kAlarm, 0, body.data(), body.size(), except);
    changed_.notify_all();
    tell_news();
  }

  void conclude(const Stream* from) {
    if (ended_) return;
    ended_ = true;
    flood(kEnd, 0, nullptr, 0, from);
    changed_.notify_all();
  }

  void stop(const Stream* from) {
    if (stop_asked_) return;
    stop_asked_ = true;
    flood(kStop, 0, nullptr, 0, from);
    tell_news();
  }

  std::string name(uint32_t rank) const { return "rank " + std::to_string(names_[rank]); }

  std::string last_heard(uint32_t rank) const {
    std::string doing = "nothing yet";
    for (const Stream& stream : streams_)
      if (stream.rank == rank && stream.activity != "nothing yet") doing = stream.activity;
    return name(rank) + " was last heard doing: " + doing;
  }

  // ---- Messages: under the lock.

  // Why a message with this header may not be, or nothing.
  std::string fault(const Stream& stream, const Header& header) const {
    auto [kind, length, number] = header;
    auto sent = [&](const std::string& what) { return "it sent " + what; };
    auto bytes = [&, length = length](const char* of) {
      return sent(std::string(of) + " of " + std::to_string(length) + " bytes");
    };
    auto out_of_turn = [&, number = number](const char* what) {
      return sent(std::string(what) + " " + std::to_string(number) + " while this one is at " +
                  std::to_string(posted_));
    };
    switch (kind) {
      case kRound:
        if (stream.dialled) return sent("records on a stream that has none");
        if (length != count(stream.step) * record_bytes_) return bytes("records");
        if (number != stream.round + 1 || number > posted_ + 1) return out_of_turn("round");
        return "";
      case kBegun:
        if (length != 0) return bytes("word of a round");
        return number > posted_ + 1 ? out_of_turn("word of round") : "";
      case kBeat:
        return length > kLongestActivity ? bytes("a heartbeat") : "";
      case kAlarm: {
        bool fits = length >= 4 && length <= 4 + 4 * kMostBlamed + kLongestReason;
        return fits ? "" : bytes("an alarm");
      }
      case kEnd:
      case kStop:
        return length != 0 ? bytes("the end") : "";
      case kAsk:
        if (length != sizeof(Question)) return bytes("a question");
        return number > posted_ + 1 ? out_of_turn("a question about round") : "";
      case kAbsent:
        return length != sizeof(Answer) ? bytes("an answer") : "";
      default:
        return sent("a message of unknown kind " + std::to_string(kind));
    }
  }

  void handle(Stream& stream, const Header& header, const char* body) {
    switch (header.kind) {
      case kRound:
        return take_step(stream, header.number, body);
      case kBegun:
        heard_of(stream, header.number);
        return header.number > posted_ ? tell_of(header.number) : void();
      case kBeat:
        stream.activity.assign(body, header.length);
        return;
      case kAlarm:
        return handle_alarm(stream, body, header.length);
      case kEnd:
        return conclude(&stream);
      case kStop:
        return stop(&stream);
      case kAsk:
        return handle_question(stream, header.number, body);
      case kAbsent:
        return handle_answer(stream, header.number, body);
    }
  }

  void handle_alarm(Stream& stream, const char* body, size_t length) {
    uint32_t count = 0;
    std::memcpy(&count, body, sizeof count);
    size_t begin = sizeof count + count * sizeof(uint32_t);
    if (count > kMostBlamed || begin > length) {
      stream.failure = "it sent an alarm about " + std::to_string(count) + " ranks";
      return;
    }
    std::vector<uint32_t> ranks(count);
    if (count > 0) std::memcpy(ranks.data(), body + sizeof count, count * sizeof(uint32_t));
    raise(shortened({body + begin, length - begin}, kLongestReason), ranks, &stream);
  }

  void handle_question(Stream& stream, uint64_t round, const char* body) {
    Question question{};
    std::memcpy(&question, body, sizeof question);
    if (question.asker >= world_) {
      stream.failure = "it sent a question of rank " + std::to_string(question.asker);
      return;
    }
    Inquiry* inquiry = newest(question);
    if (inquiry == nullptr || inquiry->asked) return;
    inquiry->asked = true;
    flood(kAsk, round, body, sizeof question, &stream);
    if (posted_ >= round) return;
    inquiry->absent.insert(rank_);
    Answer answer{question, rank_};
    flood(kAbsent, round, &answer, sizeof answer);
  }

  void handle_answer(Stream& stream, uint64_t round, const char* body) {
    Answer answer{};
    std::memcpy(&answer, body, sizeof answer);
    if (answer.question.asker >= world_ || answer.rank >= world_) {
      stream.failure = "it sent an answer of rank " + std::to_string(answer.rank);
      return;
    }
    Inquiry* inquiry = newest(answer.question);
    if (inquiry == nullptr || !inquiry->absent.insert(answer.rank).second) return;
    if (answer.question.asker != rank_)
      flood(kAbsent, round, body, sizeof answer, &stream);
  }

  // What is known of a question; null where its asker has asked again since.
  Inquiry* newest(const Question& question) {
    Inquiry& inquiry = inquiries_[question.asker];
    if (question.sequence < inquiry.sequence) return nullptr;
    if (question.sequence > inquiry.sequence) inquiry = {question.sequence, false, {}};
    return &inquiry;
  }

  // Everything that was read; then the streams that have ended, for their last words count.
  void handle_all(int64_t now) {
    for (Stream& stream : streams_) handle_stream(stream, now);
    for (Stream& stream : streams_) {
      if (!stream.open || stream.failure.empty()) continue;
      stream.open = false;
      stream.out.clear();
      shutdown(stream.fd, SHUT_RDWR);
      std::string reason = name(stream.rank) + " is gone (" + stream.failure + "); " +
                           last_heard(stream.rank);
      if (!closing_) raise(reason, {names_[stream.rank]});
      changed_.notify_all();
    }
  }

  void handle_stream(Stream& stream, int64_t now) {
    size_t done = 0, have = stream.in.size();
    if (have > 0 && silence_) silence_->record(stream.rank, seconds(now));
    while (stream.open && have - done >= sizeof(Header)) {
      Header header{};
      std::memcpy(&header, stream.in.data() + done, sizeof header);
      std::string why = fault(stream, header);
      if (!why.empty()) {
        stream.failure = why;
        break;
      }
      if (have - done < sizeof header + header.length) break;
      handle(stream, header, stream.in.data() + done + sizeof header);
      done += sizeof header + header.length;
    }
    stream.in.erase(stream.in.begin(), stream.in.begin() + done);
  }

  // Whatever is due; when something will be next.
  int64_t tick(int64_t now) {
    if (now >= beat_at_) {
      for (Stream& stream : streams_)
        if (stream.out.empty() && stream.wire.empty())
          put(stream, kBeat, 0, activity_.data(), activity_.size());
      beat_at_ = now + static_cast<int64_t>(period_s_ * 1e9);
    }
    if (now >= look_at_) {
      look_at_ = now + static_cast<int64_t>(period_s_ * 0.5e9);
      if (silence_ && !ended_ && !closing_)
        for (auto [rank, silent_s] : silence_->late(seconds(now))) complain(rank, silent_s);
    }
    if (tell_at_ != 0 && now >= tell_at_) {
      tell_at_ = 0;
      if (!at(posted_).done) tell_of(posted_);
    }
    int64_t next = std::min(beat_at_, look_at_);
    return tell_at_ == 0 ? next : std::min(next, tell_at_);
  }

  void complain(uint32_t rank, double silent_s) {
    char text[64];
    std::snprintf(text, sizeof text, " has been silent for %.1f s; ", silent_s);
    raise(name(rank) + text + last_heard(rank), {names_[rank]});
  }

  bool nothing_to_write() const {
    return std::all_of(streams_.begin(), streams_.end(), [](const Stream& stream) {
      return !stream.open || (stream.out.empty() && stream.wire.empty());
    });
  }

  // ---- The thread: without the lock, but where it takes it.

  void start() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the interpreter's threads
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "moeserve-mesh");
  }

  void run() {
    while (true) {
      int64_t next = 0;
      {
        Lock lock(mutex_);
        int64_t now = now_ns();
        next = tick(now);
        if (closing_ && (nothing_to_write() || now >= close_by_)) break;
        if (closing_) next = std::min(next, close_by_);
        for (Stream& stream : streams_) {
          stream.wire.insert(stream.wire.end(), stream.out.begin(), stream.out.end());
          stream.out.clear();
        }
      }
      for (Stream& stream : streams_) write_some(stream);
      poll_until(next);
      Lock lock(mutex_);
      handle_all(now_ns());
    }
    for (Stream& stream : streams_) {
      shutdown(stream.fd, SHUT_WR);
      read_some(stream);  // what is unread would turn the end into a reset
      ::close(stream.fd);
    }
  }

  // Until something was read, can be written, or is due.
  void poll_until(int64_t next) {
    size_t n = streams_.size();
    for (size_t i = 0; i < n; ++i) {
      const Stream& stream = streams_[i];
      short wanted = POLLIN | (stream.wire.empty() ? 0 : POLLOUT);
      polled_[i] = {stream.open ? stream.fd : -1, wanted, 0};
    }
    polled_[n] = {event_, POLLIN, 0};
    int64_t left = std::max<int64_t>(0, next - now_ns());
    timespec span{left / kSecond, left % kSecond};
    if (ppoll(polled_.data(), polled_.size(), &span, nullptr) <= 0) return;
    uint64_t kicks;
    if (polled_[n].revents != 0) [[maybe_unused]] ssize_t r = ::read(event_, &kicks, sizeof kicks);
    for (size_t i = 0; i < n; ++i)
      if (polled_[i].revents & (POLLIN | POLLHUP | POLLERR)) read_some(streams_[i]);
  }

  void write_some(Stream& stream) {
    while (stream.open && stream.written < stream.wire.size()) {
      ssize_t n = send(stream.fd, stream.wire.data() + stream.written,
                       stream.wire.size() - stream.written, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
      if (n < 0) break;  // reading will tell why, after the last words
      stream.written += n;
    }
    stream.wire.clear();
    stream.written = 0;
  }

  void read_some(Stream& stream) {
    while (stream.open && stream.failure.empty()) {
      ssize_t n = recv(stream.fd, stage_.data(), stage_.size(), MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
      if (n == 0) stream.failure = "the connection was closed";
      if (n < 0) stream.failure = std::generic_category().message(errno);
      if (n <= 0) return;
      stream.in.insert(stream.in.end(), stage_.data(), stage_.data() + n);
      if (static_cast<size_t>(n) < stage_.size()) return;  // poll will tell of more
    }
  }

  const uint32_t rank_;
  const size_t world_;
  const std::vector<uint32_t> names_;
  const size_t record_bytes_, steps_;
  const double limit_s_, period_s_;
  int news_, event_;

  std::mutex mutex_, join_mutex_;
  std::condition_variable changed_;
  std::vector<Stream> streams_;  // of step i: dialled at 2 i, accepted at 2 i + 1
  std::vector<Round> rounds_;    // by parity
  uint64_t posted_ = 0, collected_ = 0;  // numbers of rounds
  uint64_t first_ = 0;  // the last before rounds were counted
  uint64_t begun_ = 0, told_ = 0;  // the last round heard of, and told of
  int64_t tell_at_ = 0, beat_at_ = 0, look_at_ = 0, close_by_ = 0;
  bool was_idle_ = false, woken_ = false;
  std::atomic<bool> alarmed_{false}, ended_{false}, stop_asked_{false}, closing_{false};
  std::string reason_, activity_ = "starting";
  std::vector<uint32_t> blamed_;
  std::map<uint32_t, Inquiry> inquiries_;  // by asker
  std::unique_ptr<Silence> silence_;
  Counters counters_;
  std::vector<char> joined_;

  std::vector<char> stage_;  // of the thread
  std::vector<pollfd> polled_;
  std::thread thread_;
};

}  // namespace

void bind_mesh(nb::module_& m) {
  nb::class_<Silence>(m, "Silence")
      .def(nb::init<const std::vector<uint32_t>&, double, double, double>())
      .def("record", &Silence::record)
      .def("late", &Silence::late);
  nb::class_<Mesh>(m, "Mesh")
      .def(nb::init<uint32_t, const std::vector<uint32_t>&, size_t, const std::vector<int>&,
                    const std::vector<int>&, double, double, int>())
      .def("watch", &Mesh::watch)
      .def("post", &Mesh::post)
      .def("collect", &Mesh::collect)
      .def("missing", &Mesh::missing)
      .def("absent", &Mesh::absent)
      .def("wait_begun", &Mesh::wait_begun)
      .def("wake", &Mesh::wake)
      .def("set_activity", &Mesh::set_activity)
      .def("fail", &Mesh::fail)
      .def("end", &Mesh::end)
      .def("ask_to_stop", &Mesh::ask_to_stop)
      .def("alarm", &Mesh::alarm)
      .def("ended", &Mesh::ended)
      .def("stop_asked", &Mesh::stop_asked)
      .def("posted", &Mesh::posted)
      .def("counters", &Mesh::counters)
      .def("close", &Mesh::close);
}

}  // namespace moeserve

#else

namespace moeserve {
void bind_mesh(nanobind::module_&) {}
}  // namespace moeserve

#endif
