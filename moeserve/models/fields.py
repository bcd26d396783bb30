"""Typed reads of ``config.json``: every error names the key, what it says and what was expected.

Keys come from strangers, so sizes are bounded. ``null`` counts as absent, as transformers has it.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeserve.errors import CheckpointError

_MOST = 1 << 31
# Far inside fp32, so that no formula of a few such numbers overflows.
_GREATEST = 1e30


class Fields:
    """A config, read key by key. The first of several names that is present is used."""

    def __init__(self, config: Mapping[str, object], where: str = "config.json") -> None:
        self.config = config
        self.where = where

    def size(self, *names: str, default: int | None = None, most: int = _MOST) -> int:
        """A positive integer."""
        return self._integer(names, default, 1, most)

    def count(self, *names: str, default: int | None = None, most: int = _MOST) -> int:
        """An integer of at least 0."""
        return self._integer(names, default, 0, most)

    def optional_size(self, *names: str) -> int | None:
        return None if self._find(names)[1] is None else self.size(*names)

    def number(self, *names: str, default: float | None = None) -> float:
        """A number of at most 1e30 either way."""
        name, value = self._find(names)
        if value is None:
            if default is None:
                raise self.missing(names)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        if not abs(value) <= _GREATEST:  # so also NaN
            raise self.wrong(name, value, f"a finite number of at most {_GREATEST:g}")
        return float(value)

    def optional_number(self, *names: str) -> float | None:
        return None if self._find(names)[1] is None else self.number(*names)

    def flag(self, *names: str, default: bool) -> bool:
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, *names: str, default: str) -> str:
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.config.get(name)
        if value is None:
            return ()
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in listed):
            raise self.wrong(name, value, "non-negative integers")
        return tuple(listed)

    def texts(self, name: str) -> tuple[str, ...] | None:
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(name, value, "a list of strings")
        return tuple(value)

    def table(self, name: str) -> Fields | None:
        """A nested object."""
        value = self.config.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def only(self, name: str, *supported: object) -> None:
        """A feature of which we have only these; absent is the first."""
        value = self.config.get(name)
        if value is not None and value not in supported:
            known = ", ".join(repr(x) for x in supported)
            raise CheckpointError(f"{self.where}: {name}={value!r} is not supported (only {known})")

    def _integer(self, names: tuple[str, ...], default: int | None, low: int, most: int) -> int:
        name, value = self._find(names)
        if value is None:
            if default is None:
                raise self.missing(names)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
            raise self.wrong(name, value, f"an integer in {low}..{most}")
        return value

    def _find(self, names: tuple[str, ...]) -> tuple[str, object]:
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return name, value
        return names[0], None

    def missing(self, names: tuple[str, ...]) -> CheckpointError:
        return CheckpointError(f"{self.where}: key {' or '.join(names)} is missing")

    def wrong(self, name: str, value: object, expected: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:197] + "..."
        return CheckpointError(f"{self.where}: {name}={shown}: expected {expected}")
