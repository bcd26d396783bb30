"""How the text of one request's answers is read: the model's style, and what the request asks."""

from __future__ import annotations

from dataclasses import dataclass

from moeserve.gateway.openai.tools import NO_TOOLS, ToolUse
from moeserve.gateway.parsers.answer import ParsedAnswer
from moeserve.gateway.parsers.styles import PLAIN, AnswerStyle, open_parser


@dataclass(frozen=True, slots=True)
class Reading:
    """``prompt`` is the rendered conversation: it may end inside reasoning, which ends with the
    token ``closing_id``."""

    style: AnswerStyle = PLAIN
    tool_use: ToolUse = NO_TOOLS
    prompt: str = ""
    closing_id: int | None = None

    @property
    def parses(self) -> bool:
        """Whether anything but content can come of a text."""
        return self.style.reasoning != "none" or (
            self.style.tools != "none" and self.tool_use.schemas is not None
        )

    def open(self, answer_id: str, index: int) -> ParsedAnswer:
        """For sequence ``index`` of an answer."""
        return ParsedAnswer(
            open_parser(self.style, self.tool_use.schemas, self.prompt),
            id_seed=f"{answer_id}/{index}",
            most_calls=None if self.tool_use.parallel else 1,
            closing_id=self.closing_id,
        )
