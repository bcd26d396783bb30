"""Anthropic's ``/v1/messages``, as its API reference has it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from moeserve.gateway.http import typed_generation

if TYPE_CHECKING:
    from conftest import Stage

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOLS: Any = [
    {
        "name": "weather",
        "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        "cache_control": {"type": "ephemeral"},
    }
]
ASK: Any = {
    "model": "scripted",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "Hello"}],
}
THINKING: Any = {"thinking": {"type": "enabled"}}


def answer_of(stage: Stage, **body: Any) -> dict[str, Any]:
    answer = stage.http.post("/v1/messages", json=ASK | body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def events_of(stage: Stage, **body: Any) -> list[dict[str, Any]]:
    """Every event, whose name is its type."""
    events = []
    with stage.http.stream("POST", "/v1/messages", json=ASK | {"stream": True} | body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def test_text_is_answered_with_a_block_of_text(stage: Stage) -> None:
    stage.says("Hello there.")
    answer = answer_of(stage, system=[{"type": "text", "text": "Be brief."}], top_k=5)
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "scripted")
    assert answer["content"] == [{"type": "text", "text": "Hello there."}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"]["output_tokens"] == len("Hello there.") + 1
    assert "[system]Be brief.<|im_end|>[user]Hello<|im_end|>" in stage.engine.prompt()
    assert stage.engine.requests[-1].params.top_k == 5


def test_the_events_come_in_their_order_and_join_to_the_whole(stage: Stage) -> None:
    text = "<think>\nHm.\n</think>\n\nI look.\n" + CALL
    stage.says(text, text)
    whole = answer_of(stage, tools=TOOLS, **THINKING)
    events = events_of(stage, tools=TOOLS, **THINKING)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                texts.append("")
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                delta = event["delta"]
                texts[-1] += delta[
                    {"input_json_delta": "partial_json"}.get(
                        delta["type"], delta["type"].removesuffix("_delta")
                    )
                ]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert kinds.count("content_block_stop") == 3
    thinking, said, call = whole["content"]
    assert texts[:2] == [thinking["thinking"], said["text"]] == ["Hm.", "I look."]
    assert json.loads(texts[2]) == call["input"] == {"city": "Zürich"}
    assert call["id"].startswith("call_")
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_a_conversation_goes_on_with_the_blocks_it_was_given(stage: Stage) -> None:
    stage.says("<think>\nHm.\n</think>\n\n" + CALL, "It rains.")
    first = answer_of(stage, tools=TOOLS, **THINKING)
    call = first["content"][-1]
    result = {"type": "tool_result", "tool_use_id": call["id"]}
    result["content"] = [{"type": "text", "text": "rain"}]
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    second = answer_of(stage, tools=TOOLS, messages=messages)
    assert second["content"] == [{"type": "text", "text": "It rains."}]
    prompt = stage.engine.prompt()
    assert (
        '[assistant](Hm.)weather={"city": "Zürich"}<|im_end|>[tool]rain<|im_end|>[user]So?'
        in prompt
    )


def test_thinking_is_shown_to_those_who_asked_for_it(stage: Stage) -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    stage.says(text, text)
    assert answer_of(stage)["content"] == [{"type": "text", "text": "Yes."}]
    shown = answer_of(stage, **THINKING)["content"]
    assert shown[0] == {"type": "thinking", "thinking": "Hm.", "signature": ""}


def test_a_stop_sequence_is_named(stage: Stage) -> None:
    stage.says("One, two, three")
    answer = answer_of(stage, stop_sequences=["four", ", t"])
    assert answer["content"][0]["text"] == "One"
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", ", t")


def test_max_tokens_is_a_reason_to_stop(stage: Stage) -> None:
    stage.says("Hello there")
    answer = answer_of(stage, max_tokens=5)
    assert (answer["content"][0]["text"], answer["stop_reason"]) == ("Hello", "max_tokens")


def test_tokens_are_counted_without_an_answer(stage: Stage) -> None:
    body = {"model": "scripted", "messages": ASK["messages"]}
    counted = stage.http.post("/v1/messages/count_tokens", json=body).json()
    stage.says("Hi")
    usage = answer_of(stage)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_a_call_whose_arguments_are_cut_has_an_object_as_input(stage: Stage) -> None:
    stage.says(CALL)
    answer = answer_of(
        stage, tools=TOOLS, max_tokens=len('\n{"name": "weather", "arguments": {"city')
    )
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][0]["input"] == {}


BAD: list[tuple[str, Any]] = [
    ("max_tokens", None),
    ("max_tokens", 0),
    ("messages", []),
    ("messages", [{"role": "system", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image"}]}]),
    ("messages", [{"role": "assistant", "content": [{"type": "tool_use", "input": 3}]}]),
    ("system", 3),
    ("tools", [{"type": "bash_20250124", "name": "bash"}]),
    ("tool_choice", {"type": "maybe"}),
    ("tool_choice", {"type": "tool", "name": "absent"}),
    ("thinking", {"type": "often"}),
    ("stop_sequences", [3]),
    ("temperature", 5),
]


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_have_anthropics_form(stage: Stage, name: str, value: Any, stream: bool) -> None:
    answer = stage.http.post("/v1/messages", json=ASK | {name: value, "stream": stream})
    assert answer.status_code == 400, answer.text
    failure = answer.json()
    assert (failure["type"], failure["error"]["type"]) == ("error", "invalid_request_error")
    assert failure["error"]["message"]


def test_another_model_and_a_form_are_refused_in_anthropics_form(stage: Stage) -> None:
    lost = stage.http.post("/v1/messages", json=ASK | {"model": "other"})
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "not_found_error")
    form = stage.http.post("/v1/messages", data={"a": "b"})
    assert (form.status_code, form.json()["type"]) == (415, "error")


def test_an_answer_that_breaks_off_ends_with_an_error(stage: Stage) -> None:
    stage.says("Hello there.")
    stage.engine.breaks_at = 6
    last = events_of(stage)[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
    stage.says("Hello there.")
    stage.engine.breaks_at = 6
    whole = stage.http.post("/v1/messages", json=ASK)
    assert (whole.status_code, whole.json()["type"]) == (500, "error")


def test_a_silent_stream_is_pinged(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed_generation, "PING_S", 0.01)
    stage.says("Hello there.")
    stage.engine.pause_s = 0.2
    kinds = [event["type"] for event in events_of(stage)]
    assert kinds.count("ping") > 2
    assert kinds[-1] == "message_stop"
