"""Bodies of ``/v1/chat/completions``: messages, still to be rendered, and how to answer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.openai.fields import (
    COMMON,
    AnswerFormat,
    Body,
    common,
    flag,
    mapping,
    refuse,
    refuse_others,
)
from moeserve.gateway.service import ClientRequest

FIELDS = COMMON | frozenset(
    "messages max_completion_tokens top_logprobs chat_template_kwargs add_generation_prompt".split()
)
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, still to be rendered with the model's template."""

    messages: list[dict[str, object]]
    add_generation_prompt: bool
    template_args: Mapping[str, object]


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
    conversation = parse_conversation(body)
    special = flag(body, "add_special_tokens")
    return replace(wanted, params=params, fill=True, special_tokens=special), form, conversation


def parse_conversation(body: Body) -> Conversation:
    return Conversation(
        messages=_messages(body.get("messages")),
        add_generation_prompt=flag(body, "add_generation_prompt", default=True),
        template_args=_template_args(body),
    )


def _messages(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not value:
        refuse("messages", "expected a list of at least one message")
    if len(value) > limits.MAX_MESSAGES:
        refuse("messages", f"{len(value)} messages, at most {limits.MAX_MESSAGES}")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        refuse("messages", f"{where}: expected an object with role and content")
    given = {name: item for name, item in value.items() if item is not None}
    if unknown := given.keys() - {"role", "content", "name", "refusal"}:
        refuse("messages", f"{where}.{min(unknown)!a:.60}: not supported")
    if given.get("role") not in _ROLES:
        refuse("messages", f"{where}.role: expected one of {', '.join(_ROLES)}")
    message: dict[str, object] = {
        "role": given["role"],
        "content": _content(given.get("content"), where),
    }
    if isinstance(given.get("name"), str):
        message["name"] = given["name"]
    return message


def _content(value: object, where: str) -> str:
    """A string, or OpenAI's list of parts, of which only text is understood."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse("messages", f"{where}.content: expected a string")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            refuse("messages", f"{where}.content: only parts of type 'text' are supported")
        if not isinstance(part.get("text"), str):
            refuse("messages", f"{where}.content: a text part needs a string 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _bounded_top(body: Body) -> int:
    value = body.get("top_logprobs", 0)
    try:
        return int(limits.BOUNDS["logprobs"].check("top_logprobs", value))
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message, param="top_logprobs") from error


def _template_args(body: Body) -> Mapping[str, object]:
    args = mapping(body, "chat_template_kwargs")
    for name in args:
        if not name.isidentifier() or name in ("self", "messages", "add_generation_prompt"):
            refuse("chat_template_kwargs", f"{name!a:.60} cannot be set")
    return args
