"""litellm on chat, Responses and Messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CLIENT = "litellm"
SCRIPT = "litellm_agent.py"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOLD = {"name": "weather", "arguments": {"city": "Bern"}, "finish": "tool_calls"}

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("case", ["whole", "stream"])
def test_chat_has_a_call_and_its_reasoning(ask: Callable[..., Any], case: str) -> None:
    found = ask(SCRIPT, case, "<think>\nHm.\n</think>\n\nI look.\n" + CALL)
    assert found == TOLD | {"content": "I look.", "reasoning": "Hm."}


def test_messages_have_a_call(ask: Callable[..., Any]) -> None:
    found = ask(SCRIPT, "as_anthropic", "I look.\n" + CALL)
    assert found == TOLD | {"content": "I look.", "reasoning": None}


def test_responses_have_a_text(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "responses", "Hello there.") == {"text": "Hello there."}
