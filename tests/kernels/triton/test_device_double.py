"""An engine's path over Triton's kernels, on a device in name: no tensor of the host is given where
one of the device is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from moeserve.comm import build
from moeserve.comm.exchange import open as open_exchanges
from moeserve.comm.exchange.media import HostMedium
from moeserve.comm.group import Group, Topology
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.config.options import EpOptions, RankModelOptions
from moeserve.core import BlockId, Counters, Request, RequestId, SamplingParams
from moeserve.engine import device_memory, rank_model
from moeserve.engine.blocks import BlockPool
from moeserve.engine.bounds import SchedulerConfig
from moeserve.engine.drive import drive
from moeserve.engine.rank_model import EpContext, RankModel, load_rank_model
from moeserve.engine.scheduler import Scheduler
from moeserve.errors import InternalError
from moeserve.kernels.device import Card
from moeserve.kernels.guesses import GuessModule, GuessRows
from moeserve.kernels.ops import HeadWeights, KvShape, Ops, Rope
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.triton.double import (
    DEVICE,
    Crossings,
    OnDevice,
    bare,
    device_double,
    device_thread,
)
from moeserve.observe.progress import Progress

Load = Callable[[str], Path]


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with device_double() as seen:
        yield seen


@pytest.fixture
def there(crossings: Crossings) -> Any:
    """The op table of the device."""
    from moeserve.kernels.triton.ops import TritonOps

    return TritonOps(DEVICE)


def test_tensors_of_host_and_device_do_not_mix(crossings: Crossings) -> None:
    far = torch.ones(3, device=DEVICE)
    near = torch.ones(3)
    assert isinstance(far, OnDevice)
    assert torch.equal((far + far.view(3) * 2.0).cpu(), 3 * near)
    with pytest.raises(InternalError, match="aten::add"):
        far + near
    with pytest.raises(InternalError, match="aten::index"):
        far[torch.tensor([0])]
    far[torch.tensor([0]).to(DEVICE)] = 5.0
    assert far.tolist() == [5.0, 1.0, 1.0]
    assert float(far.sum()) == 7.0
    assert (crossings.to_host, crossings.to_device, crossings.waits) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_blocks_leave_the_device_and_enter_it(there: Ops, dtype: torch.dtype) -> None:
    shape = KvShape(4, 2, 1, 8, 8, dtype)
    ours, theirs = there.new_kv(shape), ReferenceOps().new_kv(shape)
    reference = ReferenceOps()
    k, v, slots = torch.randn(4, 1, 8), torch.randn(4, 1, 8), torch.tensor([2, 3, 6, 7])
    reference.write_kv(theirs, k, v, slots)
    bytes_NX = reference.export_kv(theirs, torch.tensor([1, 3]))
    there.import_kv(ours, torch.tensor([2, 0]), bytes_NX)
    assert torch.equal(there.export_kv(ours, torch.tensor([2, 0])), bytes_NX)


def test_guesses_follow_states_that_lie_on_the_device(there: Ops) -> None:
    assert guesses_of(there) == guesses_of(ReferenceOps())


def guesses_of(ops: Ops) -> list[list[int]]:
    """Two behind each of two sequences, by a module without layers."""
    torch.manual_seed(5)
    project, head = ops.pack_linear(torch.randn(8, 16)), ops.pack_linear(torch.randn(9, 8))
    module = GuessModule(
        trunk_norm_H=torch.rand(8),
        embedding_norm_H=torch.rand(8),
        hidden_norm_H=torch.rand(8),
        eps=1e-6,
        embedding_WH=torch.randn(9, 8),
        project=project,
        rope=Rope(torch.randn(40, 2), torch.randn(40, 2), interleaved=False),
        stack=ops.stack_layers([]),
        head=ops.prepare(HeadWeights(torch.rand(8), 1e-6, head)),
        run=lambda x_TH, step, cache: None,
    )
    guess = ops.new_guesser(module, ops.new_kv(KvShape(2, 4, 1, 8, 8, torch.float32)), 4)
    states_TH = torch.randn(4, 8).to(ops.device)
    return guess(GuessRows(states_TH, [0, 1, 3], [4, 2, 7], [2, 1], [0, 0], [0, 8], [[1], [0]]), 2)


PROMPT = (17, 300, 5, 88)
ASKED = {
    "greedy": SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=2, seed=7, top_p=0.9, logprobs=1, ignore_eos=True),
}


Tokens = dict[str, list[int]]


def tokens_of(
    own: RankModel, prompt: tuple[int, ...] = PROMPT, asked: dict[str, SamplingParams] = ASKED
) -> Tokens:
    """By a scheduler and the runner, without an engine's thread."""
    counters = Counters()
    config = SchedulerConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = Scheduler(config, BlockPool(own.size.num_blocks, 8, counters), counters)
    for name, params in asked.items():
        scheduler.add(Request(RequestId(name), prompt, params))
    made: dict[str, list[int]] = {name: [] for name in asked}
    for outcome in drive(scheduler, own.executor):
        outcome.raise_failure()
        for out in outcome.outs:
            made[out.request_id].append(out.token_id)
    return made


