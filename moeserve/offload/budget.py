"""What a process takes of a memory budget, and how many experts that leaves room for.

Pure: sizes come in, a division goes out, or a ConfigError that names the least budget and what it
is made of. Sizes are bytes. The page cache is no part of it, since weights are read past it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeserve.errors import ConfigError

# Layers whose experts have slots at least: one that runs, and one that is read.
LEAST_LAYERS = 2
MIB = 1 << 20
REMEDY_OF_HOST = ", or keep fewer layers in memory with --weights-window"


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is taken whatever the budget is: the ``process`` before any weights (interpreter,
    libraries, what it will still need for clients), ``ends`` (embedding and head), ``trunk`` (the
    layers but for routed experts, or the window of them), ``scratch`` (of a step), ``drafts`` (of
    the module that guesses tokens, all but its routed experts). ``of`` is the setting that bounds
    it: memory, or device_memory."""

    process: int
    ends: int
    trunk: int
    scratch: int
    drafts: int = 0
    of: str = "memory"

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """By what they are called to the user."""
        found = {
            "process": self.process,
            "embedding and head": self.ends,
            "layers without experts": self.trunk,
            "a step": self.scratch,
        }
        return found | ({"multi-token prediction": self.drafts} if self.drafts else {})


@dataclass(frozen=True, slots=True)
class Records:
    """``nbytes`` of the largest record of an expert, of which layers have ``most_in_layer`` at most
    and the model ``count``."""

    nbytes: int
    most_in_layer: int
    count: int

    @property
    def least(self) -> int:
        """Bytes of the fewest slots that a step runs with, double-buffered."""
        return min(LEAST_LAYERS * self.most_in_layer, self.count) * self.nbytes


@dataclass(frozen=True, slots=True)
class Division:
    """Of a budget."""

    budget: int
    fixed: Fixed
    kv: int
    records: Records
    slots: int

    def table(self) -> str:
        """A line for each part, as it is logged."""
        fixed, record = self.fixed, self.records
        parts = fixed.parts() | {
            "KV": self.kv,
            f"{self.slots} of {record.count} experts": self.slots * record.nbytes,
        }
        left = self.budget - sum(parts.values())
        return _lines({**parts, "left": left, fixed.of: self.budget})


def room_for_kv(budget: int, fixed: Fixed, records: Records, least: int) -> int:
    """What KV may take at most. ConfigError where that is not the ``least`` that was asked for."""
    room = budget - fixed.total - records.least
    if room < least:
        raise too_small(budget, fixed, records, least)
    return room


def divide(budget: int, fixed: Fixed, records: Records, kv: int, most_slots: int) -> Division:
    """All that is left to slots, at most ``most_slots``."""
    room = budget - fixed.total - kv
    if room < records.least:
        raise too_small(budget, fixed, records, kv)
    slots = min(room // max(1, records.nbytes), records.count, most_slots)
    return Division(budget, fixed, kv, records, slots)


def too_small(budget: int, fixed: Fixed, records: Records, kv: int) -> ConfigError:
    parts = fixed.parts() | {
        "KV": kv,
        f"experts of {LEAST_LAYERS} layers": records.least,
    }
    least = -(-(sum(parts.values())) // MIB) * MIB
    listed = ", ".join(f"{name} {_mib(nbytes)}" for name, nbytes in parts.items())
    window = "" if fixed.of == "device_memory" else REMEDY_OF_HOST
    return ConfigError(
        f"{fixed.of}={_mib(budget)}: the least for this model and these settings is {_mib(least)} "
        f"({listed}): give more, or lower max_num_batched_tokens or kv_memory{window}"
    )


def _lines(parts: Mapping[str, int]) -> str:
    width = max(map(len, parts))
    return "\n".join(f"  {name:<{width}} {_mib(nbytes):>14}" for name, nbytes in parts.items())


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f}MiB"
