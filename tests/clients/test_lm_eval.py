"""lm-eval's ``local-completions`` on tasks whose data lie beside this file: no hub is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CLIENT = "lm_eval"
TASKS = Path(__file__).resolve().parent / "lm_eval"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


def evaluate(client: Any, server: Any, *tasks: str) -> dict[str, dict[str, float]]:
    """Metrics by task."""
    found: dict[str, dict[str, float]] = client.run(
        "lm_eval_tasks.py", server.http, server.model, str(TASKS), *tasks, cwd=TASKS
    )
    return found


def test_generate_until_solves_the_sums(client: Any, server: Any) -> None:
    sums = evaluate(client, server, "sums")["sums"]
    assert sums["exact_match,number"] == 1.0
