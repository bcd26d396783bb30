"""Host memory for the KV of preempted requests: a ``swapping.SwapMemory`` beside the caches.

One stretch of memory, of which pages are taken when they are first written. A run of positions lies
there cache by cache, each as ``kernels.kv_runs`` lays it out; all runs of a call are copied in one
native call, with a digest each (XXH3-128 over the run's key, its place in the sequence, and its
bytes), which is checked when they come back. Letters: R runs, X bytes, D bytes of a digest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch

from moeserve.core import BlockId
from moeserve.engine.kv_tensors import KvTensors
from moeserve.engine.policies.swap import CopyRate
from moeserve.engine.swap_space import SwapRun
from moeserve.errors import ConfigError
from moeserve.kernels.kv_runs import run_bytes
from moeserve.kernels.ops import KvRuns


class HostSwapMemory:
    """As many places as ``nbytes`` hold; ConfigError where that is none."""

    def __init__(
        self,
        tensors: KvTensors,
        nbytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        widths = [run_bytes(layout, 1) for layout in tensors.layouts]
        self.caches = len(widths)
        self.place_bytes = sum(widths)
        self.places = nbytes // self.place_bytes
        if not self.places:
            raise ConfigError(
                f"swap_memory={nbytes}: the KV of one token takes {self.place_bytes} bytes: give "
                "room for thousands of tokens, or 0 for no swapping"
            )
        self._tensors = tensors
        self._clock = clock
        self._rate = CopyRate()
        self._before_L = np.array([0, *accumulate(widths)][:-1])
        self._memory_X = memory_of(self.places * self.place_bytes)
        self._digests_RD: dict[int, torch.Tensor] = {}  # of each cache, by a run's first place

    @property
    def byte_s(self) -> float:
        return self._rate.byte_s

    def copy_out(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> None:
        """InternalError where a run names what is not there."""
        began = self._clock()
        digests_RD = self._tensors.export_runs(blocks, self._laid(runs, keys), self._memory_X)
        self._note(runs, began)
        for run, digests in zip(runs, torch.split(digests_RD, self.caches), strict=True):
            self._digests_RD[run.at] = digests

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        """InternalError where a run names what is not there."""
        digests_RD = torch.cat([self._digests_RD[run.at] for run in runs])
        began = self._clock()
        laid = self._laid(runs, keys)
        right_R = self._tensors.import_runs(blocks, laid, digests_RD, self._memory_X)
        self._note(runs, began)
        return bool(right_R.all())

    def _note(self, runs: Sequence[SwapRun], began: float) -> None:
        nbytes = sum(run.count for run in runs) * self.place_bytes
        self._rate.note(nbytes, self._clock() - began)

    def _laid(self, runs: Sequence[SwapRun], keys: Sequence[bytes]) -> KvRuns:
        """Run by run, of each all caches."""
        caches = np.arange(self.caches)
        rows = [
            np.stack(
                (
                    caches,
                    np.full(self.caches, run.start),
                    np.full(self.caches, run.count),
                    run.at * self.place_bytes + self._before_L * run.count,
                ),
                axis=1,
            )
            for run in runs
        ]
        runs_R4 = np.concatenate(rows).astype(np.int64)
        keys_RH = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        heads = (np.repeat(keys_RH, self.caches, axis=0), runs_R4[:, :3].copy().view(np.uint8))
        heads_RH = np.concatenate(heads, axis=1)
        return KvRuns(torch.from_numpy(runs_R4), torch.from_numpy(heads_RH))


def memory_of(nbytes: int) -> torch.Tensor:
    """uint8 [X]. ConfigError where this host does not give so much."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise ConfigError(
            f"swap_memory={nbytes}: this host does not give so much memory: give less"
        ) from error
