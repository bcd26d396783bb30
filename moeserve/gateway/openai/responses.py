"""Bodies of ``/v1/responses``, put as those of chat: one way of checking and rendering for both.

Nothing is stored: an answer cannot be asked for again or gone on from by its id, so the whole
conversation comes as ``input``. From OpenAI's API reference (Responses, create). Fields that are
not of this API are passed on, and so met by chat's rule for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import mapping, refuse, text

_TRANSLATED = frozenset(
    "input instructions tools tool_choice max_output_tokens reasoning text".split()
)
# Values with which a field changes nothing; any other is refused.
_INERT: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "background": (False,),
    "truncation": ("disabled", "auto"),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
}
_NO_EFFECT_INCLUDES = {"reasoning.encrypted_content"}
_STORED = ("previous_response_id", "conversation")


@dataclass(frozen=True, slots=True)
class ResponseAsked:
    """What of a body an answer repeats."""

    body: Mapping[str, Any]

    def echo(self) -> Json:
        body = self.body
        return {
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None} | dict(body.get("reasoning", {})),
            "service_tier": "default",
            "store": False,
            "temperature": body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}} | dict(body.get("text", {})),
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_logprobs": 0,
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "user": body.get("user"),
        }


def chat_of_response(body: Body) -> tuple[Body, ResponseAsked]:
    """The same request as a body of chat."""
    for name in _STORED:
        if name in body:
            refuse(name, "nothing is stored by this server: send the whole conversation as input")
    if body.get("store") is True:
        refuse("store", "nothing is stored by this server: send store: false, or leave it out")
    for name, values in _INERT.items():
        if name in body and body[name] not in values:
            refuse(name, "not supported by this server; leave it out")
    _check_includes(body.get("include", []))
    known = _TRANSLATED | _INERT.keys() | {"include"}
    chat = {name: value for name, value in body.items() if name not in known}
    chat["messages"] = _messages(body)
    tools = body.get("tools", [])
    if not isinstance(tools, list):
        refuse("tools", "expected a list of tools")
    if tools:
        chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if "tool_choice" in body:
        chat["tool_choice"] = _choice(body["tool_choice"])
    if "max_output_tokens" in body:
        chat["max_tokens"] = body["max_output_tokens"]
    reasoning = mapping(body, "reasoning")
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    chat |= _format(mapping(body, "text"))
    return chat, ResponseAsked(body)


def _check_includes(value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        refuse("include", "expected a list of strings")
    if unknown := set(value) - _NO_EFFECT_INCLUDES:
        refuse("include", f"{min(unknown)!a:.60}: not supported by this server")


def _format(wanted: Mapping[str, object]) -> Json:
    """``text.format`` as chat's ``response_format``, which has a schema one level deeper."""
    form = wanted.get("format") or {"type": "text"}
    if not isinstance(form, dict):
        refuse("text", "format: expected an object with a type")
    if form.get("type") != "json_schema":
        return {"response_format": form}
    schema = {name: value for name, value in form.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _tool(value: object, where: str) -> Json:
    if not isinstance(value, dict) or value.get("type") != "function":
        refuse("tools", f"{where}: only tools of type 'function' are supported")
    return {"type": "function", "function": {k: v for k, v in value.items() if k != "type"}}


def _choice(value: object) -> object:
    if isinstance(value, dict) and value.get("type") == "function" and "name" in value:
        return {"type": "function", "function": {"name": value["name"]}}
    return value


def _messages(body: Body) -> list[Json]:
    given = body.get("input")
    instructions = text(body, "instructions")
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        refuse("input", "expected a string, or a list of at least one item")
    if len(given) > limits.MAX_MESSAGES:
        refuse("input", f"{len(given)} items, at most {limits.MAX_MESSAGES}")
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            refuse("input", f"input[{i}]: expected an object")
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _ITEMS:
            refuse("input", f"input[{i}].type: expected one of {', '.join(_ITEMS)}")
        _ITEMS[kind](messages, item, f"input[{i}]")
    return messages


def _add_message(messages: list[Json], item: Json, where: str) -> None:
    content = item.get("content")
    if isinstance(content, list):
        content = [_text_part(part, f"{where}.content") for part in content]
    message = {"role": item.get("role"), "content": content}
    if message["role"] == "assistant" and _is_open(messages):
        messages[-1] |= {"content": content}
    else:
        messages.append(message)


def _text_part(part: object, where: str) -> Json:
    kinds = ("input_text", "output_text", "text", "refusal")
    if not isinstance(part, dict) or part.get("type") not in kinds:
        refuse("input", f"{where}: only parts of type 'input_text' and 'output_text' are supported")
    return {"type": "text", "text": part.get("text", part.get("refusal"))}


def _add_call(messages: list[Json], item: Json, where: str) -> None:
    """Into the assistant's message it belongs to: the one before, unless another has spoken."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _add_result(messages: list[Json], item: Json, where: str) -> None:
    output = item.get("output")
    if isinstance(output, list):
        output = [_text_part(part, f"{where}.output") for part in output]
    messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})


def _add_reasoning(messages: list[Json], item: Json, where: str) -> None:
    """It belongs to the message or calls after it."""
    parts = item.get("content") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        refuse("input", f"{where}.content: expected a list of parts")
    said = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if said:
        messages.append({"role": "assistant", "content": None, "reasoning_content": said})


def _is_open(messages: Sequence[Json]) -> bool:
    """Whether the last message is an assistant's reasoning that has no answer yet."""
    last = messages[-1] if messages else {}
    return "reasoning_content" in last and last["content"] is None and "tool_calls" not in last


_ITEMS: Mapping[str, Callable[[list[Json], Json, str], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_result,
    "reasoning": _add_reasoning,
}
