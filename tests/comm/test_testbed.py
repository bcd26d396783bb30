"""Hosts of namespaces: bytes cross their links at what the kernel counts, links can be cut, and
nothing of a bed is left, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeserve.errors import ConfigError, DeadlineError
from moeserve.testbed import marks
from moeserve.testbed.links import parse_rate, show_rate
from moeserve.testbed.network import Bed, refusal
from moeserve.testbed.ranks import GroupEnd, ranks_of, run_ranks

pytestmark = pytest.mark.long

PORT = 5000


@pytest.fixture(scope="module")
def permitted() -> None:
    reason = refusal()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def bed(permitted: None) -> Iterator[Bed]:
    with Bed(2) as raised:
        yield raised


def eventually(holds: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def listen(bed: Bed) -> socket.socket:
    with bed.inside(0):
        listening = socket.create_server((bed.address(0), PORT))
    listening.settimeout(10)
    return listening


def connect(bed: Bed, timeout_s: float = 10) -> socket.socket:
    with bed.inside(1):
        return socket.create_connection((bed.address(0), PORT), timeout_s)


def test_bytes_cross_a_limited_link_as_the_kernel_counts_them(bed: Bed) -> None:
    bed.set_rate(parse_rate("200mbit"))
    message = os.urandom(400_000)
    before = [bed.count(host) for host in range(2)]
    with listen(bed) as listening, connect(bed) as sender:
        receiver, address = listening.accept()
        sender.sendall(message)
        sender.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: receiver.recv(1 << 16), b""))
        receiver.close()
    after = [bed.count(host) for host in range(2)]
    assert got == message
    assert address[0] == bed.address(1)
    sent = after[1].sent_bytes - before[1].sent_bytes
    received = after[0].received_bytes - before[0].received_bytes
    # Headers are 66 of 9014 bytes; small frames have as many.
    assert len(message) < sent < 1.1 * len(message)
    assert len(message) < received < 1.1 * len(message)
    assert after[1].received_bytes - before[1].received_bytes < 0.2 * len(message)


def test_nothing_passes_a_cut_link_and_everything_a_mended_one(bed: Bed) -> None:
    with listen(bed) as listening, connect(bed) as sender:
        receiver, _ = listening.accept()
        bed.cut(1)
        before = bed.count(0).received_bytes
        sender.sendall(b"lost for now")
        receiver.settimeout(0.3)
        with pytest.raises(TimeoutError):
            receiver.recv(100)
        with pytest.raises(TimeoutError):
            connect(bed, 0.2)
        assert bed.count(0).received_bytes == before
        bed.mend(1)
        receiver.settimeout(10)
        assert receiver.recv(100) == b"lost for now"
        receiver.close()


def test_a_host_has_its_own_name_loopback_and_shared_memory(bed: Bed, tmp_path: Path) -> None:
    script = "hostname; getent hosts host1 | cut -f1 -d' '; pwd; : > /dev/shm/a; ls /dev/shm"
    said = [
        bed.start(h, ["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        .communicate(timeout=10)[0]
        .split()
        for h in range(2)
    ]
    assert said == [[f"host{h}", bed.address(1), str(tmp_path), "a"] for h in range(2)]


def test_two_beds_at_once_do_not_meet(bed: Bed) -> None:
    with Bed(2) as other, listen(bed) as listening, listen(other), connect(bed) as sender:
        receiver, address = listening.accept()
        assert address == sender.getsockname()
        receiver.close()
    assert bed.start(1, ["true"]).wait(10) == 0


def test_ranks_get_a_launchers_environment_and_their_lines_a_rank(bed: Bed) -> None:
    said: list[tuple[int, str]] = []
    script = "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $(hostname) $MASTER_ADDR"
    end = run_ranks(bed, ["sh", "-c", script], lambda *line: said.append(line), 2, timeout_s=10)
    assert end == GroupEnd(0)
    expected = [(r.rank, f"{r.rank}/4 {r.local_rank}/2 host{r.host}") for r in ranks_of(2, 2)]
    assert sorted(said) == [(r, f"{text} {bed.address(0)}\n") for r, text in expected]


def test_when_one_rank_ends_badly_the_others_are_ended(bed: Bed) -> None:
    script = "if [ $RANK = 1 ]; then exit 7; fi; exec sleep 600"
    assert run_ranks(bed, ["sh", "-c", script], print, timeout_s=10) == GroupEnd(7, 1)
    assert run_ranks(bed, ["sh", "-c", "kill -9 $$"], print, timeout_s=10).status == 137


def test_ranks_that_do_not_end_are_named(bed: Bed) -> None:
    script = "[ $RANK = 0 ] || exec sleep 600"
    with pytest.raises(DeadlineError, match=r"ranks \[1\] still ran after 0.3 s"):
        run_ranks(bed, ["sh", "-c", script], print, timeout_s=0.3)


def test_a_closed_bed_leaves_no_process_and_no_device(permitted: None) -> None:
    devices = sorted(os.listdir("/sys/class/net"))
    with Bed(2) as bed:
        # In a session of its own, and not a child of the rank any more.
        rank = bed.start(0, ["sh", "-c", "setsid sleep 600 & echo here"], stdout=subprocess.PIPE)
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"here\n"
        rank.stdout.close()
        mine = {one.bed for one in marks.marked() if marks.owner_of(one.bed) == os.getpid()}
        assert len(mine) == 1
    assert not [one for one in marks.marked() if one.bed in mine]
    assert sorted(os.listdir("/sys/class/net")) == devices


def test_an_owner_killed_outright_leaves_nothing_to_the_next_bed(permitted: None) -> None:
    code = """
import os, time
from moeserve.testbed.network import Bed
bed = Bed(2)
bed.start(1, ["sh", "-c", "setsid sleep 600 & echo here; exec sleep 600"])
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"here\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    owner.stdout.close()
    # Keepers and what the owner started end by themselves; what that started, by the sweep.
    assert eventually(lambda: len(marked_by(owner.pid)) == 1)
    with Bed(1):
        assert not marked_by(owner.pid)


def marked_by(owner: int) -> list[marks.Marked]:
    return [one for one in marks.marked() if marks.owner_of(one.bed) == owner]


def test_the_command_runs_ranks_and_says_which_ended_badly(permitted: None) -> None:
    command = [sys.executable, "-m", "moeserve.cli", "testbed", "run", "--hosts", "2"]
    script = "echo $(hostname); exit $((RANK * 3))"
    done = subprocess.run(
        [*command, "--rate", "10mbit", "--", "sh", "-c", script],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "rank 1 ended with 3" in done.stderr
    assert "[1] host1\n" in done.stdout


def test_a_rate_that_is_none_is_refused(subtests: pytest.Subtests) -> None:
    for text in ["", "fast", "0mbit", "-1mbit", "100", "7kbit", "1tbit"]:
        with subtests.test(repr(text)), pytest.raises(ConfigError, match="such as 100mbit"):
            parse_rate(text)


def test_a_rate_is_shown_as_it_is_written(subtests: pytest.Subtests) -> None:
    for text in ["8kbit", "2.5gbit", "100mbit", "unlimited"]:
        with subtests.test(text):
            assert show_rate(parse_rate(text)) == text


def test_a_bed_without_hosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="hosts=0"):
        Bed(0)
