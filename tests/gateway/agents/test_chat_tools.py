"""Tool calls and reasoning of ``/v1/chat/completions``, with OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel

if TYPE_CHECKING:
    from conftest import Stage

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call>'
SECOND = '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
ARGUMENTS = {"city": "Zürich", "days": 3}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]
HELLO: Any = [{"role": "user", "content": "Hello"}]
ASK: Any = {"model": "scripted", "messages": HELLO, "tools": TOOLS}


def test_a_call_is_a_call(stage: Stage) -> None:
    stage.says("<think>\nLet me see.\n</think>\n\nI look it up.\n" + CALL + SECOND)
    answer = stage.openai.chat.completions.create(**ASK)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    # Every marker is a token, and every letter.
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Let me see.") + 4
    extra = choice.message.model_extra or {}
    assert extra["reasoning_content"] == extra["reasoning"] == "Let me see."
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "clock"]
    assert json.loads(calls[0].function.arguments) == ARGUMENTS
    assert calls[0].id.startswith("call_")
    assert calls[0].id != calls[1].id
    assert '<tools>[{"type": "function", "function": {"name": "weather"' in stage.engine.prompt()


def test_streamed_calls_join_to_the_whole(stage: Stage) -> None:
    stage.says("<think>\nHm.\n</think>\n\n" + CALL + SECOND)
    reasoning, content, calls, finishes = "", "", {}, []
    pieces = 0
    for chunk in stage.openai.chat.completions.create(**ASK, stream=True):
        choice = chunk.choices[0]
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        finishes += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            if call.id:
                calls[call.index] = [call.id, call.function.name, ""]  # type: ignore[union-attr]
            pieces += 1
            calls[call.index][2] += call.function.arguments or ""  # type: ignore[union-attr]
    assert (reasoning, content, finishes) == ("Hm.", "", ["tool_calls"])
    assert [(name, json.loads(text)) for _, name, text in calls.values()] == [
        ("weather", ARGUMENTS),
        ("clock", {}),
    ]
    assert pieces > 5


def test_the_client_accumulates_the_stream(stage: Stage) -> None:
    stage.says("I look.\n" + CALL)
    with stage.openai.chat.completions.stream(**ASK) as stream:
        kinds = {event.type for event in stream}
        message: Any = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert json.loads(message.tool_calls[0].function.arguments) == ARGUMENTS


def test_a_parsed_answer_comes_through_the_clients_helper(stage: Stage) -> None:
    class Weather(BaseModel):
        city: str
        days: int

    stage.says(CALL)
    tool = openai.pydantic_function_tool(Weather, name="weather")
    answer = stage.openai.chat.completions.parse(model="scripted", messages=HELLO, tools=[tool])
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Weather(city="Zürich", days=3)


def test_a_conversation_with_calls_and_their_results_goes_on(stage: Stage) -> None:
    stage.says(CALL, "It rains.")
    first = stage.openai.chat.completions.create(**ASK).choices[0].message
    calls: Any = first.tool_calls
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        *HELLO,
        first.model_dump(),  # as it is, with all its fields
        {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"},
    ]
    answer = stage.openai.chat.completions.create(**ASK | {"messages": messages})
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"
    prompt = stage.engine.prompt()
    assert '[assistant]weather={"city": "Zürich", "days": 3}<|im_end|>[tool]rain' in prompt
    assert "[system]Be brief." in prompt  # the template knows no developer


def test_a_call_cut_short_keeps_its_beginning(stage: Stage) -> None:
    stage.says(CALL)
    answer = stage.openai.chat.completions.create(**ASK, max_tokens=60)
    choice: Any = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city"')


@pytest.mark.parametrize("body", [{"tools": TOOLS, "tool_choice": "none"}, {}])
def test_without_tools_to_call_nothing_is_read_as_a_call(stage: Stage, body: Any) -> None:
    stage.says(CALL)
    answer = stage.openai.chat.completions.create(model="scripted", messages=HELLO, **body)
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None
    assert "<tools>" not in stage.engine.prompt()


def test_one_call_at_most_without_parallel_calls(stage: Stage) -> None:
    stage.says(CALL + SECOND)
    answer = stage.openai.chat.completions.create(**ASK, parallel_tool_calls=False)
    assert [c.function.name for c in answer.choices[0].message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]


def test_reasoning_that_the_prompt_opened_is_reasoning(stage: Stage) -> None:
    stage.says("Hm.\n</think>\n\nYes.")
    answer = stage.openai.chat.completions.create(
        model="scripted",
        messages=HELLO,
        extra_body={"chat_template_kwargs": {"opens": True}},
    )
    message = answer.choices[0].message
    assert (message.content, message.model_extra["reasoning"]) == ("Yes.", "Hm.")  # type: ignore[index]


def test_several_answers_are_read_apart(stage: Stage) -> None:
    stage.says(CALL, "Just text.")
    answer = stage.openai.chat.completions.create(**ASK, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop"]


def test_text_in_pieces_and_tokens_are_told_once(stage: Stage) -> None:
    stage.says("I see.\n" + CALL)
    chunks = stage.openai.chat.completions.create(
        **ASK, stream=True, extra_body={"return_token_ids": True}
    )
    told = [
        t for chunk in chunks for t in (chunk.choices[0].model_extra or {}).get("token_ids", [])
    ]
    made = stage.engine._tokenizer.encode("I see.\n" + CALL, False)
    assert told[: len(made)] == made


def test_harmony_channels_are_content_reasoning_and_calls(
    open_stage: Callable[..., Stage],
) -> None:
    with open_stage("harmony") as stage:
        stage.says(
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>',
            "<|channel|>final<|message|>Sunny.<|return|>",
        )
        choice: Any = stage.openai.chat.completions.create(**ASK).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.reasoning_content == "Hm."
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Bern"}'
        plain = stage.openai.chat.completions.create(model="scripted", messages=HELLO)
        assert plain.choices[0].message.content == "Sunny."


def test_markers_that_are_special_tokens_are_seen(open_stage: Callable[..., Stage]) -> None:
    with open_stage("deepseek") as stage:
        call = 'function<｜tool▁sep｜>weather\n```json\n{"city": "Bern"}\n```'
        stage.says(
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        )
        choice: Any = stage.openai.chat.completions.create(**ASK).choices[0]
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Bern"}'
        assert choice.message.content is None
        stage.says("<think>Hm.</think>Yes.")
        message: Any = stage.openai.chat.completions.create(model="scripted", messages=HELLO)
        assert message.choices[0].message.reasoning_content == "Hm."


BAD: list[tuple[str, Any]] = [
    ("tools", "weather"),
    ("tools", [{"type": "web_search"}]),
    ("tools", [{"type": "function", "function": {"name": "two words"}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}]),
    ("tools", [TOOLS[0], TOOLS[0]]),
    ("tools", TOOLS * 200),
    ("tool_choice", "maybe"),
    ("tool_choice", {"type": "function", "function": {"name": "absent"}}),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [CALL]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}]),
    ("messages", [{"role": "assistant", "content": "x", "reasoning": ["x"]}]),
    ("reasoning_effort", "much"),
    ("max_thinking_tokens", -1),
    ("documents", ["text"]),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_cannot_be_meant_is_refused_by_name(stage: Stage, name: str, value: Any) -> None:
    answer = stage.http.post("/v1/chat/completions", json=ASK | {name: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == name
