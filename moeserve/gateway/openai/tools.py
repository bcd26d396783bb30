"""Tools as OpenAI's chat has them, and which of them a model may or must call.

``tool_choice``: ``none`` hides the tools from the model, ``auto`` lets it choose, ``required`` and
a named function make it call. Pure; every bound on what a client sends is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moeserve.gateway.json_body import Body
from moeserve.gateway.openai.fields import flag, refuse
from moeserve.gateway.parsers.json_calls import NAME

MAX_TOOLS = 256
_NAME = re.compile(NAME)


class ToolMode(StrEnum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolUse:
    """``tools`` are as a chat template takes them; ``mode`` REQUIRED with ``name`` forces that one.

    ``parallel`` False: one call at most.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: ToolMode = ToolMode.NONE
    name: str = ""
    parallel: bool = True

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """What the model may call."""
        return () if self.mode is ToolMode.NONE else self.tools

    @property
    def forced(self) -> tuple[Mapping[str, Any], ...]:
        """What the model must call one of; empty where it need not."""
        if self.mode is not ToolMode.REQUIRED:
            return ()
        return tuple(t for t in self.tools if self.name in ("", t["function"]["name"]))

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]] | None:
        """The properties of each tool's parameters, for parsers; None where nothing is offered."""
        if not self.offered:
            return None
        functions = [tool["function"] for tool in self.offered]
        return {f["name"]: _properties(f.get("parameters")) for f in functions}


NO_TOOLS = ToolUse()


def parse_tools(body: Body) -> ToolUse:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a chat."""
    value = body.get("tools", [])
    if not isinstance(value, list):
        refuse("tools", "expected a list of tools")
    if len(value) > MAX_TOOLS:
        refuse("tools", f"{len(value)} tools, at most {MAX_TOOLS}")
    tools = tuple(tool_of(item, f"tools[{i}]") for i, item in enumerate(value))
    return tool_use(tools, body.get("tool_choice"), flag(body, "parallel_tool_calls", default=True))


def tool_of(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        refuse("tools", f"{where}: only tools of type 'function' are supported")
    return function_tool(value.get("function"), where + ".function")


def function_tool(value: object, where: str) -> Mapping[str, Any]:
    """A function as templates take it; what is null is absent."""
    if not isinstance(value, dict):
        refuse("tools", f"{where}: expected an object with a name")
    function = {name: item for name, item in value.items() if item is not None}
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        refuse("tools", f"{where}.name: expected up to 256 letters, digits and any of _ - . : /")
    if not isinstance(function.get("description", ""), str):
        refuse("tools", f"{where}.description: expected a string")
    if not isinstance(function.get("parameters", {}), dict):
        refuse("tools", f"{where}.parameters: expected a JSON schema")
    return {"type": "function", "function": function}


def tool_use(tools: tuple[Mapping[str, Any], ...], choice: object, parallel: bool) -> ToolUse:
    """``choice`` as OpenAI's chat spells it; None is ``auto`` where there are tools."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        refuse("tools", "two functions have the same name")
    if choice is None:
        choice = ToolMode.AUTO if tools else ToolMode.NONE
    if isinstance(choice, str) and choice in set(ToolMode):
        if choice == ToolMode.REQUIRED and not tools:
            refuse("tool_choice", "'required' needs tools")
        mode = ToolMode(choice) if tools else ToolMode.NONE
        return ToolUse(tools, mode, parallel=parallel)
    name = _chosen(choice)
    if name is None:
        refuse(
            "tool_choice",
            "expected 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': ...}}",
        )
    if name not in names:
        refuse("tool_choice", f"{name!a:.80} is not among the tools")
    return ToolUse(tools, ToolMode.REQUIRED, name, parallel)


def _chosen(choice: object) -> str | None:
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _properties(schema: object) -> Mapping[str, Any]:
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}
