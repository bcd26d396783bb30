"""Which layers of a step are done, asked while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.core import Chunk, Counters, Request, RequestId, SamplingParams, StepPlan
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.kv_tensors import watch_kv
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.scheduler import Scheduler
from moeserve.engine.step_progress import StepProgress
from moeserve.kernels.ops import KvCache, Ops, Part, Stack, Step
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import load_decoder

BLOCK = 4
PROMPT = tuple(range(20, 33))


@dataclass
class LayerByLayer:
    """A layer runner that says when a layer's attention is done, before its experts run."""

    ops: Ops
    stack: Stack
    after: Callable[[int], None] = lambda layer: None

    def run(
        self,
        hidden: Sequence[Tensor],
        steps: Sequence[Step | None],
        caches: Sequence[KvCache],
        routed: Sequence[list[Tensor]] | None = None,
    ) -> None:
        for layer, cache in enumerate(caches):
            of_stack = self.stack.layers[layer]
            for x_TH, step in zip(hidden, steps, strict=True):
                if step is None:
                    continue
                self.ops.attend(x_TH, of_stack.attention, step, cache)
                self.after(layer)
                if isinstance(of_stack.mlp, Part):
                    self.ops.dense(x_TH, of_stack.mlp)
                else:
                    router, experts = of_stack.mlp
                    self.ops.moe(x_TH, experts, self.ops.route(x_TH, router, step))


@pytest.fixture(params=["native", "reference"])
def table(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else choose_ops()


def chunk(name: str, tokens: Sequence[int], blocks: Sequence[int], start: int = 0) -> Chunk:
    asked = Request(RequestId(name), tuple(tokens), SamplingParams(temperature=0))
    return Chunk(asked, tuple(tokens), start, tuple(blocks), samples=1)  # type: ignore[arg-type]


def plan(*chunks: Chunk) -> StepPlan:
    return StepPlan(chunks)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_layer_is_done_when_all_microbatches_have_written_it(
    family: str, parts: int, table: Ops, tiny_checkpoint: Callable[[str], Path]
) -> None:
    decoder = load_decoder(tiny_checkpoint(family), table, LoadOptions(kv_dtype="int8"))
    layers = LayerByLayer(table, decoder.stack)
    runner = ModelRunner(decoder.over(layers), 16, BLOCK)
    kv = watch_kv(runner, table)
    early: list[Tensor] = []
    seen: list[int] = []
    blocks = (3, 5, 1, 7)

    def after(layer: int) -> None:
        running = kv.progress.running
        assert running is not None
        assert set(running.chunks) == {"a", "b"}
        done = kv.progress.layers_done(running.number)
        seen.append(done)
        if done == layer + 1:
            data = torch.empty(4, kv.layouts[layer].nbytes, dtype=torch.uint8)
            kv.export_kv(layer, blocks, data)  # type: ignore[arg-type]
            early.append(data)

    layers.after = after
    scheduled = [chunk("a", PROMPT, blocks), chunk("b", range(60, 72), (0, 2, 4))]
    runner.run(plan(*scheduled), parts)
    count = len(kv.caches)
    assert seen == [layer + int(m + 1 == parts) for layer in range(count) for m in range(parts)]
    assert kv.progress.running is None
    assert kv.progress.layers_done(1) == count
    for layer, data in enumerate(early):
        late = torch.empty_like(data)
        kv.export_kv(layer, blocks, late)  # type: ignore[arg-type]
        assert torch.equal(late[:3], data[:3])  # the last block has a position that nobody wrote
    assert len(early) == count


def test_every_way_to_run_layers_counts_them_once(
    table: Ops, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Prompts, and newest tokens, which a decoder runs as one call after the first time."""
    decoder = load_decoder(tiny_checkpoint("qwen3_moe"), table)
    runner = ModelRunner(decoder, 16, BLOCK)
    kv = watch_kv(runner, table)
    counters = Counters()
    scheduler = Scheduler(SchedulerConfig(64), BlockPool(16, BLOCK, counters), counters)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    scheduler.add(Request(RequestId("a"), PROMPT, params))
    while scheduler.has_work:
        scheduler.apply(runner.run(scheduler.plan(0.0)))
        assert {table.kv_passes(cache) for cache in kv.caches} == {counters.steps}
    assert counters.steps == 6


@dataclass
class Counted:
    """An op table that knows how often each cache was passed."""

    passes: list[int]

    def kv_passes(self, cache: int) -> int:
        return self.passes[cache]


def test_a_step_that_is_over_is_done_and_one_that_failed_is_not() -> None:
    ops = Counted([4, 4, 4])
    progress = StepProgress(ops, range(3))  # type: ignore[arg-type]
    newest = chunk("b", (1,), (1,), 4)._replace(output_ids=[1])
    progress.begin([newest], 1)
    assert progress.running is None  # over soon
    progress.end(ok=True)
    progress.begin([newest, chunk("a", PROMPT, (0, 2, 4, 6))], 1)
    assert progress.running is not None
    assert set(progress.running.chunks) == {"a"}
    ops.passes[:] = 5, 5, 4
    assert progress.layers_done(1) == 2
    progress.end(ok=False)
    assert progress.layers_done(1) == 0
    progress.begin([chunk("a", PROMPT, (0, 2, 4, 6))], 2)
    assert (progress.layers_done(1), progress.layers_done(2)) == (0, 0)
    ops.passes[:] = 7, 6, 5
    assert progress.layers_done(2) == 1
    progress.end(ok=True)
    assert (progress.layers_done(1), progress.layers_done(2)) == (0, 3)
