"""langchain's ``ChatOpenAI`` with tools, on chat and on Responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CLIENT = "langchain-openai"
SCRIPT = "langchain_agent.py"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOLD = {"args": {"city": "Bern"}, "text": "I look."}

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_bound_tools_are_called_and_their_results_answered(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "loop", CALL, "It rains.") == TOLD | {"text": "It rains."}


def test_a_streamed_call_is_gathered(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "stream", "I look.\n" + CALL) == TOLD


def test_structured_output_by_a_call_and_by_a_form(ask: Callable[..., Any]) -> None:
    found = ask(SCRIPT, "structured", CALL, '{"city": "Bern"}')
    assert found == {"by_call": {"city": "Bern"}, "by_form": {"city": "Bern"}}


def test_responses_have_calls_too(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "responses", "I look.\n" + CALL) == TOLD