def loaded(folder: Path, table: Ops, trace: Path, patch: pytest.MonkeyPatch) -> RankModel:
    card = Card("a card", 1 << 33, 1 << 33)
    patch.setattr(device_memory, "free_memory", lambda _: card)
    patch.setattr(rank_model, "choose_table", lambda *_, **__: table)
    return load_rank_model(options_of(folder, trace))


def options_of(folder: Path, trace: Path | None = None) -> RankModelOptions:
    return RankModelOptions(
        model=str(folder),
        device="cuda",
        block_size=8,
        num_blocks=16,
        dtype="float32",
        max_num_batched_tokens=16,
        max_num_seqs=4,
        record_routing=trace,
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_an_engines_steps_give_a_device_what_is_its_own(
    there: Ops, crossings: Crossings, tiny_checkpoint: Load, tmp_path: Path
) -> None:
    """Weights, prompts, decodes of two requests, their sampling, their routing, their KV."""
    folder = tiny_checkpoint("qwen3_moe")
    with pytest.MonkeyPatch.context() as patch:
        reference = loaded(folder, ReferenceOps(), tmp_path / "a.jsonl", patch)
        own = loaded(folder, there, tmp_path / "b.jsonl", patch)
    with closing(reference), closing(own):
        check_steps_and_blocks(own, tokens_of(reference))
    assert crossings.to_host


def check_steps_and_blocks(own: RankModel, theirs: dict[str, list[int]]) -> None:
    assert tokens_of(own) == theirs
    blocks = [BlockId(1), BlockId(2)]
    rows_NX = torch.zeros(2, own.kv.layouts[0].nbytes, dtype=torch.uint8)
    own.kv.export_kv(0, blocks, rows_NX)
    own.kv.import_kv(1, blocks, rows_NX)
    again_NX = torch.zeros_like(rows_NX)
    own.kv.export_kv(1, blocks, again_NX)
    assert torch.equal(again_NX, rows_NX)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_attention_on_the_host_leaves_the_rest_to_the_device(
    crossings: Crossings, tiny_checkpoint: Load, tmp_path: Path
) -> None:
    """KV lies in host memory; tokens are the reference's."""
    from moeserve.kernels.triton.host_attention import HostAttentionOps

    folder, host = tiny_checkpoint("gpt_oss"), ReferenceOps()
    table = HostAttentionOps(DEVICE, host)
    with pytest.MonkeyPatch.context() as patch:
        reference = loaded(folder, ReferenceOps(), tmp_path / "a.jsonl", patch)
        own = loaded(folder, table, tmp_path / "b.jsonl", patch)
    with closing(reference), closing(own):
        check_steps_and_blocks(own, tokens_of(reference))
    assert table.kv_passes(own.kv.caches[0]) > 2
    assert not isinstance(own.kv.caches[0].data.cache.data.values.x_BPGD, OnDevice)


SHORT = {"greedy": SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)}


def rank_of_two(r: int, store: Store, folder: Path, prompt: tuple[int, ...]) -> Tokens:
    """A thread on a device of its own; its requests take as many steps as the other's."""
    with device_thread():
        options = EpOptions(microbatches=2, ep_deadline=60.0)
        context = EpContext(Group(r, 2, store), Topology((0, 0)), Progress(), options)
        own = load_rank_model(options_of(folder), context=context)
        with closing(own):
            layers = cast("ParallelLayerRunner", own.decoder.runner)
            assert all(one is None or one.wire.wide for one in layers.sharded)
            return tokens_of(own, prompt, SHORT)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_ranks_of_an_engine_give_the_tokens_of_one(
    crossings: Crossings, tiny_checkpoint: Load, tmp_path: Path
) -> None:
    """Experts are shared, records stay on the devices, gloo carries bytes in NCCL's place."""
    from moeserve.kernels.triton.ops import TritonOps

    folder, prompts = tiny_checkpoint("qwen3_moe"), (PROMPT, PROMPT[::-1])
    tables = [TritonOps(DEVICE) for _ in prompts]
    with pytest.MonkeyPatch.context() as patch:
        whole = loaded(folder, ReferenceOps(), tmp_path / "a.jsonl", patch)
        patch.setattr(rank_model, "choose_table", lambda _, __, place, **___: tables[place])
        patch.setattr(build, "meet", lambda *_: "nccl")
        patch.setattr(
            open_exchanges, "open_stream_medium",
            lambda group, key, device: HostMedium.open(group, key, device, bare),
        )  # fmt: skip
        store = HashStore()
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(rank_of_two, range(2), [store] * 2, [folder] * 2, prompts, timeout=600)
            tokens = list(found)
    with closing(whole):
        assert tokens == [tokens_of(whole, prompt, SHORT) for prompt in prompts]
