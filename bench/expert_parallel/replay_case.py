"""One recording on one shape of the bed: what its ranks run, what that must count, and the check.

Letters as in ``placement``; R ranks, S sequences of a rank, W tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from expert_parallel.group import RankGroup, Spans, TrafficVariant
from expert_parallel.predicted import PredictedStep, predict
from expert_parallel.recorded import Recording
from expert_parallel.scaled_model import VOCAB
from expert_parallel.schemes import LoadCase, Repetitions
from numpy.typing import NDArray

from moeserve.errors import InternalError
from moeserve.placement.plan import Plan

I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BedShape:
    hosts: int
    ranks_per_host: int

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    def __str__(self) -> str:
        return f"{self.hosts}x{self.ranks_per_host}"


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """One recording on one shape of the bed. ``ids_RSWLK[r][s]`` is what is forced on sequence s of
    rank r."""

    recording: Recording
    shape: BedShape
    plans: Mapping[str, Plan]
    ids_RSWLK: I32
    load: LoadCase
    repetitions: Repetitions

    def spans(self, step: int) -> Spans:
        at = self.repetitions
        return self.load.spans(self.shape.ranks, step, at.length, at.prompt)

    def tokens(self, step: int) -> tuple[I32, I32]:
        """[T, L, K] and [T]: experts and homes of the tokens of a step."""
        ids, homes = [], []
        for rank, spans in enumerate(self.spans(step)):
            for sequence, start, stop in spans:
                ids.append(self.ids_RSWLK[rank, sequence, start:stop])
                homes += [rank] * (stop - start)
        return np.concatenate(ids), np.array(homes, np.int32)

    def predicted(self, plan: str, step: int) -> PredictedStep:
        ids_TLK, home_T = self.tokens(step)
        return predict(self.plans[plan], ids_TLK, home_T, self.load.tokens)

    def settings(self, model: Path, routing: Path, threads: int, backend: str) -> dict[str, Any]:
        drawn = random.Random(1)
        ranks, sequences, window = self.ids_RSWLK.shape[:3]
        return {
            "model": str(model),
            "quantization": "int8",
            "threads": threads,
            "backend": backend,
            "experts": self.recording.num_experts,
            "plans": {
                name: {str(l): row_S.tolist() for l, row_S in enumerate(plan.expert_LS)}
                for name, plan in self.plans.items()
            },
            "sequences": [
                [[drawn.randrange(VOCAB) for _ in range(window)] for _ in range(sequences)]
                for _ in range(ranks)
            ],
            "routing": str(routing),
        }


def require_recorded(group: RankGroup, replay: Replay) -> None:
    """Before anything is timed: logits do not depend on plans (law 1), what the runtime counts is
    what was recorded, and what travels is what was predicted."""
    ids_TLK, _ = replay.tokens(0)
    experts, layers = replay.recording.num_experts, range(ids_TLK.shape[1])
    recorded_LE = [np.bincount(ids_TLK[:, l].ravel(), minlength=experts).tolist() for l in layers]
    digests = set()
    for name in replay.plans:
        taken = group.step(replay.spans(0), 1, TrafficVariant(name), digest=True)
        digests.add(taken.digests)
        if taken.chosen_LE != recorded_LE:
            raise InternalError(f"plan {name}: the runtime chose other experts than were recorded")
        expected = replay.predicted(name, 0)
        counted = (taken.inter_copies, taken.copies - taken.inter_copies)
        if counted != (expected.inter, expected.intra):
            raise InternalError(
                f"plan {name}: {counted} copies between hosts and within them; the cost model "
                f"predicts {(expected.inter, expected.intra)}"
            )
    if len(digests) > 1:
        raise InternalError(f"{len(digests)} different logits by {len(replay.plans)} plans")
