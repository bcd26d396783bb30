// Segments between ranks of several hosts, over one stream socket for every pair of ranks.
//
// A frame is a header and the bytes of a segment. There is no thread: every call writes what did not
// fit into the sockets before and reads what has come, straight to where it belongs; meanwhile the
// kernel moves what its buffers hold. So a round needs one message each way, and nobody waits for
// anything but bytes.
//
// Segments lie in areas [lane][parity][rank] that the caller owns: one set to send from, one to
// receive into. Two per lane suffice on both sides, by the argument in shm.cc: whoever begins round
// n + 2 has received round n + 1 of all, so all have received round n, and have begun n + 1.
//
// A ping is answered in any call: a rank that answers waits for another one, and is not late.
#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "module.h"

#ifdef __linux__
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

namespace nb = nanobind;

namespace moeserve {
namespace {

constexpr int kParities = 2;
constexpr uint32_t kPing = 0xFFFFFFFF;
constexpr uint32_t kPong = 0xFFFFFFFE;
constexpr size_t kStage = 64 << 10;

struct Header {
  uint32_t lane;
  uint32_t round;
  uint64_t length;
};
static_assert(sizeof(Header) == 16);

// What has not left yet: a header, then bytes that stay where they are.
struct Outgoing {
  Header header;
  const char* bytes;
  size_t done;  // of both together
  size_t total() const { return sizeof(Header) + header.length; }
};

struct Peer {
  int fd = -1;
  bool disconnected = false;
  bool answered = false;
  std::deque<Outgoing> out;
  Header header{};
  size_t header_got = 0;
  char* into = nullptr;  // where the segment of the header goes
  size_t left = 0;       // of it
  std::string violation;     // why it is disconnected, if it broke the rules
};

int64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

class Streams {
 public:
  // Addresses by [lane][parity][rank]; fds by rank, our own ignored.
  Streams(size_t rank, const std::vector<int>& fds, const std::vector<uint64_t>& lane_bytes,
          const std::vector<uintptr_t>& outgoing, const std::vector<uintptr_t>& incoming)
      : rank_(rank), world_(fds.size()), bytes_L_(lane_bytes), peers_(fds.size()),
        out_(outgoing), in_(incoming), begun_L_(lane_bytes.size(), 0),
        round_LR_(lane_bytes.size() * fds.size(), 0),
        length_(lane_bytes.size() * kParities * fds.size(), 0), stage_(kStage), polled_(fds.size()) {
    for (size_t r = 0; r < world_; ++r) {
      peers_[r].fd = r == rank ? -1 : fds[r];
      peers_[r].disconnected = r == rank;
    }
  }

  // The lane's next round; its parity.
  uint32_t begin(size_t lane) { return ++begun_L_.at(lane) & 1; }

  void send(size_t lane, const std::vector<uint64_t>& lengths) {
    nb::gil_scoped_release free;
    uint32_t round = begun_L_.at(lane);
    for (size_t r = 0; r < world_; ++r) {
      if (r == rank_) {
        arrive(lane, r, lengths.at(r));
        continue;
      }
      Header header{static_cast<uint32_t>(lane), round, lengths.at(r)};
      auto bytes = reinterpret_cast<const char*>(out_[at(lane, round & 1, r)]);
      peers_[r].out.push_back({header, bytes, 0});
      write(peers_[r]);
    }
  }

  // Lengths by rank; none where some are missing after so long, or can never come.
  std::vector<uint64_t> receive(size_t lane, int64_t ns) {
    nb::gil_scoped_release free;
    int64_t until = now_ns() + ns;
    poll_once(0);
    while (!complete(lane)) {
      int64_t left = until - now_ns();
      if (left <= 0 || can_never_complete(lane)) return {};
      poll_once(left);
    }
    std::vector<uint64_t> lengths(world_);
    for (size_t r = 0; r < world_; ++r) lengths[r] = length_[at(lane, begun_L_[lane] & 1, r)];
    return lengths;
  }

  std::vector<size_t> missing(size_t lane) const {
    std::vector<size_t> found;
    for (size_t r = 0; r < world_; ++r)
      if (!has_arrived(lane, r)) found.push_back(r);
    return found;
  }

  // Those whose connection has ended.
  std::vector<size_t> disconnected() const {
    std::vector<size_t> found;
    for (size_t r = 0; r < world_; ++r)
      if (r != rank_ && peers_[r].disconnected) found.push_back(r);
    return found;
  }

  // Why a connection was given up, where it broke the rules.
  std::string violation(size_t rank) const { return peers_.at(rank).violation; }

  // Ask all, wait so long: those who did not answer.
  std::vector<size_t> silent(int64_t ns) {
    nb::gil_scoped_release free;
    for (Peer& peer : peers_) {
      peer.answered = false;
      if (!peer.disconnected) send_control(peer, kPing);
    }
    int64_t until = now_ns() + ns;
    auto quiet = [&] {
      std::vector<size_t> found;
      for (size_t r = 0; r < world_; ++r)
        if (r != rank_ && !peers_[r].answered) found.push_back(r);
      return found;
    };
    for (int64_t left = ns; left > 0 && !quiet().empty(); left = until - now_ns()) poll_once(left);
    return quiet();
  }

 private:
  size_t at(size_t lane, size_t parity, size_t rank) const {
    return (lane * kParities + parity) * world_ + rank;
  }

  bool has_arrived(size_t lane, size_t r) const {
    return static_cast<int32_t>(round_LR_[lane * world_ + r] - begun_L_[lane]) >= 0;
  }

  bool complete(size_t lane) const {
    for (size_t r = 0; r < world_; ++r)
      if (!has_arrived(lane, r)) return false;
    return true;
  }

