"""Prompts and answers in the same steps, beside one after the other: what of the weights is read.

    python bench/overlap.py [--model demo] [--requests N] [--prompt P] [--answer G]
                            [--kv-tokens M] [--block N] [--step-tokens N] [--threads N]
                            [--share S] [--schedules NAME ...] [--seconds S] [--json] [--keep FILE]

Requests of one shape, more than KV holds, through scheduler and model runner. Of every step the
experts that its tokens chose are counted, each with the bytes that it has in the files: where
weights stream, that is what has to be read. Three schedules:

    alternating   prompts of all that KV holds at full length, then their answers, then the next
    latency       whoever comes, as blocks are free (`--objective latency`)
    throughput    answers and prompts in every step, started evenly (`--objective throughput`)

Equation 7 of MoE-Lens says how many times more sequences KV holds where they are not all at their
longest together, (p + g) / (p + g/2), and so how many times fewer bytes a token costs where every
step reads all that there is to read; a beginning and an end where fewer run, and blocks that are
half full, take from it, which ``predicted_steps`` counts. Tokens of all schedules
must be equal. Seconds are there, too; on a model in memory they show little of it. With ``--share``
the model is a packed one of whose experts that share is in memory, the others are read from disk as
steps need them: ``read_bytes_per_token`` and tokens per second are what comes of it.

Schedules take turns of a second each, so that whatever else the machine does slows all alike. After
``--seconds`` of all together they stop; a row then has ``left`` requests, and tokens are compared
as far as both have them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeserve.config.options import RankModelOptions
from moeserve.core import Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.policies.throughput import ThroughputAdmission
from moeserve.engine.rank_model import choose_table
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.sequence import SequenceState
from moeserve.engine.step_builder import StepBuilder
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.expert_source import expert_bytes
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.models.spec import MoeSpec
from moeserve.offload.model.steady import begin_per_step
from moeserve.offload.model.workload import ServerBounds, UniformWorkload
from moeserve.offload.runner import StreamedLayerRunner
from offload import with_share

TURN_S = 1.0
SCHEDULES = ("alternating", "latency", "throughput")


class ReadsDominate:
    """A ``StepCost`` of weights that stream: a step costs the same however many tokens it has."""

    def seconds(self, prefill_tokens: int, decode_tokens: int, context_tokens: int) -> float:
        return 1.0


class Alternating(Scheduler):
    """Prompts of all that find room at full length, without answers; then these, without prompts;
    when all have ended, the next ones."""

    _prefilling = True

    def begin(self, now: float) -> StepBuilder:
        unfinished = any(not seq.generating for seq in self._running.values())
        first = next(iter(self._waiting.values()), None)
        more = self._prefilling and first is not None and self._fits(first)
        self._prefilling = unfinished or more or not self._running
        return super().begin(now)

    def has_room(self, builder: StepBuilder, seq: SequenceState) -> bool:
        return self._prefilling and self._fits(seq) and super().has_room(builder, seq)

    def _fits(self, seq: SequenceState) -> bool:
        longest = [s.length + s.request.params.max_tokens for s in (*self._running.values(), seq)]
        return (
            len(longest) <= self.config.max_num_seqs
            and sum(map(self.pool.blocks_for, longest)) <= self.pool.num_blocks
        )

    def _grow_generating(self, preempted: list[RequestId]) -> list[SequenceState]:
        return [] if self._prefilling else super()._grow_generating(preempted)


class ExpertReads:
    """A ``StepObserver`` that counts, of every step, each expert of a layer once."""

    def __init__(self) -> None:
        self.experts = 0

    def begin(self, plan: StepPlan) -> None: ...

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        self.experts += len(np.unique(ids_TC))

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Row:
    """``bytes_per_token`` are of experts that steps chose, ``read_bytes_per_token`` what came from
    disk; ``factor`` is how many times fewer of the former than alternating, ``speedup`` how many
    times more tokens per second. ``left`` requests were not through when time was up."""

    schedule: str
    steps: int
    tokens: int
    tokens_per_step: float
    expert_reads: int
    bytes_per_token: float
    preemptions: int
    seconds: float
    read_bytes_per_token: float
    left: int = 0
    factor: float = 1.0
    speedup: float = 1.0

    def beside(self, first: Row) -> Row:
        """The same with what is in comparison to the first schedule."""
        return replace(
            self,
            factor=first.bytes_per_token / self.bytes_per_token,
            speedup=first.seconds / first.tokens * self.tokens / self.seconds,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the requests, and of what they run in."""

    requests: int
    prompt: int
    answer: int
    kv_tokens: int
    step_tokens: int
    block: int = 16

    @property
    def num_blocks(self) -> int:
        return self.kv_tokens // self.block

    @property
    def predicted(self) -> float:
        """Equation 7."""
        return (self.prompt + self.answer) / (self.prompt + self.answer / 2)

    @property
    def predicted_steps(self) -> float:
        """How many times fewer steps there are when requests are staggered than in phases, with
        the beginning and the end of both, and whole blocks of KV."""
        work = UniformWorkload(self.requests, self.prompt, self.answer)
        most = self.config.max_num_seqs
        bounds = ServerBounds(most, self.step_tokens, self.block, self.num_blocks)
        together = bounds.concurrent(work)
        prompts = -(-together * self.prompt // self.step_tokens)
        phases = -(-self.requests // together) * (prompts + self.answer - 1)
        return phases / (self.requests / begin_per_step(work, bounds) + self.answer - 1)

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_model_len=self.prompt + self.answer + 1,
            max_num_seqs=min(self.step_tokens, self.requests),
            max_num_batched_tokens=self.step_tokens,
            max_queue=self.requests,
            prefix_cache=False,
        )

    def make_requests(self, vocab: int) -> list[Request]:
        params = SamplingParams(max_tokens=self.answer, temperature=0, ignore_eos=True)
        drawn = np.random.default_rng(0).integers(0, vocab, (self.requests, self.prompt))
        return [
            Request(RequestId(str(i)), tuple(ids), params) for i, ids in enumerate(drawn.tolist())
        ]


def scheduler_of(schedule: str, shape: Shape, pool: BlockPool, counters: Counters) -> Scheduler:
    match schedule:
        case "alternating":
            return Alternating(shape.config, pool, counters)
        case "latency":
            return Scheduler(shape.config, pool, counters)
        case _:
            admission = ThroughputAdmission(ReadsDominate(), shape.config.max_model_len)
            return Scheduler(shape.config, pool, counters, admission)


class Run:
    """One schedule, a turn at a time, over a decoder: its own where experts are streamed."""

    def __init__(self, schedule: str, shape: Shape, decoder: Decoder, nbytes: int) -> None:
        self._decoder, self._shape, self._nbytes = decoder, shape, nbytes
        self.schedule, self.over = schedule, False
        self._counters, self._reads, self._took = Counters(), ExpertReads(), 0.0
        pool = BlockPool(shape.num_blocks, shape.block, self._counters)
        scheduler = scheduler_of(schedule, shape, pool, self._counters)
        runner = ModelRunner(decoder, pool.num_blocks, shape.block, observer=self._reads)
        requests = shape.make_requests(decoder.spec.vocab)
        self.made: dict[RequestId, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            scheduler.add(request)
        self._outcomes = drive(scheduler, runner)

    def turn(self, seconds: float) -> float:
        """Steps for so long, or until all is done; what it took."""
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds and not self.over:
            outcome = next(self._outcomes, None)
            self.over = outcome is None
            if outcome is not None:
                outcome.raise_failure()
                for out in outcome.outs:
                    self.made[out.request_id].append(out.token_id)
        self._took += took
        return took

    def row(self) -> Row:
        counters, experts = self._counters, self._reads.experts
        tokens = counters.computed_tokens - counters.recomputed_tokens
        return Row(
            self.schedule,
            counters.steps,
            tokens,
            tokens / counters.steps,
            experts,
            experts * self._nbytes / tokens,
            counters.preemptions,
            self._took,
            read_so_far(self._decoder) / tokens,
            sum(len(token_ids) < self._shape.answer for token_ids in self.made.values()),
        )

    def close(self) -> None:
        if isinstance(self._decoder.runner, StreamedLayerRunner):
            self._decoder.runner.close()


def take_turns(runs: Sequence[Run], most_s: float) -> None:
    """Until all are through, or all together have had so many seconds."""
    left = most_s
    while left > 0 and not all(run.over for run in runs):
        left -= sum(run.turn(TURN_S) for run in runs if not run.over)


def alike(
    some: Mapping[RequestId, Sequence[int]], others: Mapping[RequestId, Sequence[int]]
) -> bool:
    """Whether answers are the same as far as both have come."""
    return all(a == b for of, made in some.items() for a, b in zip(made, others[of], strict=False))


def read_so_far(decoder: Decoder) -> int:
    """Bytes of weights that came from disk since the model was loaded."""
    runner = decoder.runner
    return runner.stream.mover.counts().bytes if isinstance(runner, StreamedLayerRunner) else 0


def main() -> None:
    shape, args = read_arguments()
    path, ops = resolve_model(args.model), choose_table("cpu", args.threads)
    decoder = load(path, ops, args.share)
    mlps = (layer.mlp for layer in decoder.spec.layers)
    experts = max(mlp.router.num_experts for mlp in mlps if isinstance(mlp, MoeSpec))
    nbytes = expert_bytes(open_checkpoint(path), decoder.spec.moe_layers, experts)
    runs = []
    for schedule in args.schedules:
        runs.append(Run(schedule, shape, decoder, nbytes))
        if args.share is not None and len(runs) < len(args.schedules):
            decoder = load(path, ops, args.share)
    take_turns(runs, args.seconds)
    rows = [run.row() for run in runs]
    rows = [row.beside(rows[0]) for row in rows]
    for run in runs:
        run.close()
        if not alike(run.made, runs[0].made):
            raise SystemExit(f"{run.schedule}: other tokens than {runs[0].schedule}")
    if args.keep is not None:
        args.keep.write_text(json.dumps(found(shape, rows), indent=1) + "\n")
    if args.json:
        print(json.dumps(found(shape, rows)))
    else:
        show(shape, rows)


def found(shape: Shape, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "shape": asdict(shape),
        "predicted": shape.predicted,
        "predicted_steps": shape.predicted_steps,
        "rows": [asdict(row) for row in rows],
    }


def load(path: Path, ops: Ops, share: float | None) -> Decoder:
    """All in memory, or of a packed model's experts a share."""
    if share is None:
        return load_decoder(path, ops)
    return with_share(RankModelOptions(model=str(path), memory=1 << 50), ops, share)[0]


def read_arguments() -> tuple[Shape, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Weights read per token, by schedule.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--block", type=int, default=16, help="tokens of a block of KV")
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--share", type=float, help="of a packed model's experts in memory")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most, of all schedules")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="for the raw figures")
    args = parser.parse_args()
    sizes = (args.requests, args.prompt, args.answer, args.kv_tokens, args.step_tokens)
    return Shape(*sizes, args.block), args


def show(shape: Shape, rows: Sequence[Row]) -> None:
    table = Table(box=SIMPLE)
    names = ("schedule", "steps", "tokens/step", "experts read", "kB/token", "fewer", "preempted")
    for name in (*names, "seconds", "read kB/token", "tokens/s"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for row in rows:
        table.add_row(
            row.schedule,
            str(row.steps),
            f"{row.tokens_per_step:.1f}",
            str(row.expert_reads),
            f"{row.bytes_per_token / 1e3:.1f}",
            f"{row.factor:.2f}x",
            str(row.preemptions),
            f"{row.seconds:.2f}",
            f"{row.read_bytes_per_token / 1e3:.1f}",
            f"{row.speedup:.2f}x",
        )
    console = Console()
    console.print(table)
    console.print(
        f"equation 7 predicts {shape.predicted:.2f}x, with beginning, end and whole blocks "
        f"{shape.predicted_steps:.2f}x"
    )


if __name__ == "__main__":
    main()
