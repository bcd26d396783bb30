"""Which parsers a model needs: read from its chat template, or as the server was told.

A template shows how a model was taught to call: it writes earlier calls of a conversation in the
same form. So markers in the template choose; a model whose template has none of them gets no
parser, and its answers are content as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moeserve.gateway.parsers import thinking
from moeserve.gateway.parsers.harmony import CHANNEL, ENDS, STOPS, HarmonyParser
from moeserve.gateway.parsers.json_calls import DEEPSEEK, HERMES, KIMI, JsonCallParser
from moeserve.gateway.parsers.parts import AnswerParser, PlainParser
from moeserve.gateway.parsers.tagged_calls import GLM, QWEN_CODER, TaggedCallParser, ToolSchemas

ToolStyle = Literal["none", "hermes", "qwen3_coder", "deepseek", "glm", "kimi", "harmony"]
ReasoningStyle = Literal["none", "think", "harmony"]

# The first whose marker a template has.
_TOOL_MARKERS: Mapping[str, ToolStyle] = {
    CHANNEL: "harmony",
    "<｜tool▁call▁begin｜>": "deepseek",
    KIMI.opening: "kimi",
    "tool_declare": "kimi",  # its first template shows tools, but no calls
    GLM.key: "glm",
    "<function=": "qwen3_coder",
    HERMES.opening: "hermes",
}
_OPENING: Mapping[ToolStyle, str] = {
    "hermes": HERMES.opening,
    "qwen3_coder": QWEN_CODER.opening,
    "deepseek": DEEPSEEK.opening,
    "glm": GLM.opening,
    "kimi": KIMI.opening,
    "harmony": CHANNEL,
}


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """How a model writes calls and reasoning, and what its template expects of a history.

    ``arguments_as_text``: the template joins a call's arguments to strings, as they are.
    ``fenced``: DeepSeek's arguments stand between fences, as they did before V3.1.
    ``knows_developer``: it has a role ``developer``; others get ``system`` instead.
    """

    tools: ToolStyle = "none"
    reasoning: ReasoningStyle = "none"
    arguments_as_text: bool = False
    fenced: bool = False
    knows_developer: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        """Those that tell whether the style's markers are special tokens."""
        calls, reasoning = _OPENING.get(self.tools, ""), self.reasoning_end
        return tuple(marker for marker in (calls, reasoning) if marker)

    @property
    def reasoning_end(self) -> str:
        """The token that ends reasoning; empty where there is none."""
        return {"think": thinking.CLOSING, "harmony": ENDS[0], "none": ""}[self.reasoning]

    @property
    def stops(self) -> tuple[str, ...]:
        """Tokens that end an answer beside the model's own end token."""
        return STOPS if "harmony" in (self.tools, self.reasoning) else ()


# Of a model that writes neither calls nor reasoning.
PLAIN = AnswerStyle()


def style_of(
    template: str | None,
    tools: ToolStyle | Literal["auto"] = "auto",
    reasoning: ReasoningStyle | Literal["auto"] = "auto",
) -> AnswerStyle:
    """``auto`` is what the template shows."""
    source = template or ""
    calls = _shown_tools(source) if tools == "auto" else tools
    return AnswerStyle(
        calls,
        _shown_reasoning(source) if reasoning == "auto" else reasoning,
        arguments_as_text=calls == "deepseek" and not _writes_json(source),
        fenced="```json" in source,
        knows_developer=not source or "developer" in source,
    )


def _shown_tools(template: str) -> ToolStyle:
    return next((style for marker, style in _TOOL_MARKERS.items() if marker in template), "none")


def _shown_reasoning(template: str) -> ReasoningStyle:
    if CHANNEL in template:
        return "harmony"
    return "think" if thinking.CLOSING in template else "none"


def open_parser(style: AnswerStyle, schemas: ToolSchemas | None, prompt: str = "") -> AnswerParser:
    """For one sequence. ``schemas`` None: the request has no tools, so nothing is read as a call.
    ``prompt`` is the rendered conversation, which may end inside reasoning."""
    if style.reasoning == "harmony" or (style.tools == "harmony" and schemas is not None):
        return HarmonyParser()
    answer = PlainParser() if schemas is None else _call_parser(style.tools, schemas)
    if style.reasoning == "think":
        return thinking.ThinkingParser(answer, inside=thinking.ends_inside(prompt))
    return answer


def _call_parser(style: ToolStyle, schemas: ToolSchemas) -> AnswerParser:
    match style:
        case "hermes":
            return JsonCallParser(HERMES)
        case "deepseek":
            return JsonCallParser(DEEPSEEK)
        case "kimi":
            return JsonCallParser(KIMI)
        case "glm":
            return TaggedCallParser(GLM, schemas)
        case "qwen3_coder":
            return TaggedCallParser(QWEN_CODER, schemas)
        case _:
            return PlainParser()


def _writes_json(template: str) -> bool:
    """Whether it turns arguments to JSON itself, and so takes an object."""
    spaceless = template.replace(" ", "")
    return "arguments']|tojson" in spaceless or "arguments|tojson" in spaceless
