"""What a machine can do, as measured: the numbers that every prediction is made from. Pure.

Costs are seconds. A product is rows of tokens times a matrix; its cost is per weight of the
matrix, by the number of rows, measured with the kernels that serve. ``cold`` is with weights in
memory, ``warm`` with weights that a cache still holds. Kinds are "fp32", "bf16", "int8" and
"int4": how the weights, or KV, are held; KV of a latent (MLA) is of kind "bf16-latent" and so on.
All figures are of ``threads`` threads together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from moeserve.errors import ConfigError
from moeserve.offload.model.locality import RoutingHabits
from moeserve.offload.model.overheads import MOST_POINTS, Overheads, RestCurve, between
from moeserve.offload.model.overlap import Beside

VERSION = 7
HABITS = ("repeat", "foreseen", "shared")
KINDS = ("fp32", "bf16", "int8", "int4")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProductCurve:
    """Seconds per weight of a product with ``rows[i]`` rows: ``cold[i]`` and ``warm[i]``.

    Rows ascend, and seconds do not fall. Between points the curve is straight; beyond the last it
    goes on in proportion to the rows.
    """

    rows: tuple[float, ...]
    cold: tuple[float, ...]
    warm: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = 0 < len(self.rows) == len(self.cold) == len(self.warm) <= MOST_POINTS
        _require(fits, f"a curve of {len(self.rows)} rows, {len(self.cold)} and {len(self.warm)}")
        rises = all(a < b for a, b in pairwise(self.rows))
        _require(rises and self.rows[0] > 0, f"rows {self.rows} of a curve do not ascend from 1")
        for seconds in (self.cold, self.warm):
            grows = all(a <= b for a, b in pairwise(seconds))
            _require(grows and seconds[0] > 0, f"seconds {seconds} of a curve fall")

    def at(self, rows: float, coldness: float) -> float:
        """Seconds per weight; ``coldness`` 0 is all warm, 1 all cold."""
        cold = _between(self.rows, self.cold, rows)
        if coldness >= 1:
            return cold
        warm = min(cold, _between(self.rows, self.warm, rows))
        return warm + coldness * (cold - warm)

    def per_row(self, coldness: float) -> float:
        """Seconds per weight and row where rows are many: what arithmetic alone takes."""
        return self.at(self.rows[-1], coldness) / self.rows[-1]


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Seconds per operation (two of a multiply-add) of attention over KV of one kind: of sequences
    with one new token each, over KV in memory or in a cache, and of prompts."""

    decode_cold: float
    decode_warm: float
    prefill: float

    def __post_init__(self) -> None:
        _require(
            min(self.decode_cold, self.decode_warm, self.prefill) > 0,
            f"costs of attention {self} are not all above 0",
        )


@dataclass(frozen=True, slots=True)
class MachineModel:
    """``memory`` is bytes read per second by number of threads, ``disk`` by that of a record;
    ``cache`` the bytes of the last cache. ``experts`` are products of routed experts, by rows per
    expert; ``habits`` were counted in the steps that were timed; ``beside`` is how fast
    computing and reading are at once. ``slower_memory`` and ``slower_compute`` stretch what is
    bound by either."""

    host: str
    measured: str
    shapes: str
    threads: int
    isa: str
    cache: int
    memory: Mapping[int, float]
    disk: Mapping[int, float]
    products: Mapping[str, ProductCurve]
    experts: Mapping[str, ProductCurve]
    attention: Mapping[str, AttentionCost]
    overheads: Overheads = field(default_factory=Overheads)
    habits: RoutingHabits = field(default_factory=RoutingHabits)
    beside: Beside = field(default_factory=Beside)
    slower_memory: float = 1.0
    slower_compute: float = 1.0

    def __post_init__(self) -> None:
        _require(self.threads in self.memory, f"memory has no figure of {self.threads} threads")
        rates = [*self.memory.values(), *self.disk.values()]
        _require(min(rates) > 0, "a bandwidth is not above 0")
        _require(bool(self.products) and bool(self.attention), "there are no products measured")

    @property
    def name(self) -> str:
        """What a prediction says it was made with."""
        return f"{self.host}, {self.threads} threads, measured {self.measured} for {self.shapes}"

    @property
    def memory_bytes_per_s(self) -> float:
        """Of all threads."""
        return self.memory[self.threads] / self.slower_memory

    def disk_rate(self, nbytes: float) -> float:
        """Bytes per second of reads of so many bytes: straight between the sizes that were
        measured, and outside of them that of the nearest; 0 where no disk was measured."""
        sizes = sorted(self.disk)
        rates = [self.disk[size] for size in sizes]
        if not sizes:
            return 0.0
        if nbytes <= sizes[0]:
            return rates[0]
        return rates[-1] if nbytes >= sizes[-1] else between(sizes, rates, nbytes)

    def scaled(
        self, *, memory: float = 1.0, compute: float = 1.0, disk: float = 1.0
    ) -> MachineModel:
        """The same with so many times the bandwidths and arithmetic."""
        return replace(
            self,
            slower_memory=self.slower_memory / memory,
            slower_compute=self.slower_compute / compute,
            disk={block: rate * disk for block, rate in self.disk.items()},
        )

    def coldness(self, touched: float) -> float:
        """How much of what a step touches has left the cache when its next step comes."""
        if self.cache <= 0:
            return 1.0
        return min(1.0, max(0.0, touched / self.cache - 0.5))

    def product(self, kind: str) -> ProductCurve:
        return _known(self.products, kind, "products", self)

    def expert(self, kind: str) -> ProductCurve:
        return _known(self.experts, kind, "experts", self)

    def attend(self, kind: str) -> AttentionCost:
        return _known(self.attention, kind, "attention", self)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(said: object) -> MachineModel:
        """What ``to_json`` made, perhaps by way of a file; ConfigError for anything else."""
        try:
            return _read(said)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"not a calibration: {error!r}; calibrate again") from error


