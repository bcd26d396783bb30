"""A conversation is rendered as transformers' ``apply_chat_template`` renders it.

The templates are ours, and have what those of the families have: tools as JSON, arguments as an
object or as text, macros, namespaces, loop controls, the date, and marks for training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moeserve.gateway.openai.chat import parse_conversation
from moeserve.gateway.parsers.styles import style_of
from moeserve.models.tokenizer import Tokenizer

TEMPLATES = {
    file.stem: file.read_text() for file in (Path(__file__).parent / "templates").glob("*.jinja")
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The <weather> of a city & more: é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALLS = [
    {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": [1, null]}'},
    }
]
MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hé "}, {"type": "text", "text": "<b>"}]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]
BODIES: list[dict[str, Any]] = [
    {"messages": MESSAGES[:2]},
    {"messages": MESSAGES, "tools": TOOLS},
    {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "reasoning_effort": "low"},
    {"messages": MESSAGES[:2], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": MESSAGES[:2], "documents": [{"title": "T", "text": "é"}]},
    {"messages": MESSAGES[:2], "add_generation_prompt": False},
]


def tokenizer_with(template: str, folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    Inner(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_prompts_equal_those_of_transformers(
    name: str, body: dict[str, Any], tmp_path: Path
) -> None:
    template = TEMPLATES[name]
    conversation = parse_conversation(body)
    style = style_of(template)
    messages, given = conversation.shaped(style), conversation.arguments
    ours = tokenizer_with(template, tmp_path).render_chat(
        messages, conversation.add_generation_prompt, **given
    )
    [[theirs], *_] = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=conversation.add_generation_prompt,
        bos_token="<s>",
        **given,
    )
    assert ours == theirs


def test_arguments_are_text_where_a_template_joins_them() -> None:
    shaped = {
        name: parse_conversation(BODIES[1]).shaped(style_of(template))[2]
        for name, template in TEMPLATES.items()
    }
    arguments = {
        name: message["tool_calls"][0]["function"]["arguments"] for name, message in shaped.items()
    }
    assert arguments.pop("deepseek") == CALLS[0]["function"]["arguments"]  # type: ignore[index]
    assert all(x == {"city": "Zürich", "days": [1, None]} for x in arguments.values())


def test_reasoning_goes_back_under_the_templates_name() -> None:
    message = parse_conversation(BODIES[1]).shaped(style_of(TEMPLATES["harmony"]))[2]
    assert message["thinking"] == message["reasoning_content"] == "Hm."


def test_a_developer_is_the_system_to_a_template_that_knows_none() -> None:
    roles = {
        name: parse_conversation(BODIES[0]).shaped(style_of(template))[0]["role"]
        for name, template in TEMPLATES.items()
    }
    assert roles.pop("harmony") == "developer"
    assert set(roles.values()) == {"system"}


def test_arguments_that_are_no_object_go_back_as_they_were() -> None:
    call = {"function": {"name": "f", "arguments": '{"cut": "of'}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    [message] = parse_conversation(body).shaped(style_of(TEMPLATES["hermes"]))
    assert message["tool_calls"][0]["function"]["arguments"] == '{"cut": "of'
    assert message["content"] == ""
