"""Experts that are read as they are needed give the bits of experts that are all in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moeserve.errors import ConfigError, DataLossError, DeadlineError
from moeserve.kernels.ops import Layer, MoeWeights, Ops, Part
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.kernels.wire import Combine
from moeserve.models.batch import GroupPass, Span, pack_spans
from moeserve.models.decoder import Decoder
from moeserve.offload.arena import Arena
from moeserve.offload.disk_file import DiskFile, DiskRegion
from moeserve.offload.experts import ExpertStream
from moeserve.offload.foresight import Prediction, PredictionGate
from moeserve.offload.mover import PAGE, DiskMover, PlainMover, Ticket, open_mover
from moeserve.offload.residency import Residency
from moeserve.offload.runner import StreamedLayerRunner

LoadDecoder = Callable[[str], Decoder]
Serve = Callable[[Decoder], list[Any]]
BLOCK, BLOCKS = 4, 24


@pytest.fixture(scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    """The fastest, or the reference where a test asks for it."""
    return ReferenceOps() if getattr(request, "param", "") == "reference" else choose_ops()


@dataclass(frozen=True)
class Records:
    """The experts of a decoder, written to a file as records."""

    path: Path
    most: int
    offsets: Mapping[int, Sequence[tuple[int, int, bytes]]]


def mixtures(decoder: Decoder) -> dict[int, Part[MoeWeights]]:
    layers = enumerate(decoder.stack.layers)
    return {l: layer.mlp[1] for l, layer in layers if isinstance(layer.mlp, tuple)}


def write_records(decoder: Decoder, path: Path) -> Records:
    ops, offsets, most = decoder.ops, dict[int, list[tuple[int, int, bytes]]](), 0
    with path.open("wb") as out:
        for l, part in mixtures(decoder).items():
            nbytes = ops.record_layout(part.weights.experts).nbytes
            most = max(most, nbytes)
            record = torch.empty(nbytes, dtype=torch.uint8)
            offsets[l] = []
            for e in range(part.weights.experts.num_experts):
                ops.write_record(part.weights.experts, e, record)
                data = record.numpy().tobytes()
                offsets[l].append((out.tell(), nbytes, xxhash.xxh3_128(data).digest()))
                out.write(data)
    os.utime(path, (1, 1))  # written long before it is served
    return Records(path, most, offsets)


@contextmanager
def streamed(
    whole: Decoder,
    records: Records,
    slots: int,
    prediction: Prediction = "off",
    mover: DiskMover | None = None,
    **how: Any,
) -> Iterator[tuple[Decoder, StreamedLayerRunner]]:
    """The decoder with so many slots for its experts."""
    file, moves = DiskFile.open(records.path), mover or open_mover()
    regions = {
        l: [DiskRegion(file, *place) for place in places] for l, places in records.offsets.items()
    }
    counts = [len(regions.get(l, ())) for l in range(len(whole.spec.layers))]
    arena = Arena(slots, records.most)
    stream = ExpertStream(regions, arena, Residency(counts, slots), moves, **how)
    layers = []
    for layer in whole.stack.layers:
        if isinstance(layer.mlp, Part):
            layers.append(layer)
            continue
        router, part = layer.mlp
        layout = replace(whole.ops.record_layout(part.weights.experts), nbytes=arena.nbytes)
        experts = whole.ops.experts_over(arena.memory, layout, slots)
        moe = whole.ops.prepare(replace(part.weights, experts=experts))
        layers.append(Layer(layer.attention, (router, moe)))
    runner = StreamedLayerRunner(whole.ops, layers, stream, PredictionGate(prediction))
    yield whole.over(runner), runner
    moves.close()
    file.close()


def widest(decoder: Decoder) -> int:
    return max(part.weights.experts.num_experts for part in mixtures(decoder).values())


@pytest.mark.parametrize("prediction", ["on", "off", "auto"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "qwen3_moe", "gpt_oss", "mixtral"])
def test_the_bits_are_those_of_a_model_in_memory(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path, family: str, prediction: Prediction
) -> None:
    """For rooms from fewer slots than a layer has experts to one for each expert there is."""
    whole = tiny_decoder(family)
    records = write_records(whole, tmp_path / "experts.bin")
    expected, each = serve(whole), sum(map(len, records.offsets.values()))
    for slots in (3, 2 * widest(whole), each):
        with streamed(whole, records, slots, prediction) as (decoder, runner):
            assert serve(decoder) == expected, slots
            counts = runner.stream.counts
            read = runner.stream.mover.counts()
            assert counts.misses > 0
            assert counts.waves >= counts.layers
            if slots == each:
                # Each expert is read once at most: as it was missed, or ahead of its layer.
                assert read.reads - read.cancelled <= each
                before = replace(counts)
                assert serve(decoder) == expected
                assert counts.misses == before.misses


@pytest.mark.parametrize("beside", [[Span([5, 6, 7], 0, [9])], []], ids=["beside others", "alone"])
def test_rows_that_run_in_one_layer_a_step_have_the_same_bits(
    tiny_decoder: LoadDecoder, tmp_path: Path, beside: list[Span]
) -> None:
    """Also where no other row wants the layers that they are not in."""
    whole = tiny_decoder("deepseek_v3")
    prompt = Span(range(20, 31), 0, [0, 1, 2])
    expected = whole.forward(pack_spans([prompt], BLOCK), whole.new_cache(BLOCKS, BLOCK))
    records = write_records(whole, tmp_path / "experts.bin")
    layers = len(whole.spec.layers)
    with streamed(whole, records, 2 * widest(whole), "on") as (decoder, _):
        cache, states = decoder.new_cache(BLOCKS, BLOCK), None
        for layer in range(layers):
            step = pack_spans([*beside, prompt], BLOCK)
            group = GroupPass(layer, layer + 1, layer + 1 == layers, len(prompt.token_ids), states)
            logits = decoder.forward(replace(step, group=group), cache)
            states = group.states_PH
        assert torch.equal(logits[-1:], expected)


def test_rows_in_waves_have_the_bits_of_rows_at_once(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few they are."""
    whole = tiny_decoder("qwen3_moe")
    records, waves = write_records(whole, tmp_path / "experts.bin"), []
    for parts_from in (0, 1 << 20):
        monkeypatch.setattr("moeserve.offload.runner.PARTS_FROM", parts_from)
        with streamed(whole, records, 2 * widest(whole)) as (decoder, runner):
            assert serve(decoder) == serve(whole)
            counts = runner.stream.counts
            waves.append(counts.waves / counts.layers)
    assert waves[0] > 1.2 > 1.0 == waves[1]