def rising(seconds: Sequence[float]) -> tuple[float, ...]:
    """Measured seconds as a curve may have them. Whatever disturbs a measurement makes it longer,
    so none is taken to be more than one that comes after it."""
    found: list[float] = []
    for one in reversed(seconds):
        found.append(min(one, found[-1]) if found else one)
    return tuple(reversed(found))


def _between(xs: tuple[float, ...], ys: tuple[float, ...], x: float) -> float:
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1] * x / xs[-1]
    return between(xs, ys, x)


def _known(found: Mapping[str, T], kind: str, what: str, machine: MachineModel) -> T:
    if kind not in found:
        raise ConfigError(
            f"{what} of kind {kind!r} were not measured on {machine.name}: only "
            f"{', '.join(sorted(found))}; calibrate again, with the model"
        )
    return found[kind]


def _read(said: Any) -> MachineModel:
    if said["version"] != VERSION:
        raise ValueError(f"version {said['version']!r}, expected {VERSION}")
    return MachineModel(
        host=_text(said["host"]),
        measured=_text(said["measured"]),
        shapes=_text(said["shapes"]),
        threads=int(said["threads"]),
        isa=_text(said["isa"]),
        cache=int(said["cache"]),
        memory={int(n): _number(rate) for n, rate in said["memory"].items()},
        disk={int(n): _number(rate) for n, rate in said["disk"].items()},
        products={_text(k): _curve(c) for k, c in said["products"].items()},
        experts={_text(k): _curve(c) for k, c in said["experts"].items()},
        attention={
            _text(kind): AttentionCost(
                _number(c["decode_cold"]), _number(c["decode_warm"]), _number(c["prefill"])
            )
            for kind, c in said["attention"].items()
        },
        overheads=_overheads(said["overheads"]),
        habits=RoutingHabits(**{of: _number(said["habits"][of]) for of in HABITS}),
        beside=Beside(*(_number(said["beside"][of]) for of in ("computing", "reading"))),
    )


def _overheads(said: Any) -> Overheads:
    decode, prompt = (
        RestCurve(*(_numbers(said[name][of]) for of in ("numbers", "seconds")))
        for name in ("decode", "prompt")
    )
    names = ("step", "row", "layer", "attention", "streamed", "record")
    step, row, layer, attention, streamed, record = (_number(said[name]) for name in names)
    return Overheads(step, row, layer, decode, prompt, attention, streamed, record)


def _curve(said: Any) -> ProductCurve:
    return ProductCurve(*(_numbers(said[name]) for name in ("rows", "cold", "warm")))


def _numbers(said: Any) -> tuple[float, ...]:
    """One more than there may be are enough to refuse them."""
    return tuple(_number(n) for n in said[: MOST_POINTS + 1])


def _number(said: Any) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
        raise ValueError(f"{said!r} is not a number")
    return float(said)


def _text(said: Any) -> str:
    if not isinstance(said, str) or len(said) > 200 or not said.isprintable():
        raise ValueError("a name is not a short text")
    return said


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(f"{problem}; calibrate again")
