"""What rank 0 and the ranks tell each other about a change of plan, as data that JSON can hold.

``as_json`` gives a dict of plain values, ``of_json`` takes one that a peer sent: PlacementError
where a key is missing or too many, a value is of another type, or a number or a text is out of
bounds. Letters: S slots of a layer on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from moeserve.errors import MoeserveError, PlacementError

LARGEST = 2**53  # what a JSON number holds exactly
MOST_SLOTS_OF_A_LAYER = 1 << 20
ERROR_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """Prepare ``layer``, whose slots, of all ranks, are to hold ``expert_S``. ``turn`` is the
    number of this preparation, from 1 on, and counts up."""

    turn: int
    layer: int
    expert_S: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {"turn": self.turn, "layer": self.layer, "expert_S": list(self.expert_S)}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        _require_keys("order", found, {"turn", "layer", "expert_S"})
        expert_S = found["expert_S"]
        if not isinstance(expert_S, list) or len(expert_S) > MOST_SLOTS_OF_A_LAYER:
            raise PlacementError(
                f"a plan's order: expert_S must be a list of at most {MOST_SLOTS_OF_A_LAYER} "
                "experts"
            )
        return cls(
            read_count(found, "turn", least=1),
            read_count(found, "layer"),
            tuple(_count("expert_S", expert) for expert in expert_S),
        )


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A rank has prepared the layer of ``turn``, in ``prepare_s`` seconds and from ``bytes_read``
    of the checkpoint; or it has switched it (``pause_s`` is there then), which held up its step for
    so long. With an ``error`` it has not, and that says why."""

    turn: int
    error: str = ""
    pause_s: float | None = None
    prepare_s: float = 0.0
    bytes_read: int = 0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error[:ERROR_CHARS]}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        _require_keys("report", found, {"turn", "error", "pause_s", "prepare_s", "bytes_read"})
        error = found["error"]
        if not isinstance(error, str) or len(error) > ERROR_CHARS:
            raise PlacementError(f"a plan's report: error must be at most {ERROR_CHARS} letters")
        return cls(
            read_count(found, "turn", least=1),
            error,
            None if found["pause_s"] is None else _seconds(found, "pause_s"),
            _seconds(found, "prepare_s"),
            read_count(found, "bytes_read"),
        )


def describe(error: BaseException) -> str:
    """Why something went wrong, for a report."""
    return error.message if isinstance(error, MoeserveError) else f"{type(error).__name__}: {error}"


def read_count(found: Mapping[str, Any], key: str, least: int = 0) -> int:
    """A whole number of at least ``least``; PlacementError names the key."""
    return _count(key, found.get(key), least)


def _count(key: str, value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < LARGEST:
        raise PlacementError(f"{key}: {str(value)[:40]!r} is no whole number of {least} or more")
    return value


def _seconds(found: Mapping[str, Any], key: str) -> float:
    value = found[key]
    if type(value) not in (int, float) or not (0 <= value < LARGEST and math.isfinite(value)):
        raise PlacementError(f"{key}: {str(value)[:40]!r} are no seconds")
    return float(value)


def _require_keys(kind: str, found: object, keys: set[str]) -> None:
    if not isinstance(found, Mapping) or found.keys() != keys:
        shown = sorted(map(str, found))[:9] if isinstance(found, Mapping) else type(found).__name__
        raise PlacementError(f"a plan's {kind} has {sorted(keys)}, this one {shown}")