@pytest.mark.parametrize("ops", ["reference"], indirect=True)
def test_the_reference_gives_its_own_bits_too(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path
) -> None:
    whole = tiny_decoder("mixtral")
    records = write_records(whole, tmp_path / "experts.bin")
    expected = serve(whole)
    for slots in (3, 2 * widest(whole)):
        with streamed(whole, records, slots, "on") as (decoder, _):
            assert serve(decoder) == expected, slots


def test_every_other_family_is_served_from_two_layers_of_slots(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path
) -> None:
    for family in ("deepseek_v2", "deepseek_v2_lite", "olmoe", "glm4_moe", "mixtral_llama3"):
        whole = tiny_decoder(family)
        records = write_records(whole, tmp_path / "experts.bin")
        with streamed(whole, records, 2 * widest(whole), "on") as (decoder, _):
            assert serve(decoder) == serve(whole), family


def test_ordered_sums_are_the_same_in_parts_and_fast_ones_are_refused(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path
) -> None:
    whole = tiny_decoder("qwen2_moe")
    for combine in (Combine.ORDERED, Combine.FAST):
        layers = []
        for layer in whole.stack.layers:
            mlp = layer.mlp
            if isinstance(mlp, tuple):
                mlp = mlp[0], whole.ops.prepare(replace(mlp[1].weights, combine=combine))
            layers.append(Layer(layer.attention, mlp))
        stack = whole.ops.stack_layers(layers)
        runner = replace(whole.runner, stack=stack)  # type: ignore[type-var]
        other = replace(whole, stack=stack, runner=runner)
        records = write_records(other, tmp_path / "experts.bin")
        if combine is Combine.ORDERED:
            with streamed(other, records, 5) as (decoder, _):
                assert serve(decoder) == serve(other)
        else:
            with (
                pytest.raises(ConfigError, match="combine='fast'"),
                streamed(other, records, 5),
            ):
                pass


def test_what_is_predicted_is_read_before_its_layer_and_counted(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path
) -> None:
    whole = tiny_decoder("deepseek_v3")
    records = write_records(whole, tmp_path / "experts.bin")
    with streamed(whole, records, 2 * widest(whole), "on") as (decoder, runner):
        serve(decoder)
        counts, moved = runner.stream.counts, runner.stream.mover.counts()
        assert counts.ahead_used > 0
        assert counts.wasted_bytes <= counts.ahead_wasted * records.most
        ahead = counts.ahead_used + counts.ahead_wasted
        assert moved.reads == counts.misses + ahead
    with streamed(whole, records, 2 * widest(whole), "off") as (decoder, runner):
        cache = decoder.new_cache(BLOCKS, BLOCK)
        for position in range(3):
            decoder.forward(pack_spans([Span([7], position, [0])], BLOCK), cache)
        assert runner.stream.counts.ahead_used == runner.stream.counts.ahead_wasted == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=40))
