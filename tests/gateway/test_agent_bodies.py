"""Whatever JSON a client sends, a body is read or refused, never a bug."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError
from moeserve.gateway.anthropic.messages import chat_of_message
from moeserve.gateway.openai.chat import Conversation, parse_chat
from moeserve.gateway.openai.responses import chat_of_response
from moeserve.gateway.parsers.answer_grammar import AnswerShape, answer_grammar
from moeserve.gateway.parsers.styles import AnswerStyle, ToolStyle

WORDS = st.sampled_from(
    "user assistant tool system developer function text thinking tool_use tool_result message "
    "function_call function_call_output reasoning input_text output_text auto any none required "
    "object string enabled custom f g low".split()
)
KEYS = st.sampled_from(
    "role content type text name id function arguments tool_calls tool_call_id call_id output "
    "input tool_use_id thinking parameters input_schema properties required enum description "
    "effort format budget_tokens reasoning_content $defs".split()
)
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | WORDS | st.text(max_size=4)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5)
)
LISTS = st.lists(st.dictionaries(KEYS, JSON, max_size=6), min_size=1, max_size=4) | JSON
FIELDS = {
    "messages": LISTS,
    "input": LISTS,
    "instructions": JSON,
    "system": JSON,
    "tools": LISTS,
    "tool_choice": JSON,
    "parallel_tool_calls": JSON,
    "thinking": JSON,
    "reasoning": JSON,
    "reasoning_effort": JSON,
    "max_thinking_tokens": JSON,
    "documents": JSON,
    "output_config": JSON,
    "text": JSON,
    "include": JSON,
    "store": JSON,
    "metadata": JSON,
    "max_tokens": st.just(9) | JSON,
    "stop_sequences": JSON,
    "chat_template_kwargs": JSON,
}
# Two out of three fields are as they should be, so that what is behind them is reached.
GOOD: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}],
    "input": "x",
    "tools": [{"type": "function", "name": "f", "function": {"name": "f"}}],
}
BODIES = st.fixed_dictionaries(
    {}, optional={n: st.just(GOOD.get(n)) | s | s for n, s in FIELDS.items()}
).map(lambda body: {name: value for name, value in body.items() if value is not None})


def plain(body: Any) -> Any:
    return body, None


@pytest.mark.parametrize("translate", [plain, chat_of_response, chat_of_message])
@settings(max_examples=50, deadline=None)
@given(body=BODIES)
def test_a_body_is_read_or_refused(translate: Callable[..., Any], body: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequestError):
        chat, asked = translate(body)
        if asked is not None and hasattr(asked, "echo"):
            json.dumps(asked.echo())
        _, _, conversation = parse_chat(chat)
        look_at(conversation)


def look_at(conversation: Conversation) -> None:
    """Everything that is made of a conversation without a model."""
    styles: tuple[ToolStyle, ...] = ("hermes", "glm", "qwen3_coder", "deepseek", "kimi", "harmony")
    for tools in styles:
        style = AnswerStyle(tools, "think")
        json.dumps(conversation.shaped(style))
        shape = AnswerShape(tools=conversation.tool_use.offered, budget=conversation.max_thinking)
        answer_grammar(style, shape, lambda marker: len(marker))
    json.dumps(conversation.arguments)
    assert conversation.tool_use.schemas is None or conversation.tool_use.offered


SCHEMAS = st.dictionaries(
    st.sampled_from(["type", "properties", "required", "$defs"]),
    st.dictionaries(st.sampled_from("abc"), JSON, max_size=3) | JSON,
)


@settings(deadline=None)
@given(schema=SCHEMAS)
def test_any_schema_of_a_tool_becomes_a_grammar_or_none(schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"messages": GOOD["messages"], "tools": [tool], "tool_choice": "required"}
    _, _, conversation = parse_chat(body)
    look_at(conversation)
