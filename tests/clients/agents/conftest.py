"""Clients that agents use, against a server whose model says what a test tells it to.

The server is the one of ``tests/gateway/agents``: a demo model calls no tools of itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a model that writes as Qwen3 does."""
    scripted = _scripted()
    folder = tmp_path_factory.mktemp("scripted")
    scripted.save_scripted_tokenizer(folder, "hermes")
    with scripted.Stage(folder, "hermes") as stage:
        yield stage


def _scripted() -> Any:
    file = Path(__file__).parents[2] / "gateway" / "agents" / "conftest.py"
    spec = importlib.util.spec_from_file_location("scripted_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ask(client: Any, stage: Any) -> Callable[..., Any]:
    """Runs a script of the client with the server's URL; the model says these texts in turn."""

    def run(script: str, case: str, *texts: str) -> Any:
        stage.says(*texts)
        return client.run(script, case, stage.url)

    return run
