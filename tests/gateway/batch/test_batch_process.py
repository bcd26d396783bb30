"""``moeserve batch`` as a process: the same answers as over HTTP, after whatever ended it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Lines

PATIENCE_S = 120.0
FLAGS = ["--threads", "1", "--num-blocks", "512", "--served-model-name", "tiny"]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


def line(custom_id: Any, body: Any = None, url: str = "/v1/completions", **more: Any) -> str:
    """A request as the input has it."""
    asked = {"prompt": "x"} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": asked, **more})


def command(model: Path, path: Path, out: Path, *flags: str) -> list[str]:
    files = [str(path), str(out), "--model", str(model)]
    return [sys.executable, "-m", "moeserve.cli", "batch", *files, *FLAGS, *flags]


def batch(model: Path, path: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, path, out, *flags),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def told(answer: dict[str, Any]) -> Any:
    """What an answer says, without what differs from call to call."""
    without = {"id", "created", "created_at", "completed_at", "request_id", "call_id"}
    if isinstance(answer, dict):
        return {name: told(value) for name, value in answer.items() if name not in without}
    return [told(one) for one in answer] if isinstance(answer, list) else answer


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "one two", "max_tokens": 9, "temperature": 0}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 6}),
    ("/v1/completions", {"prompt": [1, 2], "echo": True, "logprobs": 2, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "integer"}},
            },
            "max_tokens": 8,
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "max_tokens": 12},
    ),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": 7}]}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 7}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**9}),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}),
    ("/v1/completions", {"prompt": "x", "model": "another"}),
    ("/v1/completions", {"prompt": "x", "no_such_field": 1, "max_tokens": 2, "temperature": 0}),
]


def test_a_batch_says_what_the_http_door_says(
    tiny: Path, open_house: Callable[..., Any], batch_of: Lines, tmp_path: Path
) -> None:
    asked = [
        (url, {"model": "tiny", **({} if "temperature" in body else {"seed": 3}), **body})
        for url, body in REQUESTS
    ]
    path = batch_of(*(line(f"r{i}", body, url) for i, (url, body) in enumerate(asked)))
    out = tmp_path / "out.jsonl"
    done = batch(tiny, path, out, "--json")
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    with open_house(tiny, served_model_name="tiny", num_blocks=512) as house:
        answers = {a["custom_id"]: a["response"] for a in answers_in(out)}
        assert len(answers) == len(asked)
        for i, (url, body) in enumerate(asked):
            over_http = house.http.post(url, json=body)
            assert answers[f"r{i}"]["status_code"] == over_http.status_code, (i, body)
            assert told(answers[f"r{i}"]["body"]) == told(over_http.json()), (i, body)
    failed = sum(a["status_code"] != 200 for a in answers.values())
    assert summary["lines"] == summary["answered"] == len(asked)
    assert summary["failed"] == failed > 0
    assert summary["complete"]
    assert summary["generated_tokens"] > 0
    assert f"{len(asked)} of {len(asked)} requests" in done.stderr


def test_a_batch_that_is_killed_goes_on_and_ends_with_the_same_answers(
    tiny: Path, batch_of: Lines, tmp_path: Path
) -> None:
    body = {"prompt": "x", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    prompts = [{**body, "prompt": f"request {i}"} for i in range(30)]
    path = batch_of(*(line(f"r{i}", one) for i, one in enumerate(prompts)), "{")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch(tiny, path, whole).returncode == 1
    slow = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16"]
    for least, how in ((3, signal.SIGKILL), (8, signal.SIGTERM)):
        process = subprocess.Popen(
            command(tiny, path, out, *slow), stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + PATIENCE_S
        while not out.exists() or out.read_bytes().count(b"\n") < least:
            assert process.poll() is None, "it ended too early"
            assert time.monotonic() < deadline, "no answers in time"
            time.sleep(0.002)
        process.send_signal(how)
        said, _ = process.communicate(timeout=PATIENCE_S)
        if how is signal.SIGTERM:
            assert process.returncode == 130
            assert "give the same command again" in said
        else:
            with out.open("ab") as torn:
                torn.write(b'{"id": "batch_req_00112233')
    before = out.read_bytes().count(b"\n")
    done = batch(tiny, path, out, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["before"] == before < 31
    answers = answers_in(out)
    assert len({a["id"] for a in answers}) == len(answers) == 31
    assert sorted((told(a) for a in answers), key=repr) == sorted(
        (told(a) for a in answers_in(whole)), key=repr
    )
    path.write_text(path.read_text().replace("request 7", "request 700"))
    changed = batch(tiny, path, out)
    assert changed.returncode == 2
    assert "1 of the 31 answers in the output are to lines that it does not have" in changed.stderr


def test_a_full_disk_ends_a_batch_which_goes_on_when_there_is_room(
    tiny: Path, batch_of: Lines, small_disk: Path
) -> None:
    body = {"prompt": "x" * 90, "echo": True, "logprobs": 20, "max_tokens": 20, "temperature": 0}
    path = batch_of(*(line(f"r{i}", body) for i in range(40)))
    out, filler = small_disk / "out.jsonl", small_disk / "filler"
    filler.write_bytes(b"x" * (900 << 10))
    done = batch(tiny, path, out)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "make room, and give the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    count = len(answers_in(out))
    assert 0 < count < 40
    filler.unlink()
    some = batch(tiny, path, out)
    assert some.returncode in (0, 1)
    names = [a["custom_id"] for a in answers_in(out)]
    assert len(names) == len(set(names)) > count


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--objective", "fast"], "--objective"),
        (["--http-port", "1"], "unrecognized arguments"),
        (["--errors", "IN"], "is given twice"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    flags: list[str], says: str, batch_of: Lines, tmp_path: Path
) -> None:
    path = batch_of(line("a"))
    flags = [str(path) if flag == "IN" else flag for flag in flags]
    done = batch(tmp_path / "no-model", path, tmp_path / "out.jsonl", *flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert not os.path.exists(tmp_path / "out.jsonl")
