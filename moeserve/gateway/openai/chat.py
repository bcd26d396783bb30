"""Bodies of ``/v1/chat/completions``: messages, still to be rendered, and how to answer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.fields import (
    COMMON,
    AnswerFormat,
    common,
    flag,
    mapping,
    refuse,
    refuse_others,
    text,
)
from moeserve.gateway.openai.messages import Message, for_template, parse_messages
from moeserve.gateway.openai.structured import STRUCTURED_FIELDS, grammar_of
from moeserve.gateway.openai.tools import NO_TOOLS, ToolUse, parse_tools
from moeserve.gateway.parsers.styles import AnswerStyle
from moeserve.gateway.service import ClientRequest

FIELDS = frozenset(
    "messages max_completion_tokens top_logprobs chat_template_kwargs add_generation_prompt tools "
    "tool_choice parallel_tool_calls documents reasoning_effort max_thinking_tokens".split()
).union(COMMON, STRUCTURED_FIELDS)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
THINKING_BUDGET = limits.Bound(0, 2**31 - 1, integer=True)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, still to be rendered with the model's template.

    ``max_thinking`` bounds the tokens of reasoning.
    """

    messages: list[Message]
    add_generation_prompt: bool = True
    template_args: Mapping[str, object] | None = None
    tool_use: ToolUse = NO_TOOLS
    max_thinking: int | None = None

    def shaped(self, style: AnswerStyle) -> list[Message]:
        """The messages as the model's template takes them."""
        return for_template(self.messages, style)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the template is rendered with beside messages; tools and documents are None where
        there are none, as transformers passes them."""
        named = {"tools": list(self.tool_use.offered) or None, "documents": None}
        return named | dict(self.template_args or {})


def parse_chat(body: Body) -> tuple[ClientRequest, AnswerFormat, Conversation]:
    """The request lacks its prompt, which is the rendered conversation."""
    wanted, form = common(body, chat=True, ignored=refuse_others(body, FIELDS))
    params = dict(wanted.params)
    if "max_completion_tokens" in body:
        most = body["max_completion_tokens"]
        if params.get("max_tokens", most) != most:
            refuse("max_completion_tokens", "differs from max_tokens; send one of them")
        params["max_tokens"] = most
    if flag(body, "logprobs"):
        params["logprobs"] = _bounded_top(body)
    elif "top_logprobs" in body:
        refuse("top_logprobs", "needs logprobs: true")
    if (grammar := grammar_of(body)) is not None:
        params["grammar"] = grammar
    conversation = parse_conversation(body)
    special = flag(body, "add_special_tokens")
    return replace(wanted, params=params, fill=True, special_tokens=special), form, conversation


def parse_conversation(body: Body) -> Conversation:
    budget = body.get("max_thinking_tokens")
    return Conversation(
        messages=parse_messages(body.get("messages")),
        add_generation_prompt=flag(body, "add_generation_prompt", default=True),
        template_args=_documents(body)
        | thinking_args(text(body, "reasoning_effort"), "reasoning_effort")
        | _template_args(body),
        tool_use=parse_tools(body),
        max_thinking=None
        if budget is None
        else THINKING_BUDGET.check("max_thinking_tokens", budget),
    )


def thinking_args(effort: str, param: str) -> dict[str, object]:
    """An effort under the names by which templates know it: gpt-oss has the word, Qwen3 and GLM
    ``enable_thinking``, DeepSeek V3.1 ``thinking``. A template that knows none is not changed."""
    if not effort:
        return {}
    if effort not in EFFORTS:
        refuse(param, f"expected one of {', '.join(EFFORTS)}")
    thinks = effort != "none"
    return {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}


def _bounded_top(body: Body) -> int:
    value = body.get("top_logprobs", 0)
    try:
        return int(limits.BOUNDS["logprobs"].check("top_logprobs", value))
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param="top_logprobs") from error


def _documents(body: Body) -> dict[str, object]:
    value = body.get("documents", [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        refuse("documents", "expected a list of objects")
    return {"documents": value or None}


def _template_args(body: Body) -> dict[str, object]:
    args = dict(mapping(body, "chat_template_kwargs"))
    for name in args:
        if not name.isidentifier() or name in ("self", "messages", "add_generation_prompt"):
            refuse("chat_template_kwargs", f"{name!a:.60} cannot be set")
    return args
