"""Bodies of ``/v1/messages``, put as those of chat: one way of checking and rendering for both.

From Anthropic's API reference (Messages). Blocks of text, thinking, tool use and tool results are
understood; images and documents are refused. ``cache_control`` is accepted: equal beginnings are
cached in any case. Fields that are not of this API are passed on, and so met by chat's rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeserve.gateway import limits
from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.errors import Json
from moeserve.gateway.openai.fields import mapping, refuse

_TRANSLATED = frozenset(
    "messages system max_tokens stop_sequences tools tool_choice thinking metadata service_tier "
    "output_config".split()
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class MessageAsked:
    """``shows_thinking``: reasoning is only told to those who asked for it, as Anthropic has it."""

    shows_thinking: bool = False


def chat_of_message(body: Body, *, counting: bool = False) -> tuple[Body, MessageAsked]:
    """The same request as a body of chat; ``counting`` needs no ``max_tokens``."""
    chat: dict[str, Any] = {k: v for k, v in body.items() if k not in _TRANSLATED}
    if "max_tokens" in body:
        chat["max_tokens"] = body["max_tokens"]
    elif not counting:
        refuse("max_tokens", "missing: send the most tokens that the answer may have")
    chat["messages"] = _conversation(body)
    if "stop_sequences" in body:
        chat["stop"] = body["stop_sequences"]
    if "tools" in body:
        chat["tools"] = _tools(body["tools"])
    if "tool_choice" in body:
        chat |= _choice(mapping(body, "tool_choice"))
    shows = _think(chat, mapping(body, "thinking"))
    _configure(chat, mapping(body, "output_config"))
    return chat, MessageAsked(shows)


def _configure(chat: dict[str, Any], wanted: Mapping[str, object]) -> None:
    """``effort`` and ``format`` of ``output_config``; the highest effort that templates know for
    ``max``."""
    given = {name: value for name, value in wanted.items() if value is not None}
    if unknown := given.keys() - {"effort", "format"}:
        refuse("output_config", f"{min(unknown)!a:.60}: not supported by this server")
    if "effort" in given:
        effort = given["effort"]
        chat["reasoning_effort"] = "xhigh" if effort == "max" else effort
    if "format" in given:
        form = mapping(given, "format")
        if form.get("type") != "json_schema":
            refuse("output_config", "format: expected type json_schema, and a schema")
        schema = {"schema": form.get("schema")}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}


def _think(chat: dict[str, Any], wanted: Mapping[str, object]) -> bool:
    kind = wanted.get("type")
    if not wanted:
        return False
    if kind not in ("enabled", "disabled", "adaptive"):
        refuse("thinking", "type: expected one of enabled, disabled, adaptive")
    thinks = kind != "disabled"
    chat["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
    if thinks and wanted.get("budget_tokens") is not None:
        chat["max_thinking_tokens"] = wanted["budget_tokens"]
    return thinks


def _tools(value: object) -> list[Json]:
    if not isinstance(value, list):
        refuse("tools", "expected a list of tools")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(value)]


def _tool(value: object, where: str) -> Json:
    if not isinstance(value, dict) or value.get("type", "custom") not in ("custom", None):
        refuse(
            "tools", f"{where}: only tools with an input_schema, of type 'custom', are supported"
        )
    kept = {name: value[name] for name in ("name", "description") if name in value}
    return {"type": "function", "function": kept | {"parameters": value.get("input_schema")}}


def _choice(value: Mapping[str, object]) -> Json:
    kind = value.get("type")
    single = value.get("disable_parallel_tool_use", False)
    if not isinstance(single, bool):
        refuse("tool_choice", "disable_parallel_tool_use: expected true or false")
    parallel = {"parallel_tool_calls": not single}
    if kind == "tool":
        return {
            "tool_choice": {"type": "function", "function": {"name": value.get("name")}}
        } | parallel
    if not isinstance(kind, str) or kind not in _CHOICES:
        refuse("tool_choice", "type: expected one of auto, any, tool, none")
    return {"tool_choice": _CHOICES[kind]} | parallel


def _conversation(body: Body) -> list[Json]:
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        refuse("messages", "expected a list of at least one message")
    if len(given) > limits.MAX_MESSAGES:
        refuse("messages", f"{len(given)} messages, at most {limits.MAX_MESSAGES}")
    messages: list[Json] = []
    if system := _texts(body.get("system", ""), "system"):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            refuse("messages", f"{where}.role: expected user or assistant")
        blocks = _blocks(message.get("content"), f"{where}.content")
        if message["role"] == "user":
            messages += _user(blocks, where)
        else:
            messages.append(_assistant(blocks, where))
    return messages


def _blocks(content: object, where: str) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        refuse("messages", f"{where}: expected a string, or a list of blocks")
    return content


def _user(blocks: list[Json], where: str) -> list[Json]:
    """Results of tools are messages of their own, before what the user says."""
    results: list[Json] = []
    said: list[Json] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = _texts(block.get("content") or "", f"{where}.content")
            call = {"tool_call_id": block.get("tool_use_id")}
            results.append({"role": "tool", "content": content} | call)
        else:
            said.append(block)
    if not said and results:
        return results
    return [*results, {"role": "user", "content": _texts(said, f"{where}.content")}]


def _assistant(blocks: list[Json], where: str) -> Json:
    message: Json = {"role": "assistant", "content": None}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block in blocks:
        match block.get("type"):
            case "text":
                texts.append(_text(block, where))
            case "thinking" if isinstance(block.get("thinking"), str):
                thoughts.append(block["thinking"])
            case "redacted_thinking":  # encrypted by another server: nothing in it can be read
                pass
            case "tool_use":
                calls.append(_call(block, where))
            case _:
                refuse("messages", f"{where}.content: {block.get('type')!a:.60} is not supported")
    if texts or not calls:
        message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Json, where: str) -> Json:
    if not isinstance(block.get("input", {}), dict):
        refuse("messages", f"{where}.content: the input of a tool_use is an object")
    arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
    function = {"name": block.get("name"), "arguments": arguments}
    return {"id": block.get("id"), "type": "function", "function": function}


def _texts(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where.partition("[")[0], f"{where}: expected a string, or a list of blocks of text")
    return "".join(_text(block, where) for block in value)


def _text(block: object, where: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text":
        refuse(where.partition("[")[0], f"{where}: only blocks of text are supported here")
    if not isinstance(block.get("text"), str):
        refuse(where.partition("[")[0], f"{where}: a block of text needs a string 'text'")
    return str(block["text"])
