"""What travels by each library, and what law 1 still holds of it. Pure.

Libraries that combine add floats, and cannot carry the integers of the exact combine: they ask for
``--combine fast``. ``open`` refuses what is not in the table, the log shows the promise at the
start and ``doctor`` where a library is asked for. ``docs/parallel.md`` has the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moeserve.errors import ConfigError

AUTO, DEEPEP, LOW_LATENCY, MOE_DISTRIBUTE = (
    "auto",
    "deepep",
    "deepep_low_latency",
    "moe_distribute",
)


@dataclass(frozen=True, slots=True)
class Promise:
    """``whole``: tokens and logits are those of one process, whatever ranks, plan and batch are.
    ``placement``: the same whatever ranks and plan are, as long as tokens go by this library.
    ``batch``: a row's bits know no other row. ``wire`` is what is sent, there and back."""

    whole: bool
    placement: bool
    batch: bool
    wire: str
    because: str

    def __str__(self) -> str:
        if self.whole:
            kept = "law 1 holds as in one process"
        elif self.placement:
            kept = "equal bits for any ranks and plan under this dispatcher, not those of others"
        else:
            kept = "equal bits for the same ranks and the same plan alone"
        batch = "" if self.batch else ", where no expert has two slots"
        return f"{kept}{batch}: {self.because}; sent: {self.wire}"


_PROMISES: Mapping[tuple[str, str], Promise] = {
    (DEEPEP, "exact"): Promise(
        whole=True,
        placement=True,
        batch=True,
        wire="our records, and whole sums, as bytes in rows of 8 KiB",
        because="DeepEP carries bytes, and adds nothing",
    ),
    (DEEPEP, "fast"): Promise(
        whole=False,
        placement=False,
        batch=False,
        wire="INT8 codes with a scale of each token, or bf16; back one bf16 row of each rank",
        because="each rank's experts are added in fp32 and rounded, and the ranks' rows again",
    ),
    (LOW_LATENCY, "fast"): Promise(
        whole=False,
        placement=True,
        batch=True,
        wire="bf16; back one bf16 row of each expert",
        because="each expert's row is rounded, and they are added at home in order of choices",
    ),
    (MOE_DISTRIBUTE, "fast"): Promise(
        whole=False,
        placement=True,
        batch=True,
        wire="bf16, which the operator makes INT8 with a scale where weights are INT8; back one "
        "bf16 row of each expert",
        because="each expert's row is rounded and comes home by itself, where the operator adds "
        "them in an order that it does not state (thought to be that of the choices)",
    ),
}


def promise_of(dispatcher: str, combine: str) -> Promise:
    """ConfigError where the library cannot combine like this."""
    found = _PROMISES.get((dispatcher, combine))
    if found is None:
        able = " or ".join(c for name, c in _PROMISES if name == dispatcher)
        raise ConfigError(
            f"dispatcher={dispatcher} does not combine as combine={combine} asks: give --combine "
            f"{able}, or leave out --dispatcher"
        )
    return found


def asked_for(dispatcher: str, combine: str) -> list[str]:
    """A sentence about the library, where one was asked for."""
    if dispatcher == AUTO:
        return []
    return [f"--dispatcher {dispatcher}: {promise_of(dispatcher, combine)}"]
