"""``/v1/responses`` with OpenAI's client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Stage

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    }
]
ASK: Any = {"model": "scripted", "input": "Hello"}


def test_text_is_answered_with_a_message(stage: Stage) -> None:
    stage.says("Hello there.")
    answer = stage.openai.responses.create(
        **ASK, instructions="Be brief.", max_output_tokens=99, temperature=0.5
    )
    assert answer.output_text == "Hello there."
    assert (answer.status, answer.store) == ("completed", False)
    assert (answer.instructions, answer.max_output_tokens) == ("Be brief.", 99)
    assert answer.usage is not None
    assert answer.usage.output_tokens == len("Hello there.") + 1
    assert "[system]Be brief.<|im_end|>[user]Hello<|im_end|>" in stage.engine.prompt()
    assert stage.engine.requests[-1].params.temperature == 0.5


def test_the_events_come_in_their_order_and_join_to_the_whole(stage: Stage) -> None:
    stage.says("<think>\nHm.\n</think>\n\nI look.\n" + CALL)
    events: list[Any] = list(stage.openai.responses.create(**ASK, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    folded = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    text_item = ["output_item.added", "content_part.added", "{}.delta", "{}.done"]
    text_item += ["content_part.done", "output_item.done"]
    assert folded == [
        *("created", "in_progress"),
        *(kind.format("reasoning_text") for kind in text_item),
        *(kind.format("output_text") for kind in text_item),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    deltas: dict[int, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            deltas[event.output_index] = deltas.get(event.output_index, "") + event.delta
    reasoning, message, call = events[-1].response.output
    assert deltas == {0: "Hm.", 1: "I look.", 2: call.arguments}
    assert reasoning.content[0].text == "Hm."
    assert message.content[0].text == "I look."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich"})
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in events[-1].response.output]


def test_a_whole_answer_is_what_the_stream_ends_with(stage: Stage) -> None:
    text = "<think>\nHm.\n</think>\n\nI look.\n" + CALL
    stage.says(text, text)
    whole = stage.openai.responses.create(**ASK, tools=TOOLS).model_dump()
    last: Any = list(stage.openai.responses.create(**ASK, tools=TOOLS, stream=True))[-1]
    streamed = last.response.model_dump()

    def told(answer: dict[str, Any]) -> Any:
        drop = ("id", "created_at", "call_id")
        items = [{k: v for k, v in item.items() if k not in drop} for item in answer["output"]]
        return {k: v for k, v in answer.items() if k not in (*drop, "output")} | {"items": items}

    assert told(whole) == told(streamed)


def test_the_client_accumulates_the_stream(stage: Stage) -> None:
    stage.says("I look.\n" + CALL)
    with stage.openai.responses.stream(**ASK, tools=TOOLS) as stream:
        final = stream.until_done().get_final_response()
    assert final.output_text == "I look."
    assert [item.type for item in final.output] == ["message", "function_call"]


def test_a_conversation_goes_on_with_the_items_it_was_given(stage: Stage) -> None:
    stage.says("<think>\nHm.\n</think>\n\n" + CALL, "It rains.")
    first = stage.openai.responses.create(**ASK, tools=TOOLS)
    call: Any = first.output[-1]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        *(item.model_dump() for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    answer = stage.openai.responses.create(model="scripted", input=items, tools=TOOLS)
    assert answer.output_text == "It rains."
    prompt = stage.engine.prompt()
    assert "[user]Hello" in prompt
    assert '[assistant](Hm.)weather={"city": "Zürich"}<|im_end|>[tool]rain' in prompt


def test_an_answer_cut_short_is_incomplete(stage: Stage) -> None:
    stage.says("Hello there, you.")
    answer = stage.openai.responses.create(**ASK, max_output_tokens=5)
    assert (answer.status, answer.output_text) == ("incomplete", "Hello")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


BAD: list[tuple[str, Any]] = [
    ("previous_response_id", "resp_1"),
    ("conversation", "conv_1"),
    ("store", True),
    ("background", True),
    ("include", ["file_search_call.results"]),
    ("input", []),
    ("input", [3]),
    ("input", [{"type": "item_reference", "id": "msg_1"}]),
    ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
    ("input", [{"type": "function_call_output", "output": 3}]),
    ("input", [{"type": "function_call", "name": 3}]),
    ("tools", [{"type": "web_search"}]),
    ("tools", {}),
    ("tool_choice", {"type": "function", "name": "absent"}),
    ("text", {"format": {"type": "other"}}),
    ("max_output_tokens", 0),
    ("n", 2),
]


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_meant_is_refused_by_name(
    stage: Stage, name: str, value: Any, stream: bool
) -> None:
    answer = stage.http.post("/v1/responses", json=ASK | {name: value, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] in (name, "max_tokens" if "max" in name else name)


def test_another_model_is_not_found(stage: Stage) -> None:
    answer = stage.http.post("/v1/responses", json=ASK | {"model": "other"})
    assert answer.status_code == 404


def test_an_answer_that_breaks_off_ends_as_failed(stage: Stage) -> None:
    stage.says("Hello there.")
    stage.engine.breaks_at = 6
    *_, last = list(stage.openai.responses.create(**ASK, stream=True))
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert "it broke" in last.response.error.message
    stage.says("Hello there.")
    stage.engine.breaks_at = 6
    whole = stage.http.post("/v1/responses", json=ASK)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal")
