"""Child processes: they answer in time or are named, are echoed, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeserve.errors import DeadlineError, UnavailableError
from moeserve.process.ask import AnsweringProcess, ask_all, ask_once
from moeserve.process.child import Process, StartOptions, end_all, start, status_in_words

ANSWERING = """
import os, subprocess, sys, time
from moeserve.process.answer import Channel
def echo(**said): print("noise"); return said
def nice(): return {"niceness": os.nice(0)}
def late(seconds): time.sleep(seconds); return {}
def die(why): sys.exit(why)
def child(): return {"pid": subprocess.Popen(["sleep", "100"]).pid}
Channel().serve({"echo": echo, "nice": nice, "late": late, "die": die, "child": child})
"""
ANSWER = (sys.executable, "-c", ANSWERING)


def answering(name: str, log: Path) -> AnsweringProcess:
    with log.open("wb") as file:
        popen = start(ANSWER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file)
    return AnsweringProcess(name, popen, log)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[AnsweringProcess]]:
    folder = tmp_path_factory.mktemp("pair")
    with answering("ann", folder / "a") as ann, answering("bob", folder / "b") as bob:
        yield [ann, bob]


def exists(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to notice does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def eventually_gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while exists(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not exists(pid)


def test_several_answer_in_order_however_large_the_message(pair: list[AnsweringProcess]) -> None:
    large = "x" * 3_000_000  # more than pipes hold
    messages = [{"do": "echo", "text": large}, {"do": "echo", "text": "b"}]
    assert ask_all(pair, messages, 60) == [{"text": large}, {"text": "b"}]
    assert pair[1].ask({"do": "echo", "text": "c"}, 60) == {"text": "c"}


def test_who_is_late_is_named_and_nobody_else(pair: list[AnsweringProcess]) -> None:
    messages = [{"do": "late", "seconds": s} for s in (0, 1.5)]
    with pytest.raises(DeadlineError, match=r"^bob has not answered for 0.7 s$"):
        ask_all(pair, messages, 0.7)


def test_one_that_does_not_read_is_late_too() -> None:
    pipe = subprocess.PIPE
    with (
        AnsweringProcess("deaf", start(["sleep", "100"], stdin=pipe, stdout=pipe)) as deaf,
        pytest.raises(DeadlineError, match=r"deaf has not answered for 0.1 s"),
    ):
        deaf.ask({"text": "x" * 3_000_000}, 0.1)
    assert not deaf.alive


def test_one_that_ends_is_named_with_status_command_and_last_line(tmp_path: Path) -> None:
    with (
        answering("eve", tmp_path / "log") as eve,
        pytest.raises(UnavailableError, match=r"eve ended: out of luck .with status 1; log: .*-c"),
    ):
        eve.ask({"do": "die", "why": "out of luck"}, 60)


def test_asked_once_a_child_of_low_priority_answers_and_ends() -> None:
    found = ask_once("nina", ANSWER, {"do": "nice"}, timeout_s=60, niceness=7)
    assert found["niceness"] == os.nice(0) + 7
    child = ask_once("nina", ANSWER, {"do": "child"}, timeout_s=60)["pid"]
    assert eventually_gone(child)


def test_what_a_process_left_behind_ends_with_it(tmp_path: Path) -> None:
    script = f"sleep 100 & echo $! > {tmp_path / 'pid'}"
    with Process("parent", start(["sh", "-c", script])) as parent:
        assert parent.wait(20)
        left = int((tmp_path / "pid").read_text())
        assert exists(left)
    assert eventually_gone(left)


def test_stopped_and_deaf_ones_end_in_time() -> None:
    deaf = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    popen = start(["sh", "-c", deaf], stdout=subprocess.PIPE)
    assert popen.stdout.readline() == b"ready\n"
    both = [Process("deaf", popen), Process("stopped", start(["sleep", "100"]))]
    both[1].pause()
    end_all(both, wait_s=0.05, grace_s=0.2)
    assert [process.status for process in both] == [-signal.SIGKILL, -signal.SIGTERM]
    end_all(both)


def test_output_is_passed_on_by_lines_with_what_is_not_text() -> None:
    lines: list[str] = []
    whole = threading.Event()
    popen = start(["printf", r"one\ntwo \377\nthree"], stdout=subprocess.PIPE)
    with Process("printer", popen) as printer:
        printer.echo(lambda line: (lines.append(line), len(lines) == 3 and whole.set()))
        assert whole.wait(20)
    assert lines == ["one\n", "two \ufffd\n", "three\n"]


def test_a_line_is_waited_for_so_long() -> None:
    popen = start(["sh", "-c", "echo ready; sleep 1.5; echo late"], stdout=subprocess.PIPE)
    with Process("server", popen) as server:
        assert server.read_line(20) == "ready\n"
        with pytest.raises(DeadlineError, match=r"server has printed no line for 0.1 s"):
            server.read_line(0.1)
        assert [server.read_line(20), server.read_line(20)] == ["late\n", ""]


def test_environment_cores_and_session_are_as_asked() -> None:
    shows = "import os; print(sorted(os.environ)[:1], len(os.sched_getaffinity(0)), os.getsid(0))"
    options = StartOptions(env={"A": "1"}, cpus=1, own_session=False)
    popen = start([sys.executable, "-c", shows], options, stdout=subprocess.PIPE, text=True)
    assert popen.communicate(timeout=20)[0].split() == ["['A']", "1", str(os.getsid(0))]


def test_one_that_cannot_be_started_is_an_error_of_ours() -> None:
    with pytest.raises(UnavailableError, match="cannot start /no/such -x: No such file"):
        start(["/no/such", "-x"])


def test_the_end_is_told_in_words() -> None:
    assert status_in_words(-9) == "by signal 9"
    assert status_in_words(3) == "with status 3"