def test_what_was_read_in_vain_holds_no_slot_once_it_is_there(
    chosen: list[tuple[int, int]],
) -> None:
    """Slots that it held for good would be fewer for what is needed, step by step."""

    class Begun(PlainMover):
        """All reads have begun at once; what nobody waits for takes two looks."""

        def __init__(self) -> None:
            super().__init__()
            self.looked: set[Ticket] = set()

        def wait(self, ticket: Ticket, deadline_s: float) -> None:
            if deadline_s == 0 and ticket not in self.looked:
                self.looked.add(ticket)
                raise DeadlineError("it is still being read")
            super().wait(ticket, deadline_s)

    with tempfile.NamedTemporaryFile() as whole:
        whole.truncate(PAGE)
        file = DiskFile.open(Path(whole.name))
        regions = {layer: [DiskRegion(file, 0, PAGE)] * 8 for layer in range(2)}
        stream = ExpertStream(regions, Arena(8, PAGE), Residency([8, 8], 8), Begun())

        def run(layer: int, expert: int) -> None:
            for _ in stream.waves(layer, np.array([expert])):
                pass

        for foreseen, needed in chosen:
            stream.begin_step()
            run(0, 0)
            stream.read_ahead(1, np.array([foreseen]), 0)
            run(1, needed)
            # That of this step, and of the one before where its second look has not come.
            assert stream.residency.free >= 8 - 2
        run(0, 0)
        run(0, 0)
        assert stream.residency.free == 8
        file.close()


def decode(decoder: Decoder) -> Tensor:
    cache = decoder.new_cache(BLOCKS, BLOCK)
    return decoder.forward(pack_spans([Span([3, 4, 5], 0, [0])], BLOCK), cache)


@pytest.mark.parametrize("fault", ["truncated", "changed", "damaged"])
def test_a_file_that_is_not_as_it_was_fails_the_step_and_no_token_is_wrong(
    tiny_decoder: LoadDecoder, tmp_path: Path, fault: str
) -> None:
    """Also when it is asked again; and once the file is whole, all is as before."""
    whole = tiny_decoder("mixtral")
    records = write_records(whole, path := tmp_path / "experts.bin")
    content, expected = path.read_bytes(), decode(whole)
    offset = records.offsets[1][used_expert(whole, 1)][0]
    if fault == "damaged":  # before it is opened, and so that its time does not tell
        path.write_bytes(content[: offset + 50] + b"\xff\x00\xff" + content[offset + 53 :])
    says = {"truncated": "(ends at byte|changed while)", "changed": "changed while"}
    for mover in (open_mover(), PlainMover()):
        if fault != "damaged":
            path.write_bytes(content)
            os.utime(path, (1, 1))
        with streamed(whole, records, 2 * widest(whole), mover=mover) as (decoder, _):
            if fault == "truncated":
                os.truncate(path, offset + 5000)
            elif fault == "changed":
                with path.open("r+b") as out:
                    out.write(content[:1])
            for _ in range(2):
                with pytest.raises(DataLossError, match=says.get(fault, "the digest")):
                    decode(decoder)
    path.write_bytes(content)
    with streamed(whole, records, 2 * widest(whole)) as (decoder, _):
        assert torch.equal(decode(decoder), expected)


def test_damage_that_hides_is_found_where_digests_are_always_compared(
    tiny_decoder: LoadDecoder, tmp_path: Path
) -> None:
    """A change after the first reading, which keeps size and time."""
    whole = tiny_decoder("mixtral")
    records = write_records(whole, path := tmp_path / "experts.bin")
    with streamed(whole, records, 3, check_always=True) as (decoder, _):
        assert torch.equal(decode(decoder), decode(whole))
        with path.open("r+b") as out:
            for nbytes in range(100, records.most, 512):
                for places in records.offsets.values():
                    for offset, _, _ in places:
                        out.seek(offset + nbytes)
                        out.write(b"\x55\xaa")
        os.utime(path, (1, 1))
        with pytest.raises(DataLossError, match="the digest"):
            decode(decoder)


def used_expert(decoder: Decoder, layer: int) -> int:
    """One that ``decode`` needs."""
    found: list[int] = []

    class Looking:
        def record(self, l: int, ids_TC: Any) -> None:
            found.extend(ids_TC[0].tolist() if l == layer else ())

    batch = pack_spans([Span([3, 4, 5], 0, [0])], BLOCK)
    decoder.forward(batch, decoder.new_cache(BLOCKS, BLOCK), Looking())
    return found[0]


def test_a_read_that_failed_is_read_again(
    tiny_decoder: LoadDecoder, serve: Serve, tmp_path: Path
) -> None:
    """After an error of the disk that passes, the same runner gives the right bits."""
    whole = tiny_decoder("mixtral")
    records = write_records(whole, tmp_path / "experts.bin")

    class Passing(PlainMover):
        """Fails so many reads."""

        left = 3

        def _fault(self, read: Any) -> DataLossError | None:
            if self.left:
                self.left -= 1
                return DataLossError("a bad sector")
            return super()._fault(read)

    with streamed(whole, records, 2 * widest(whole), "on", Passing()) as (decoder, _):
        while True:
            try:
                logits = decode(decoder)
                break
            except DataLossError:
                continue
        assert torch.equal(logits, decode(whole))
        assert serve(decoder) == serve(whole)
