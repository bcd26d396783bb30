"""Answers of servers as they come off the wire: any cut gives the same, nonsense is a failure."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving.openai import AskedOfAll, StreamedAnswer, body_of
from moeserve.bench.serving.outcomes import AnswerRecord, RequestFailed
from moeserve.bench.serving.plan import PlannedRequest
from moeserve.bench.serving.prompts import PromptSource
from moeserve.bench.serving.sse import MOST_BYTES, SseReader
from moeserve.errors import ConfigError

SOURCE = PromptSource(0, 100)
DATA = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b""))
EVENTS = st.lists(st.lists(DATA, min_size=1, max_size=3), max_size=8)


@given(events=EVENTS, cuts=st.lists(st.integers(0, 400)), end=st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_bytes_are_cut(
    events: list[list[bytes]], cuts: list[int], end: bytes
) -> None:
    wire = b": a comment" + end + end
    for lines in events:
        wire += b"event: message" + end + b"".join(b"data: " + x + end for x in lines) + end
    reader, found = SseReader(), []
    places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    for start, stop in itertools.pairwise(places):
        found += reader.feed(wire[start:stop])
    assert found == [b"\n".join(lines) for lines in events]
    assert reader.empty


def test_an_event_without_end_is_refused() -> None:
    for part in (b"x" * 65536, b"data:" + b"x" * 65531 + b"\n"):
        reader = SseReader()
        for _ in range(MOST_BYTES // 65536):
            reader.feed(part)
        with pytest.raises(RequestFailed, match="an event has more"):
            reader.feed(b"data: " + part)


def read(*events: object) -> tuple[AnswerRecord, bool]:
    """The record after events that come a second apart."""
    record = AnswerRecord()
    answer = StreamedAnswer(record)
    for second, event in enumerate(events):
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        answer.event(data, float(second))
    return record, answer.done


def times_and_tokens(record: AnswerRecord) -> list[tuple[float, int]]:
    asked = PlannedRequest(0, 1, text="Once")
    outcome = record.outcome(0, asked, (0, 0, 9), start=0, failed=None)
    return list(zip(outcome.message_s, outcome.message_tokens, strict=True))


def chunk(text: str, tokens: int | None = None, **changed: Any) -> dict[str, Any]:
    usage = None if tokens is None else {"prompt_tokens": 5, "completion_tokens": tokens}
    return {"choices": [{"index": 0, "text": text}], "usage": usage} | changed


def delta(**content: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}


def test_counts_in_every_message_tell_how_many_tokens_each_has() -> None:
    """The second has a token whose text is held back, the last has text that was held back."""
    record, done = read(
        chunk("a", 1), chunk("", 2), chunk("bc", 4), chunk("d", 4), USAGE, b"[DONE]"
    )
    assert done
    record.complete()
    assert times_and_tokens(record) == [(0.0, 1), (1.0, 1), (2.0, 2)]


def test_without_counts_messages_with_text_have_tokens() -> None:
    record, _ = read(delta(role="assistant", content=""), delta(content="a"), delta(), USAGE)
    assert times_and_tokens(record) == [(1.0, 0)]
    record.complete()


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_thoughts_and_calls_are_tokens_too(name: str) -> None:
    record, _ = read(delta(**{name: "a"}))
    assert record.messages == 1


def test_one_message_may_be_the_whole_answer() -> None:
    record, _ = read(chunk("a", 1, choices=[{"text": "a", "finish_reason": "length"}]), b"[DONE]")
    record.complete()
    assert times_and_tokens(record) == [(0.0, 1)]


def test_cached_tokens_are_told() -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    record, _ = read({"choices": [], "usage": usage})
    asked = PlannedRequest(0, 1, text="Once")
    assert record.outcome(0, asked, (0, 0, 0), start=0, failed=None).cached_tokens == 4


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([], "no usage"),
        ([delta(content="a")], "no usage"),
        ([{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 0}}], "no tokens"),
    ],
)
def test_an_answer_that_cannot_be_counted_is_a_failure(events: list[object], kind: str) -> None:
    record, _ = read(*events)
    with pytest.raises(RequestFailed, match=kind):
        record.complete()


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b"{", "bad stream"),
        (b"\xff\xfe", "bad stream"),
        (b"[" * 100_000, "bad stream"),
        ([1], "bad stream"),
        ({}, "bad stream"),
        ({"choices": 3}, "bad stream"),
        ({"choices": [3]}, "bad stream"),
        ({"choices": [], "usage": 3}, "bad stream"),
        ({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": -1}}, "bad stream"),
        ({"choices": [], "usage": {"prompt_tokens": True, "completion_tokens": 1}}, "bad stream"),
        ({"error": {"message": "the rank is late"}}, "error in stream: the rank is late"),
        ({"error": "late"}, "error in stream"),
    ],
)
def test_nonsense_and_errors_in_a_stream_are_failures(event: object, kind: str) -> None:
    with pytest.raises(RequestFailed, match=kind):
        read(event)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "usage", "delta", "text", "error", "completion_tokens",
                             "prompt_tokens", "prompt_tokens_details", "content"]),
            inner,
        )
    ),
)  # fmt: skip


@given(events=st.lists(JSON | st.binary(max_size=20), max_size=4))
def test_any_events_are_read_or_are_a_failure(events: list[object]) -> None:
    record, failed = AnswerRecord(), None
    try:
        record, _ = read(*events)
    except RequestFailed as error:
        failed = error
    assert record.tokens >= 0
    assert failed is None or failed.kind in ("bad stream", "error in stream")
    assert failed is None or len(failed.detail) <= 300


def test_bodies_say_what_was_asked() -> None:
    request = PlannedRequest(0, 7, token_ids=(4, 5))
    body = json.loads(body_of(request, AskedOfAll("m", ignore_eos=True), SOURCE))
    assert body == {
        "model": "m",
        "prompt": [4, 5],
        "max_tokens": 7,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    chat = AskedOfAll("m", "chat", "text", temperature=None, standard=True, extra={"user": "u"})
    body = json.loads(body_of(PlannedRequest(0, 7, text="Once"), chat, SOURCE))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Once"}],
        "max_completion_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "u",
    }


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"api": "embeddings"}, "--api='embeddings'"),
        ({"api": "chat"}, "messages of a chat are texts"),
        ({"standard": True, "ignore_eos": True}, "--ignore-eos"),
    ],
)
def test_what_cannot_be_asked_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AskedOfAll("m", **wrong)
