"""An engine whose prompts run in another process: what that takes, and the parts of it.

ConfigError where ``--split semi`` is asked for together with what it cannot do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from moeserve.config.options import EngineOptions, LoadOptions
from moeserve.core import FinishReason, StepPlan, Timing
from moeserve.engine.loop import EngineLock
from moeserve.engine.policies.split import CoreShare
from moeserve.engine.policies.targets import LatencyTargets
from moeserve.engine.rank_model import RankModel
from moeserve.engine.semi.process import PromptsProcess
from moeserve.engine.semi.scheduler import SplitScheduler
from moeserve.engine.semi.steps import SplitSteps
from moeserve.engine.semi.table import shared_table
from moeserve.engine.semi.worker import PromptsModel
from moeserve.errors import ConfigError
from moeserve.kernels.select import num_threads, set_threads
from moeserve.kernels.shared_memory import SharedMemory
from moeserve.models.packed.checkpoint import PackedCheckpoint
from moeserve.models.packed.layout import is_packed


class Split:
    """Owns the other process and the shared memory. ``table`` is what this process loads its model
    with, then ``start`` may be called, and ``steps`` for the engine."""

    def __init__(self, options: EngineOptions, folder: Path, targets: LatencyTargets) -> None:
        require_one_process_could(options, folder)
        self._checkpoint = PackedCheckpoint.open(folder)
        self._load = LoadOptions(**{n: getattr(options, n) for n in LoadOptions.model_fields})
        self._memory = SharedMemory.make("moeserve-kv")
        self.table = shared_table(options.threads, self._memory)
        self.cores = CoreShare(num_threads(), targets)
        self._steps: SplitSteps | None = None
        self._process: PromptsProcess | None = None

    @property
    def process(self) -> PromptsProcess:
        assert self._process is not None, "not started"
        return self._process

    def start(self, own: RankModel, block_size: int) -> None:
        """The other process, over the KV of ``own``. UnavailableError where it does not come up."""
        self._memory.seal()
        model = PromptsModel(
            self._checkpoint.path,
            self._load,
            own.size.num_blocks,
            block_size,
            own.eos_ids,
            self.cores.elsewhere(newest=True),
        )
        check = self._checkpoint.require_unchanged
        self._process = PromptsProcess(model, self._memory, check)
        self._process.open()

    def steps(self, scheduler: SplitScheduler, own: RankModel, lock: EngineLock) -> SplitSteps:
        """For an engine of this scheduler and lock."""
        self._steps = SplitSteps(
            scheduler, own.executor, self.process, self.cores, set_threads, time.monotonic, lock
        )
        return self._steps

    def close(self, *, stopped: bool = True) -> None:
        """After the engine, if that has ``stopped``."""
        if self._process is not None:
            self._process.close()
        if stopped and self._steps is not None:
            self._steps.close()
        self._memory.close()


class SharedCores:
    """An ``EngineObserver`` by which the share of cores follows the targets."""

    def __init__(self, cores: CoreShare) -> None:
        self._cores = cores

    def on_step(self, plan: StepPlan, seconds: float) -> None: ...

    def on_gaps(self, gaps: Mapping[float, int]) -> None:
        self._cores.note_gaps(gaps)

    def on_first_token(self, timing: Timing) -> None:
        if timing.first_token_s is not None:
            self._cores.note_first(timing.first_token_s)

    def on_finish(self, reason: FinishReason, timing: Timing) -> None: ...


def require_one_process_could(options: EngineOptions, folder: Path) -> None:
    """ConfigError with the remedy, for what only one process can do."""
    refuse = partial(_refuse, options)
    if not SharedMemory.exists():
        raise ConfigError(
            "split=semi: two processes share KV in memory without a name, which Linux has and this "
            "system has not: leave it out"
        )
    if not is_packed(folder):
        raise ConfigError(
            f"split=semi: two processes map the weights of one packed model, and {folder} is none: "
            f"write one with `moeserve quantize --packed --model {folder} --out FOLDER`"
        )
    refuse("device", options.device != "cpu", "both processes compute on the CPU")
    refuse("memory", options.memory is not None, "experts that come from disk have one reader")
    refuse("objective", options.objective == "throughput", "it is made for latency")
    refuse(
        "prefill_mode",
        options.prefill_mode != "chunk",
        "prompts delay no token of others, in groups of layers or not",
    )
    refuse(
        "speculation",
        options.asks_the_module,
        "the module that guesses would not see the prompts; ngram and draft work",
    )
    refuse("record_routing", options.record_routing is not None, "only one process is recorded")
    refuse("count_experts", options.count_experts, "only one process would be counted")


def _refuse(options: EngineOptions, name: str, given: bool, why: str) -> None:
    if given:
        value = getattr(options, name)
        raise ConfigError(f"split=semi with {name}={value}: {why}: leave one of the two out")
