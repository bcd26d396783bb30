"""A model that knows nothing calls the tool it must, and thinks no more than it may.

The model is a random one: whatever is right about its answers is the grammar's doing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Genf"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK}},
]
HELLO: Any = [{"role": "user", "content": "Hi"}]
TEMPLATE = "{#- <tool_call> </think> -#}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def thinker(
    tiny_checkpoint: Callable[[str], Path],
    open_house: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A random model whose template says that it calls and reasons as Qwen3 does."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    folder = tiny_checkpoint("deepseek_v3")
    settings = {"served_model_name": "tiny", "num_blocks": 256, "chat_template": str(template)}
    with open_house(folder, **settings) as house:
        yield house
        house.eventually(house.all_free, "every block is free")


def chat(house: Any, seed: int, **body: Any) -> Any:
    settings: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": seed}
    extra = {"max_thinking_tokens": 4} | body.pop("extra_body", {})
    return house.openai.chat.completions.create(**settings | body, extra_body=extra).choices[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_named_tool_is_called(thinker: Any, seed: int) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    answer = chat(
        thinker, seed, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, temperature=1.5
    )
    [call] = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Bern", "Genf")
    assert arguments["days"] in range(10)


@pytest.mark.parametrize("seed", range(2))
def test_one_of_the_tools_is_called_where_one_must(thinker: Any, seed: int) -> None:
    answer = chat(thinker, seed, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert answer.message.tool_calls[0].function.name in ("weather", "clock")


def test_a_streamed_call_is_the_same(thinker: Any) -> None:
    body: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "seed": 5, "tools": TOOLS}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_thinking_tokens": 4}
    whole = thinker.http.post("/v1/chat/completions", json=body).json()
    arguments = ""
    with thinker.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                for call in delta.get("tool_calls", []):
                    arguments += call["function"]["arguments"]
    [call] = whole["choices"][0]["message"]["tool_calls"]
    assert arguments == call["function"]["arguments"]


def test_responses_and_messages_force_calls_too(thinker: Any) -> None:
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    body = {"model": "tiny", "input": "Hi", "tools": flat, "max_thinking_tokens": 4, "seed": 1}
    body |= {"tool_choice": {"type": "function", "name": "clock"}, "parallel_tool_calls": False}
    output = thinker.http.post("/v1/responses", json=body).json()["output"]
    assert [item["name"] for item in output if item["type"] == "function_call"] == ["clock"]
    tools = [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
        for tool in TOOLS
    ]
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 300, "tools": tools, "seed": 1}
    body |= {"thinking": {"type": "enabled", "budget_tokens": 4}}
    body |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    answer = thinker.http.post("/v1/messages", json=body).json()
    assert answer["stop_reason"] == "tool_use"
    called = answer["content"][-1]
    assert called["input"].keys() == {"weather": {"city", "days"}, "clock": set()}[called["name"]]


def test_a_form_of_the_answer_holds_for_what_follows_reasoning(thinker: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    answer = chat(thinker, 3, response_format=form)
    assert json.loads(answer.message.content)["city"] in ("Bern", "Genf")
    asked = {"format": {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}}
    body = {"model": "tiny", "input": "Hi", "text": asked, "max_thinking_tokens": 4, "seed": 2}
    output = thinker.http.post("/v1/responses", json=body).json()["output"]
    assert json.loads(output[-1]["content"][0]["text"])["days"] in range(10)