  bool can_never_complete(size_t lane) const {
    for (size_t r = 0; r < world_; ++r)
      if (peers_[r].disconnected && r != rank_ && !has_arrived(lane, r)) return true;
    return false;
  }

  void arrive(size_t lane, size_t r, uint64_t length) {
    uint32_t round = ++round_LR_[lane * world_ + r];
    length_[at(lane, round & 1, r)] = length;
  }

  // Sleep until something can be read or written, for so long at most; then do it.
  void poll_once(int64_t ns) {
    for (size_t r = 0; r < world_; ++r) {
      Peer& peer = peers_[r];
      short wanted = POLLIN | (peer.out.empty() ? 0 : POLLOUT);
      polled_[r] = {peer.disconnected ? -1 : peer.fd, wanted, 0};
    }
    timespec span{ns / 1000000000, ns % 1000000000};
    if (ppoll(polled_.data(), world_, &span, nullptr) <= 0) return;
    for (size_t r = 0; r < world_; ++r) {
      short found = polled_[r].revents;
      if (found & (POLLIN | POLLHUP | POLLERR)) read(r);
      if (!peers_[r].disconnected && (found & POLLOUT)) write(peers_[r]);
    }
  }

  void send_control(Peer& peer, uint32_t word) {
    peer.out.push_back({{word, 0, 0}, nullptr, 0});
    write(peer);
  }

  void write(Peer& peer) {
    while (!peer.disconnected && !peer.out.empty()) {
      Outgoing& one = peer.out.front();
      iovec parts[2];
      int count = 0;
      size_t of_header = std::min(one.done, sizeof(Header));
      if (of_header < sizeof(Header))
        parts[count++] = {reinterpret_cast<char*>(&one.header) + of_header,
                          sizeof(Header) - of_header};
      size_t sent = one.done - of_header;
      if (sent < one.header.length)
        parts[count++] = {const_cast<char*>(one.bytes) + sent, one.header.length - sent};
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = count;
      ssize_t n = sendmsg(peer.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) drop(peer);
        return;
      }
      one.done += n;
      if (one.done < one.total()) return;
      peer.out.pop_front();
    }
  }

  // Everything that has come from a rank. A dropped peer may have been read to its end before.
  void read(size_t r) {
    Peer& peer = peers_[r];
    while (!peer.disconnected) {
      bool direct = peer.left >= kStage;
      char* where = direct ? peer.into : stage_.data();
      size_t room = direct ? peer.left : kStage;
      ssize_t n = recv(peer.fd, where, room, MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
      if (n <= 0) return drop(peer);
      if (direct) {
        peer.into += n;
        peer.left -= n;
        if (peer.left == 0) arrive(peer.header.lane, r, peer.header.length);
      } else {
        unpack(r, stage_.data(), n);
      }
      if (static_cast<size_t>(n) < room) return;  // poll will tell of more
    }
  }

  void unpack(size_t r, const char* bytes, size_t count) {
    Peer& peer = peers_[r];
    while (count > 0 && !peer.disconnected) {
      if (peer.left > 0) {
        size_t n = std::min(count, peer.left);
        std::memcpy(peer.into, bytes, n);
        peer.into += n;
        peer.left -= n;
        bytes += n;
        count -= n;
        if (peer.left == 0) arrive(peer.header.lane, r, peer.header.length);
        continue;
      }
      size_t n = std::min(count, sizeof(Header) - peer.header_got);
      std::memcpy(reinterpret_cast<char*>(&peer.header) + peer.header_got, bytes, n);
      peer.header_got += n;
      bytes += n;
      count -= n;
      if (peer.header_got == sizeof(Header)) {
        peer.header_got = 0;
        begin_segment(r);
      }
    }
  }

  void begin_segment(size_t r) {
    Peer& peer = peers_[r];
    const Header& header = peer.header;
    if (header.lane == kPing) return send_control(peer, kPong);
    if (header.lane == kPong) {
      peer.answered = true;
      return;
    }
    if (header.lane >= bytes_L_.size() || header.length > bytes_L_[header.lane] ||
        header.round != round_LR_[header.lane * world_ + r] + 1) {
      peer.violation = "it sent round " + std::to_string(header.round) + " of lane " +
                   std::to_string(header.lane) + " with " + std::to_string(header.length) +
                   " bytes out of turn";
      return drop(peer);
    }
    peer.into = reinterpret_cast<char*>(in_[at(header.lane, header.round & 1, r)]);
    peer.left = header.length;
    if (peer.left == 0) arrive(header.lane, r, 0);
  }

  void drop(Peer& peer) {
    peer.disconnected = true;
    peer.out.clear();
  }

  size_t rank_, world_;
  std::vector<uint64_t> bytes_L_;
  std::vector<Peer> peers_;
  std::vector<uintptr_t> out_, in_;
  std::vector<uint32_t> begun_L_, round_LR_;
  std::vector<uint64_t> length_;
  std::vector<char> stage_;
  std::vector<pollfd> polled_;
};

}  // namespace

void bind_tcp(nb::module_& m) {
  nb::class_<Streams>(m, "Streams")
      .def(nb::init<size_t, const std::vector<int>&, const std::vector<uint64_t>&,
                    const std::vector<uintptr_t>&, const std::vector<uintptr_t>&>())
      .def("begin", &Streams::begin)
      .def("send", &Streams::send)
      .def("receive", &Streams::receive)
      .def("missing", &Streams::missing)
      .def("disconnected", &Streams::disconnected)
      .def("violation", &Streams::violation)
      .def("silent", &Streams::silent);
}

}  // namespace moeserve

#else

namespace moeserve {
void bind_tcp(nanobind::module_&) {}
}  // namespace moeserve

#endif
