"""Messages of a conversation, from what clients send to what chat templates take.

Clients send OpenAI's shape: content as text or parts, a call's arguments as a string of JSON,
roles ``developer`` and ``tool``. Templates take transformers' shape: arguments as an object (or, a
few, as text), reasoning beside the content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeserve.gateway import limits
from moeserve.gateway.openai.fields import refuse
from moeserve.gateway.parsers.styles import AnswerStyle

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CALLS = 256
# Sent back by clients who repeat an answer's message; they say nothing to a template.
_IGNORED = {"refusal", "annotations", "audio", "function_call"}
_KNOWN = {
    *("role", "content", "name", "tool_calls", "tool_call_id"),
    *("reasoning_content", "reasoning"),
}


def parse_messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        refuse("messages", "expected a list of at least one message")
    if len(value) > limits.MAX_MESSAGES:
        refuse("messages", f"{len(value)} messages, at most {limits.MAX_MESSAGES}")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        refuse("messages", f"{where}: expected an object with role and content")
    given = {name: item for name, item in value.items() if item is not None}
    for name in _IGNORED & given.keys():
        if given[name] not in ("", [], {}) and name != "refusal":
            refuse("messages", f"{where}.{name}: not supported")
        del given[name]
    if unknown := given.keys() - _KNOWN:
        refuse("messages", f"{where}.{min(unknown)!a:.60}: not supported")
    role = given.get("role")
    if role not in ROLES:
        refuse("messages", f"{where}.role: expected one of {', '.join(ROLES)}")
    calls = _calls(given.get("tool_calls"), where)
    if calls and role != "assistant":
        refuse("messages", f"{where}.tool_calls: only an assistant calls tools")
    # Calls without a text have an empty one: templates that print it, or look into it, want text.
    message: Message = {"role": role, "content": ""}
    if "content" in given or not calls:
        message["content"] = _content(given.get("content"), where)
    for name in ("name", "tool_call_id"):
        if isinstance(given.get(name), str):
            message[name] = given[name]
    if calls:
        message["tool_calls"] = calls
    reasoning = given.get("reasoning_content", given.get("reasoning"))
    if reasoning is not None:
        if not isinstance(reasoning, str):
            refuse("messages", f"{where}.reasoning_content: expected a string")
        message["reasoning_content"] = reasoning
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


def _calls(value: object, where: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        refuse("messages", f"{where}.tool_calls: expected a list of calls")
    if len(value) > MAX_CALLS:
        refuse("messages", f"{where}.tool_calls: {len(value)} calls, at most {MAX_CALLS}")
    return [_call(item, f"{where}.tool_calls[{i}]") for i, item in enumerate(value)]


def _call(value: object, where: str) -> Message:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        refuse("messages", f"{where}: expected an object with id, type and function")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not isinstance(arguments, str):
        refuse("messages", f"{where}.function: expected a name and arguments, as strings")
    call: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def for_template(messages: Sequence[Message], style: AnswerStyle) -> list[Message]:
    """As the model's template takes them."""
    return [_shaped(message, style) for message in messages]


def _shaped(message: Message, style: AnswerStyle) -> Message:
    shaped = dict(message)
    if message["role"] == "developer" and not style.knows_developer:
        shaped["role"] = "system"
    if "tool_calls" in message:
        shaped["tool_calls"] = [_shaped_call(call, style) for call in message["tool_calls"]]
    if "reasoning_content" in message:
        # Templates differ in the name: gpt-oss has "thinking", later ones "reasoning".
        shaped["reasoning"] = message["reasoning_content"]
        if style.reasoning == "harmony":
            shaped["thinking"] = message["reasoning_content"]
    return shaped


def _shaped_call(call: Mapping[str, Any], style: AnswerStyle) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if style.arguments_as_text:
        return dict(call)
    return dict(call) | {"function": function | {"arguments": _as_object(arguments)}}


def _as_object(arguments: str) -> object:
    """Text that is no object stays text: a model may have written it so."""
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return read if isinstance(read, dict) else arguments
