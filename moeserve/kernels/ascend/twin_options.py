"""How a twin takes the options of its operator: those that it emulates, with their defaults; any
other must say nothing, and what the documentation forbids is an InternalError."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from moeserve.errors import InternalError


def demand(holds: object, operator: str, what: str) -> None:
    if not holds:
        raise InternalError(f"{operator}: {what}")


def refuse(operator: str, options: Mapping[str, Any]) -> None:
    """Options that are not emulated, unless they say nothing."""
    given = {name: value for name, value in options.items() if value is not None}
    demand(not given, operator, f"the twin does not know {sorted(given)}")


def known(operator: str, given: Mapping[str, Any], **defaults: Any) -> Any:
    """The options that a twin knows, by name, with their defaults; others must say nothing."""
    refuse(operator, {name: value for name, value in given.items() if name not in defaults})
    return SimpleNamespace(**(defaults | {n: v for n, v in given.items() if n in defaults}))
