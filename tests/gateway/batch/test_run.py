"""A batch is run: every line once, as many at once as there is room for, what passes again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from moeserve.errors import ExhaustedError, UnavailableError
from moeserve.gateway.batch import run as run_module
from moeserve.gateway.batch.answers import AnswerFile
from moeserve.gateway.batch.lines import read_lines
from moeserve.gateway.batch.outputs import Outputs, count_lines
from moeserve.gateway.batch.progress import BatchProgress, duration
from moeserve.gateway.batch.run import BatchRun
from moeserve.gateway.service import InferenceService
from moeserve.gateway.text_work import TextWork

if TYPE_CHECKING:
    from conftest import Lines

Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]


def line(custom_id: Any, body: Any = None, url: str = "/v1/completions", **more: Any) -> str:
    """A request as the input has it."""
    asked = {"prompt": "x"} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": asked, **more})


class StubService:
    """What a batch needs of one."""

    def __init__(self) -> None:
        self.texts = TextWork()
        self.ready = True


class StubApp:
    """Answers with what ``handle`` gives, and counts."""

    def __init__(self, handle: Handler) -> None:
        self.handle = handle
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            status, answer = await self.handle(body)
        finally:
            self.running -= 1
        await JSONResponse(answer, status)(scope, receive, send)


async def good(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    await asyncio.sleep(0)
    return 200, {"echo": body}


def failure(status: int, param: str | None = None) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": "no", "type": "t", "param": param, "code": "c"}}


@contextmanager
def files(out: Path, errors: Path | None = None) -> Iterator[Outputs]:
    with AnswerFile(out) as answers:
        if errors is None:
            yield Outputs(answers, answers)
        else:
            with AnswerFile(errors) as failed:
                yield Outputs(answers, failed)


def run_all(
    path: Path,
    app: StubApp,
    *,
    most: int = 8,
    errors: Path | None = None,
    service: StubService | None = None,
) -> BatchProgress:
    """To ``out.jsonl`` beside the input."""

    async def run() -> BatchProgress:
        stub = service or StubService()
        with files(path.parent / "out.jsonl", errors) as outputs:
            total = count_lines(path, outputs.found)
            progress = BatchProgress(total, len(outputs.found))
            batch = BatchRun(app, cast(InferenceService, stub), outputs, most, progress)
            try:
                with contextlib.closing(read_lines(path)) as lines:
                    await batch.run(lines)
            finally:
                await stub.texts.close()
            return progress

    return asyncio.run(run())


def answers_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_every_line_has_one_answer_whatever_is_wrong_with_it(
    batch_of: Lines, tmp_path: Path
) -> None:
    path = batch_of(
        line("a", {"n": 1}),
        line("a", {"n": 2}),
        line("a", {"n": 1}),
        "{",
        b"\xff\xfe",
        "[1]",
        line(7),
        '{"custom_id": "nan", "method": "POST", "url": "/v1/completions", "body": {"t": NaN}}',
        '{"custom_id": "\\ud800", "method": "POST", "url": "/v1/completions", "body": {}}',
        "[" * 100_000,
        line("b", url="/v1/embeddings"),
        line("c", {"n": 3}),
    )
    app = StubApp(good)
    progress = run_all(path, app)
    assert [body["n"] for body in app.bodies] == [1, 3]
    answers = answers_in(tmp_path / "out.jsonl")
    assert len(answers) == progress.answered == 12
    assert progress.failed == 10
    codes = [a["error"]["code"] for a in answers if a["error"]]
    assert sorted(codes) == sorted(
        ["duplicate_custom_id"] * 2
        + ["invalid_json_line"] * 6
        + ["invalid_custom_id", "invalid_url"]
    )
    duplicate = next(a for a in answers if a["error"] and a["custom_id"] == "a")
    assert duplicate["error"]["message"] == "line 2: a line before it has the custom_id"
    assert len({a["id"] for a in answers}) == 12
    assert {a["custom_id"] for a in answers if a["response"]} == {"a", "c"}


def test_nothing_is_done_twice(batch_of: Lines, tmp_path: Path) -> None:
    lines = [*(line(f"r{i}", {"n": i}) for i in range(20)), line("r3"), "{"]
    path, out = batch_of(*lines), tmp_path / "out.jsonl"
    run_all(path, StubApp(good))
    whole = out.read_bytes()
    app = StubApp(good)
    assert run_all(path, app).answered == 0
    assert not app.bodies
    assert out.read_bytes() == whole
    for kept in range(0, len(whole), 97):  # as if it had been killed there
        out.write_bytes(whole[:kept])
        before = whole[:kept].count(b"\n")
        app = StubApp(good)
        progress = run_all(path, app)
        assert (progress.before, progress.answered) == (before, 22 - before)
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_failed_requests_have_a_file_of_their_own_and_are_not_done_again(
    batch_of: Lines, tmp_path: Path
) -> None:
    async def odd(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return failure(400, "n") if body["n"] % 2 else (200, {})

    path = batch_of(*(line(f"r{i}", {"n": i}) for i in range(6)), "{")
    errors = tmp_path / "errors.jsonl"
    run_all(path, StubApp(odd), errors=errors)
    assert {a["custom_id"] for a in answers_in(tmp_path / "out.jsonl")} == {"r0", "r2", "r4"}
    assert {a["custom_id"] for a in answers_in(errors)} == {"r1", "r3", "r5", None}
    app = StubApp(odd)
    run_all(path, app, errors=errors)
    assert not app.bodies


@pytest.mark.parametrize("most", [1, 5, 100])
def test_no_more_sequences_are_under_way_than_there_is_room_for(batch_of: Lines, most: int) -> None:
    async def slow(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(0.001)
        return 200, {}

    app = StubApp(slow)
    run_all(batch_of(*(line(f"r{i}", {"n": 2, "i": i}) for i in range(30))), app, most=most)
    assert app.most == max(1, min(30, most // 2))


def test_what_passes_is_asked_again(
    batch_of: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "BACKOFF_S", (0.0, 0.0, 0.0))
    busy = iter([failure(429), failure(503), failure(504), (200, {"ok": True})])

    async def later(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return next(busy)

    app = StubApp(later)
    run_all(batch_of(line("a")), app)
    assert len(app.bodies) == 4
    assert answers_in(tmp_path / "out.jsonl")[0]["response"]["body"] == {"ok": True}


@pytest.mark.parametrize(
    ("answer", "asked"),
    [(failure(429), 4), (failure(429, "max_tokens"), 1), (failure(500), 1), (failure(404), 1)],
)
def test_what_does_not_pass_is_an_answer(
    answer: tuple[int, dict[str, Any]],
    asked: int,
    batch_of: Lines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "BACKOFF_S", (0.0, 0.0, 0.0))

    async def fails(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return answer

    app = StubApp(fails)
    assert run_all(batch_of(line("a")), app).failed == 1
    assert len(app.bodies) == asked
    assert answers_in(tmp_path / "out.jsonl")[0]["response"]["status_code"] == answer[0]


def test_an_engine_that_dies_ends_the_run_and_its_requests_have_no_answer(
    batch_of: Lines, tmp_path: Path
) -> None:
    service = StubService()

    async def dies(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["n"] < 2:
            return 200, {}
        service.ready = False
        await asyncio.sleep(0)
        return failure(503)

    path = batch_of(*(line(f"r{i}", {"n": i}) for i in range(9)))
    with pytest.raises(UnavailableError, match="give the same command again"):
        run_all(path, StubApp(dies), service=service, most=3)
    assert {a["custom_id"] for a in answers_in(tmp_path / "out.jsonl")} == {"r0", "r1"}
    run_all(path, StubApp(good))
    assert {a["custom_id"] for a in answers_in(tmp_path / "out.jsonl")} == {
        f"r{i}" for i in range(9)
    }


def test_a_full_disk_ends_the_run_and_it_goes_on_later(
    batch_of: Lines, small_disk: Path, tmp_path: Path
) -> None:
    async def long(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return 200, {"text": "y" * 30_000, "n": body["n"]}

    path = small_disk / "in.jsonl"
    path.write_bytes(batch_of(*(line(f"r{i}", {"n": i}) for i in range(25))).read_bytes())
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (700 << 10))
    with pytest.raises(ExhaustedError, match="No space left on device"):
        run_all(path, StubApp(long))
    out = small_disk / "out.jsonl"
    done = len(answers_in(out))
    assert 0 < done < 25
    filler.unlink()
    app = StubApp(long)
    run_all(path, app)
    assert len(app.bodies) == 25 - done
    assert sorted(a["response"]["body"]["n"] for a in answers_in(out)) == list(range(25))


def test_progress_says_what_is_done_and_how_long_it_takes() -> None:
    now = [100.0]
    progress = BatchProgress(10, 2, clock=lambda: now[0])
    assert progress.left_s is None
    with progress:
        for now[0] in (102.0, 104.0):
            progress.on_answer(failed=now[0] > 103)
        assert progress.left_s == pytest.approx(12.0)
        assert (progress.answered, progress.failed) == (2, 1)
    assert duration(5) == "0:05"
    assert duration(3723) == "1:02:03"
