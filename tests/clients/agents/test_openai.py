"""OpenAI's client with tools, on chat and on Responses, through its helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CLIENT = "openai"
SCRIPT = "openai_agent.py"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOLD = {"args": {"city": "Bern"}, "text": "I look."}

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_call_is_parsed(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "parse", CALL) == {"args": {"city": "Bern"}}


@pytest.mark.parametrize("case", ["stream", "responses"])
def test_a_stream_is_gathered(ask: Callable[..., Any], case: str) -> None:
    assert ask(SCRIPT, case, "I look.\n" + CALL) == TOLD
