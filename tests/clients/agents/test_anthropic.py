"""Anthropic's client on ``/v1/messages``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CLIENT = "anthropic"
SCRIPT = "anthropic_agent.py"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def test_a_tool_is_called_and_its_result_answered(ask: Callable[..., Any]) -> None:
    found = ask(SCRIPT, "loop", CALL, "It rains.")
    assert found == {"input": {"city": "Bern"}, "stop": "tool_use", "text": "It rains."}


def test_a_stream_has_thinking_text_and_a_call(ask: Callable[..., Any]) -> None:
    found = ask(SCRIPT, "stream", "<think>\nHm.\n</think>\n\nI look.\n" + CALL)
    assert found.pop("tokens") > 20
    assert found == {
        "text": "I look.",
        "blocks": ["thinking", "text", "tool_use"],
        "input": {"city": "Bern"},
        "thinking": "Hm.",
    }


def test_tokens_are_counted(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "count")["input_tokens"] > 5


def test_a_refusal_has_its_type(ask: Callable[..., Any]) -> None:
    assert ask(SCRIPT, "refusal") == {"type": "invalid_request_error"}
