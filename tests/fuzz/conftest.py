"""Inputs that nobody would write, found by hypothesis: about a minute of them in continuous
integration, the same each time; with FUZZ_EXAMPLES=N, N times as many and always others.

A crash that is found is mended, and becomes a test of its own beside the code it was in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = 100
TIMES = "FUZZ_EXAMPLES"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each property runs as often as its module's ``EXAMPLES`` says."""
    times = int(os.environ.get(TIMES, "0"))
    seen: set[Any] = set()
    for item in items:
        if Path(__file__).parent not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        if times:
            item.add_marker(pytest.mark.timeout(3600))
        if hasattr(item.function, "hypothesis") and item.function not in seen:
            seen.add(item.function)
            settings(
                max_examples=getattr(item.module, "EXAMPLES", EXAMPLES) * max(times, 1),
                derandomize=not times,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )(item.function)


def _values() -> st.SearchStrategy[Any]:
    numbers = st.integers(-(2**70), 2**70) | st.floats() | st.just(10**400)
    leaves = st.none() | st.booleans() | numbers | st.text(max_size=20)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )


@pytest.fixture(scope="session")
def values() -> st.SearchStrategy[Any]:
    """Whatever JSON can say, and numbers that it cannot."""
    return _values()


def _edited(document: Any, data: st.DataObject, values: st.SearchStrategy[Any]) -> Any:
    """A copy with one place replaced, removed or added."""
    copy = json.loads(json.dumps(document))
    at: Any = copy
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return data.draw(values)
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        if data.draw(st.integers(0, 4)) == 0:
            del at[key]
        else:
            at[key] = data.draw(values)
        return copy


@pytest.fixture(scope="session")
def edited() -> Any:
    """Of (document, data, values): the document with one place changed."""
    return _edited


def _spoiled(content: bytes, data: st.DataObject) -> bytes:
    """Bytes with a few of them changed, cut or added."""
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        noise = data.draw(st.binary(max_size=9))
        end = min(len(content), at + data.draw(st.sampled_from([0, len(noise), 1, 1 << 20])))
        content = content[:at] + noise + content[end:]
    return content


@pytest.fixture(scope="session")
def spoiled() -> Any:
    """Of (content, data): the content with a few bytes changed."""
    return _spoiled
