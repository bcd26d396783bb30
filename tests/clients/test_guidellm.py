"""guidellm's benchmark against the HTTP door, with the fields that it sends by itself."""

from __future__ import annotations

from typing import Any

import pytest

CLIENT = "guidellm"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


def test_a_concurrent_benchmark_of_completions(client: Any, server: Any) -> None:
    found = client.run("guidellm_run.py", server.http, server.model)
    assert found == {
        "successful": 6,
        "errored": 0,
        "output_tokens": [8] * 6,
        "timed": True,
    }
