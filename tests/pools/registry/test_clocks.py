"""Nobody's clock of the day decides anything about members: it may jump."""

from __future__ import annotations

import ast
from pathlib import Path

import moeserve.pools

ALLOWED = {"monotonic"}


def clocks_of(path: Path) -> set[str]:
    """What a module takes from ``time`` and ``datetime``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("time", "datetime"):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found |= {alias.name for alias in node.names}
    return found


def test_registries_and_routing_read_no_clock_of_the_day() -> None:
    folder = Path(moeserve.pools.__file__).parent
    modules = [p for part in ("registry", "routing") for p in (folder / part).glob("*.py")]
    assert len(modules) > 10
    assert {p.name: clocks_of(p) - ALLOWED for p in modules if clocks_of(p) - ALLOWED} == {}
