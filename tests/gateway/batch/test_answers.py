"""The output of a batch: whole lines, whatever ended the run before."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError, DataLossError, ExhaustedError
from moeserve.gateway.batch import answers as answers_module
from moeserve.gateway.batch.answers import (
    PREFIX,
    Answer,
    AnswerFile,
    answer_line,
    refusal_line,
)
from moeserve.gateway.batch.lines import Refused, read_lines
from moeserve.gateway.batch.outputs import count_lines

if TYPE_CHECKING:
    from conftest import Lines

GOOD = Answer(200, "req-1", b'{"choices":[{"text":"\xc3\xa4\\n"}]}')
FAILED = Answer(404, "req-2", b'{"error":{"message":"no"}}')


def digest_of(i: int) -> bytes:
    return i.to_bytes(16, "big")


def some_lines(count: int) -> list[bytes]:
    """Good answers, failed ones and refusals in turn."""
    kinds = (
        lambda d, i: answer_line(d, f"name {i}", GOOD),
        lambda d, i: answer_line(d, f"näme {i}", FAILED),
        lambda d, i: refusal_line(d, None if i % 2 else "x", Refused("code", "line 3: why")),
    )
    return [kinds[i % 3](digest_of(i), i) for i in range(count)]


def append_all(file: AnswerFile, lines: list[bytes]) -> None:
    for line in lines:
        file.append(line)


def test_a_line_is_as_the_batch_api_has_it() -> None:
    line = answer_line(digest_of(7), 'quo"te', GOOD)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "id": PREFIX + digest_of(7).hex(),
        "custom_id": 'quo"te',
        "response": {
            "status_code": 200,
            "request_id": "req-1",
            "body": {"choices": [{"text": "ä\n"}]},
        },
        "error": None,
    }
    refused = json.loads(refusal_line(digest_of(8), None, Refused("code", "why")))
    assert refused["response"] is None
    assert refused["error"] == {"code": "code", "message": "why"}


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        assert not file.found.digests
        for line in some_lines(6):
            file.append(line)
    assert path.read_bytes() == b"".join(some_lines(6))
    with AnswerFile(path) as file:
        assert file.found.digests == {digest_of(i) for i in range(6)}
        assert file.found.failed == 4


@given(st.data())
def test_a_file_that_was_cut_anywhere_loses_no_more_than_its_last_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = some_lines(4)
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    path.write_bytes(whole[:cut])
    with AnswerFile(path) as file:
        kept = len(file.found.digests)
        assert len(b"".join(lines[:kept])) <= cut < len(b"".join(lines[: kept + 1])) + (kept == 4)
        for line in lines[kept:]:
            file.append(line)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"precious, and without an end",
        b'{"id": "batch_req_00", "custom_id": "a", "response": null, "error": {}}\n',
        b'{"id": "mine", "custom_id": "a", "response": null, "error": {}}\n',
        b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n',
        b"[]\n",
        b"\n",
        b"\0\0\0\0",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = b"".join(some_lines(2)) + content
    path.write_bytes(before)
    with pytest.raises(ConfigError, match="line 3 is no answer of a batch"):
        AnswerFile(path)
    assert path.read_bytes() == before


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as first:
        script = (
            "import sys; from pathlib import Path;"
            "from moeserve.gateway.batch.answers import AnswerFile;"
            "AnswerFile(Path(sys.argv[1]))"
        )
        other = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "another run writes it" in other.stderr
        with pytest.raises(ConfigError, match="another run writes it"):
            AnswerFile(path)
        first.append(some_lines(1)[0])
    AnswerFile(path).close()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        AnswerFile(tmp_path / "no" / "out.jsonl")


def test_a_full_disk_keeps_whole_lines_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    path, filler = small_disk / "out.jsonl", small_disk / "filler"
    filler.write_bytes(b"x" * (900 << 10))
    big = Answer(200, "req", json.dumps({"text": "y" * 9000}).encode())
    lines = [answer_line(digest_of(i), str(i), big) for i in range(40)]
    with AnswerFile(path) as file:
        with pytest.raises(ExhaustedError, match=r"No space left on device.*make room"):
            append_all(file, lines)
        written = path.read_bytes().count(b"\n")
        assert 0 < written < 40
        assert path.read_bytes() == b"".join(lines[:written])
        filler.unlink()
        file.append(lines[written])
    with AnswerFile(path) as file:
        assert len(file.found.digests) == written + 1


def test_a_disk_that_fails_is_no_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int, line: bytes) -> None:
        os.write(handle, line[:10])
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "out.jsonl"
    with AnswerFile(path) as file:
        file.append(some_lines(1)[0])
        with monkeypatch.context() as patched:
            patched.setattr(answers_module, "_write", fail)
            with pytest.raises(DataLossError, match="Input/output error"):
                file.append(some_lines(2)[1])
    assert path.read_bytes() == some_lines(1)[0]


def test_what_was_written_is_on_the_disk_after_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(answers_module.os, "fsync", synced.append)
    now = [0.0]
    with AnswerFile(tmp_path / "out.jsonl", clock=lambda: now[0]) as file:
        synced.clear()
        for now[0] in (0.2, 0.4, 1.1, 1.2, 2.0, 2.2):
            file.append(some_lines(1)[0])
        assert len(synced) == 2
        now[0] = 9.0
        file.sync_if_due()
        file.sync_if_due()
        assert len(synced) == 2, "nothing is new since"
    assert len(synced) == 2


def test_answers_are_to_lines_of_the_input(batch_of: Lines) -> None:
    path = batch_of("a", "b", "b", "c")
    lines = list(read_lines(path))
    found = {lines[0].digest, lines[2].own_digest}
    assert count_lines(path, found) == 4
    assert count_lines(batch_of("a", "b", "b", "c", "d"), found) == 5, "lines may be added behind"
    with pytest.raises(ConfigError, match="1 of the 2 answers in the output"):
        count_lines(batch_of("changed", "b", "b", "c"), found)
    with pytest.raises(ConfigError, match="2 of the 2 answers"):
        count_lines(batch_of(), found)
