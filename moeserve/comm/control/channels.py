"""The star around rank 0: orders of steps go out, reports come back, heartbeats both ways.

Two connections from each rank to rank 0: one for steps, used by the thread that runs them and by
nobody else, so that a step costs one message down and one up and no change of threads; one for
heartbeats. On one host they run over loopback; beyond it a secret or TLS is required
(``link.Trust``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import time
from collections.abc import Mapping

from moeserve.comm.control.heartbeat import Heartbeat
from moeserve.comm.control.link import SLICE_S, Link, Trust, accept, connect
from moeserve.comm.group import NOTICE_S, START_S, Group, named
from moeserve.errors import ConfigError, LateRankError, MoeserveError, UnauthenticatedError
from moeserve.pb import ep_pb2 as pb

log = logging.getLogger(__name__)

CONNECT_S = 5.0
# An order that is none: the run is over.
_END = b""


class Leader:
    """Rank 0's end. ``send`` and ``receive`` belong to the thread that runs the steps."""

    def __init__(self, steps: Mapping[int, Link], heartbeat: Heartbeat, deadline_s: float) -> None:
        self.heartbeat = heartbeat
        self.deadline_s = deadline_s
        self._steps = dict(steps)

    def alarm(self) -> LateRankError | None:
        return self.heartbeat.alarm()

    def send(self, rank: int, message: bytes) -> None:
        """An order, which is never empty. LateRankError where the rank does not take it."""
        assert message, "an empty message is the end"
        self._raise_alarm()
        try:
            self._steps[rank].send(message, self.deadline_s)
        except OSError as error:
            raise self.heartbeat.blame(rank, f"takes no orders ({error})") from error

    def receive(self, rank: int, timeout_s: float) -> bytes:
        """Its next report; LateRankError where none comes, or at once when there is an alarm."""
        try:
            return self._steps[rank].receive(timeout_s, self._raise_alarm)
        except OSError as error:
            raise self.heartbeat.blame(rank, f"has not reported ({error})") from error

    def fail(self, error: MoeserveError) -> None:
        """Rank 0 cannot go on: all others are to end with the reason."""
        self.heartbeat.fail(f"rank 0 failed: {error.message}", getattr(error, "ranks", (0,)))

    def close(self, clean: bool = True) -> None:
        """End the run; the others end well, unless something failed."""
        if clean:
            self.heartbeat.end()
        for link in self._steps.values():
            with contextlib.suppress(OSError):  # then it has ended already
                if clean:
                    link.send(_END, SLICE_S)
            link.close()
        self.heartbeat.close()

    def _raise_alarm(self) -> None:
        if (alarm := self.heartbeat.alarm()) is not None:
            raise alarm


class Follower:
    """Every other rank's end."""

    def __init__(self, rank: int, steps: Link, heartbeat: Heartbeat, deadline_s: float) -> None:
        self.rank = rank
        self.heartbeat = heartbeat
        self.deadline_s = deadline_s
        self._steps = steps

    def alarm(self) -> LateRankError | None:
        return self.heartbeat.alarm()

    def send(self, message: bytes) -> None:
        self._raise_alarm()
        try:
            self._steps.send(message, self.deadline_s)
        except OSError as error:
            raise self.heartbeat.blame(0, f"takes no reports ({error})") from error

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """The next order, None when the run is over; LateRankError when there is an alarm.

        Without a timeout it waits as long as rank 0 lives: it has nothing to do.
        """
        try:
            return self._steps.receive(timeout_s, self._raise_alarm) or None
        except OSError as error:
            if self.heartbeat.ended:
                return None
            raise self.heartbeat.blame(0, f"gives no orders ({error})") from error

    def fail(self, error: MoeserveError) -> None:
        """This rank cannot go on: the group is to end with the reason."""
        reason = f"rank {self.rank} failed: {error.message}"
        self.heartbeat.fail(reason, getattr(error, "ranks", (self.rank,)))

    def linger(self, timeout_s: float) -> None:
        """After an alarm: wait until rank 0 has ended, or for so long. Launchers end all ranks when
        the first one ends, and rank 0 still has to answer its clients."""
        give_up = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            while time.monotonic() < give_up:
                self._steps.read_some()

    def close(self) -> None:
        self._steps.close()
        self.heartbeat.close()

    def _raise_alarm(self) -> None:
        if (alarm := self.heartbeat.alarm()) is not None:
            raise alarm


