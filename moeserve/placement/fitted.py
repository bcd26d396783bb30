"""What a plan was fitted on, written beside it, so that later figures say fitted or held out.

In a plan's ``figures``::

    "fitted_on": {"held_out": 0.1, "workloads": [{"name": "chat.npz", "digest": "9f..."}]}

A workload is known again by the digest of what was routed, whatever its file is called now; of one
that is known, the sequences that ``split`` kept aside are held out and the others fitted. One that
is not known is held out as a whole. Plans that do not say what they were fitted on, as older ones
and those of other runtimes, are judged on what is ``UNKNOWN``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeserve.placement.plan import Plan
from moeserve.placement.routing import Routing, Workload, split

FITTED, HELD_OUT, BOTH, UNKNOWN = "fitted", "held_out", "both", "unknown"


@dataclass(frozen=True, slots=True, eq=False)
class JudgedRouting:
    """The parts of one routing: None where there is nothing of it."""

    kind: str
    fitted: Routing | None = None
    held_out: Routing | None = None

    def parts(self, routing: Routing) -> dict[str, Routing]:
        """By kind: what there is; the ``routing`` that was judged, where its kind is unknown."""
        both = {FITTED: self.fitted, HELD_OUT: self.held_out}
        found = {kind: part for kind, part in both.items() if part is not None}
        return found or {self.kind: routing}


def digest(workload: Workload) -> str:
    """Of what was routed, and in which sequences; not of names and weights."""
    content = hashlib.blake2b(digest_size=16)
    if workload.topk_TLK is None:
        content.update(repr(workload.load_LE.shape).encode())
        content.update(np.ascontiguousarray(workload.load_LE).tobytes())
    else:
        content.update(repr(workload.topk_TLK.shape).encode())
        content.update(np.ascontiguousarray(workload.topk_TLK).tobytes())
        content.update(np.ascontiguousarray(workload.lengths).tobytes())
    return content.hexdigest()


def record(routing: Routing, held_out: float) -> dict[str, Any]:
    """``fitted_on`` for the figures of a plan."""
    workloads = [{"name": w.name, "digest": digest(w)} for w in routing.workloads]
    return {"held_out": held_out, "workloads": workloads}


def judge(plan: Plan, routing: Routing) -> JudgedRouting:
    """Which of ``routing`` the plan was fitted on."""
    known = _known(plan.figures)
    if known is None:
        return JudgedRouting(UNKNOWN)
    digests, share = known
    seen = [w for w in routing.workloads if digest(w) in digests]
    new = [w for w in routing.workloads if digest(w) not in digests]
    if not seen:
        return JudgedRouting(HELD_OUT, None, routing)
    fitted, aside = split(Routing(tuple(seen), routing.moe_layers), share)
    held = (*(aside.workloads if aside else ()), *new)
    if not held:
        return JudgedRouting(FITTED, fitted)
    return JudgedRouting(BOTH, fitted, Routing(held, routing.moe_layers))


def _known(figures: Mapping[str, Any]) -> tuple[frozenset[str], float] | None:
    """Digests and the share held out; None where the file says neither, or nonsense."""
    said = figures.get("fitted_on")
    if not isinstance(said, dict):
        return None
    share, workloads = said.get("held_out"), said.get("workloads")
    if not isinstance(share, int | float) or not 0 <= share < 1 or not isinstance(workloads, list):
        return None
    found = [w.get("digest") for w in workloads if isinstance(w, dict)]
    return frozenset(d for d in found if isinstance(d, str)), float(share)
