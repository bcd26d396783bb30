"""A log line is one line, whatever a client wrote in it, for people and for programs."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.observe.loading import LoadLog
from moeserve.observe.logs import FIELDS, JsonFormatter, TextFormatter
from moeserve.observe.requests import REFUSALS_PER_S, RequestLog, RequestRecord

fields = st.dictionaries(
    st.sampled_from(["id", "model", "error", "tokens"]),
    st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
)


def record(message: str, given: dict[str, object]) -> logging.LogRecord:
    made = logging.LogRecord("moeserve.request", logging.INFO, "", 1, message, (), None)
    setattr(made, FIELDS, given)
    return made


@given(fields)
def test_fields_never_break_a_line_of_text(given_fields: dict[str, object]) -> None:
    line = TextFormatter(rank=1).format(record("request", given_fields))
    assert line.isascii()
    assert line.isprintable()
    assert " rank 1 INFO moeserve.request: request" in line
    assert all(f" {name}=" in line for name in given_fields)


@given(fields)
def test_json_gives_every_field_back(given_fields: dict[str, object]) -> None:
    line = JsonFormatter(rank=1).format(record("request", given_fields))
    assert "\n" not in line
    said = json.loads(line)
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "info",
        "logger": "moeserve.request",
        "rank": 1,
        "message": "request",
        **given_fields,
    }


def test_an_exception_is_in_its_object() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        caught = record("it failed", {})
        caught.exc_info = (ValueError, error, error.__traceback__)
    line = JsonFormatter().format(caught)
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["exception"]


def fields_in(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [getattr(found, FIELDS) for found in caplog.records]


def test_refusals_are_logged_within_a_bound_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeserve.request")
    now = 0.0
    log = RequestLog(clock=lambda: now)
    refused = RequestRecord("x", "tiny", "RESOURCE_EXHAUSTED", 0.0, refused=True)
    for _ in range(5 * REFUSALS_PER_S):
        log.write(refused)
    log.write(RequestRecord("y", "tiny", "OK", 1.0))
    assert [f["id"] for f in fields_in(caplog)] == ["x"] * REFUSALS_PER_S + ["y"]
    now = 1.0
    log.write(refused)
    log.write(refused)
    *_, first, second = fields_in(caplog)
    assert first["refusals_left_out"] == 4 * REFUSALS_PER_S
    assert "refusals_left_out" not in second


def test_loading_is_told_in_steps_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moeserve.loading")
    now = 0.0
    progress = LoadLog(clock=lambda: now)
    for done in range(1001):
        now = done / 100  # 10 s in all
        progress(done * 10**6, 1000 * 10**6)
    progress(1000 * 10**6, 1000 * 10**6)
    assert caplog.messages[0] == "loaded 200.0 of 1000.0 MB (20 %)"
    assert caplog.messages[-1] == "loaded 1000.0 of 1000.0 MB (100 %)"
    assert len(caplog.messages) == 5