def lead(
    group: Group, host: str, trust: Trust, deadline_s: float, timeout_s: float = START_S
) -> Leader:
    """Listen on ``host``, leave the address as a note, and wait until all are connected."""
    require_trust(host, trust)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=1024) as listening:
        listening.settimeout(SLICE_S)
        place = [host, int(listening.getsockname()[1])]
        group.all_gather("control", json.dumps(place).encode(), timeout_s)
        links = _accept_all(group, listening, trust, timeout_s)
    steps = {rank: links[rank, pb.CHANNEL_STEPS] for rank in range(1, group.world)}
    heartbeats = {rank: links[rank, pb.CHANNEL_HEARTBEAT] for rank in range(1, group.world)}
    heartbeat = Heartbeat(0, group.world, heartbeats, deadline_s)
    heartbeat.start()
    return Leader(steps, heartbeat, deadline_s)


def follow(group: Group, trust: Trust, deadline_s: float, timeout_s: float = START_S) -> Follower:
    """Connect to rank 0 at the address in its note."""
    host, port = json.loads(group.all_gather("control", b"", timeout_s)[0])
    require_trust(host, trust)
    steps = _reach(group, (host, port), pb.CHANNEL_STEPS, trust)
    link = _reach(group, (host, port), pb.CHANNEL_HEARTBEAT, trust)
    heartbeat = Heartbeat(group.rank, group.world, {0: link}, deadline_s)
    heartbeat.start()
    return Follower(group.rank, steps, heartbeat, deadline_s)


def require_trust(host: str, trust: Trust) -> None:
    """Beyond loopback nobody is trusted for having found the port."""
    local = host.startswith("127.") or host in ("::1", "localhost")
    if not local and trust.secret is None and trust.tls is None:
        raise ConfigError(
            f"ranks on several hosts meet at {host}, which others can reach: set ep_tls, or "
            "ep_secret on a network that you trust, the same on all ranks"
        )


def _reach(group: Group, place: tuple[str, int], channel: pb.Channel, trust: Trust) -> Link:
    try:
        return connect(place, group.rank, channel, trust, CONNECT_S)
    except (UnauthenticatedError, ssl.SSLError) as error:
        pair = f"rank {group.rank} and rank 0 at {place[0]} do not trust one another"
        raise ConfigError(f"{pair}: {error}") from error
    except OSError as error:
        raise LateRankError(
            f"rank {group.rank} cannot reach rank 0 at {place[0]}:{place[1]} ({error}): it may "
            "need another MASTER_ADDR, or the same ep_tls and ep_secret as rank 0",
            [0],
        ) from error


def _accept_all(
    group: Group, listening: socket.socket, trust: Trust, timeout_s: float
) -> dict[tuple[int, int], Link]:
    channels = (pb.CHANNEL_STEPS, pb.CHANNEL_HEARTBEAT)
    wanted = {(rank, channel) for rank in range(1, group.world) for channel in channels}
    links: dict[tuple[int, int], Link] = {}
    begun = noticed = time.monotonic()
    while wanted - links.keys():
        if (trouble := group.trouble()) is not None:
            raise trouble
        now = time.monotonic()
        missing = sorted({rank for rank, _ in wanted - links.keys()})
        if now - begun > timeout_s:
            raise LateRankError(f"{named(missing)} did not connect in {timeout_s:g} s", missing)
        if now - noticed > NOTICE_S:
            noticed = now
            group.notify(f"rank 0: waiting for {named(missing)} to connect")
        try:
            connected, address = listening.accept()
        except TimeoutError:
            continue
        try:
            hello, link = accept(connected, trust, CONNECT_S)
        except (OSError, UnauthenticatedError) as error:
            log.warning("a connection from %s was refused: %s", address[0], error)
            continue
        if (hello.rank, hello.channel) not in wanted - links.keys():
            log.warning("rank %d connected from %s though it is there", hello.rank, address[0])
            link.close()
            continue
        links[hello.rank, hello.channel] = link
    return links
