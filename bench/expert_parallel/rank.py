"""One rank of an expert-parallel group that runs the steps it is asked for: a script.

No server, no scheduler, no sampling: a line of JSON on standard input is a step, a line on standard
output what it took. All ranks run the same steps in the same order (``group``). The decoders of
several plans are held at once and share KV, which by law 1 does not depend on the plan.

A variant of a step may send more than it needs, to measure what is saved: ``copies`` "expert" sends
a token once for every expert away from home instead of once per rank; ``wire`` "bf16" and "fp32"
fill every record up to the length it would have with features, and contributions, of that type.
Where the settings name recorded routing, rows go where it says (``forced``).
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from expert_parallel.exchanges import RankExchanges, open_exchanges
from expert_parallel.forced import ForcedRouting, places
from torch import Tensor

from moeserve.comm.build import parallel_over
from moeserve.comm.control.rpc import Trust
from moeserve.comm.dispatcher import FlatDispatcher, ShardedExperts
from moeserve.comm.exchange.base import Exchange, Lanes
from moeserve.comm.group import Group, Topology
from moeserve.comm.launch.note_store import host_store, join_store
from moeserve.comm.launch.notes import NoteStore
from moeserve.comm.layout import LayerLayout
from moeserve.comm.pipeline import ParallelLayerRunner
from moeserve.comm.table import Assigned, AssignmentTable, Fetch
from moeserve.config.options import LoadOptions
from moeserve.errors import UnavailableError
from moeserve.kernels.ops import Ops
from moeserve.kernels.select import choose_ops
from moeserve.kernels.wire import Copies, Wire
from moeserve.models.batch import Span, pack_spans, split_spans
from moeserve.models.decoder import Decoder, ModelKvCache, load_decoder
from moeserve.observe.expert_counts import ExpertCounts
from moeserve.observe.progress import Progress
from moeserve.process.answer import Channel

BLOCK = 16
MOST_MICROBATCHES = 4
SEGMENT_BYTES = 8 << 20
DEADLINE_S = 60.0
# Ranks of a benchmark are alone on their network.
TRUST = Trust(secret=b"ranks of a benchmark")


class OnePerExpert:
    """A table that sends a token away once for every expert."""

    def __init__(self, table: AssignmentTable) -> None:
        self._table = table

    def assign(
        self, ids_TC: Tensor, home: int, *, ranks_per_unit: int = 1, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        once = self._table.assign(ids_TC, home, ranks_per_unit=ranks_per_unit, fetch=fetch)
        start_R1, slot_NC = once.copies.start_R1.tolist(), once.copies.slot_NC
        tokens, slots, counts = [], [], []
        for r in range(len(once.count_R)):
            here = slice(start_R1[r], start_R1[r + 1])
            token_N, kept_NC = once.copies.token_N[here], slot_NC[here]
            if r != home:
                row_M, choice_M = torch.nonzero(kept_NC >= 0, as_tuple=True)
                single_MC = torch.full((len(row_M), kept_NC.shape[1]), -1, dtype=torch.int16)
                single_MC[torch.arange(len(row_M)), choice_M] = kept_NC[row_M, choice_M]
                token_N, kept_NC = token_N[row_M], single_MC
            tokens.append(token_N)
            slots.append(kept_NC)
            counts.append(len(token_N))
        starts = torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32)
        return Assigned(Copies(starts, torch.cat(tokens), torch.cat(slots)), counts)

    def relay(
        self, segments: Sequence[Tensor], wire: Wire, ranks: int, *, fetch: Fetch = Tensor.cpu
    ) -> Assigned:
        return self._table.relay(segments, wire, ranks, fetch=fetch)


class Widened:
    """An exchange whose segments are filled up: rows of ``row_bytes`` to ``wide_bytes`` on the way
    out, ``back`` times as long on the way back."""

    def __init__(self, exchange: Exchange, row_bytes: int, wide_bytes: int, back: int) -> None:
        self.name = exchange.name
        self.rank = exchange.rank
        self.world = exchange.world
        self.traffic = exchange.traffic
        self.device = exchange.device
        self.fetch = exchange.fetch
        self._exchange = exchange
        self._factors = (Fraction(wide_bytes, row_bytes), Fraction(back))

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        return self._exchange.areas(lane, self._wide(lane, sizes_R))

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._exchange.send(lane, self._wide(lane, sizes_R))

    def receive(self, lane: int) -> list[Tensor]:
        factor = self._factors[lane % 2]
        return [s[: int(len(s) / factor)] for s in self._exchange.receive(lane)]

    def close(self) -> None:
        self._exchange.close()

    def _wide(self, lane: int, sizes_R: Sequence[int]) -> list[int]:
        return [int(size * self._factors[lane % 2]) for size in sizes_R]


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Everything a step needs. ``sequences`` are this rank's, in blocks of their own; ``ids_LPK``
    is where their rows are forced to."""

    exchanges: RankExchanges
    decoders: Mapping[str, Decoder]
    layouts: Mapping[str, Mapping[int, LayerLayout]]
    sequences: Sequence[Sequence[int]]
    cache: ModelKvCache
    variants: dict[tuple[str, str, str], Decoder]
    ids_LPK: Tensor | None = None

    def run(
        self,
        spans: Sequence[tuple[int, int, int]],
        microbatches: int,
        plan: str,
        copies: str,
        wire: str,
        digest: bool,
    ) -> dict[str, Any]:
        """One step over ``spans`` of [sequence, start, stop]. With ``digest`` also what came out,
        and how often each expert was chosen."""
        decoder = self._decoder(plan, copies, wire)
        parts = split_spans([self._span(*span) for span in spans], microbatches)
        steps = [pack_spans(part, BLOCK) for part in parts]
        assert isinstance(decoder.runner, ParallelLayerRunner)
        stats, before_R = decoder.runner.dispatcher.stats, self.exchanges.sent_R()
        before = asdict(stats)
        counts = self._counts(decoder) if digest else None
        begun = time.monotonic()
        logits = decoder.forward_micro(steps, self.cache, counts)
        ended = time.monotonic()
        sent_R = self.exchanges.sent_R()
        taken = {
            "begun": begun,
            "ended": ended,
            "waited": stats.waited_s - before["waited_s"],
            "copies": stats.copies - before["copies"],
            "inter_node": stats.inter_node - before["inter_node"],
            "token_layers": stats.tokens - before["tokens"],
            "sent_R": [a - b for a, b in zip(sent_R, before_R, strict=True)],
        }
        if counts is not None:
            counts.end()
            taken["digest"] = hashlib.sha256(torch.cat(logits).numpy().tobytes()).hexdigest()
            taken["chosen_LE"] = counts.loads().tolist()
        return taken

    def _counts(self, decoder: Decoder) -> ExpertCounts:
        layout = next(iter(next(iter(self.layouts.values())).values()))
        return ExpertCounts(decoder.spec.moe_layers, layout.num_experts)

    def _span(self, sequence: int, start: int, stop: int) -> Span:
        blocks = blocks_of(sequence, len(self.sequences[sequence]))
        return Span(self.sequences[sequence][start:stop], start, blocks)

    def _decoder(self, plan: str, copies: str, wire: str) -> Decoder:
        key = (plan, copies, wire)
        if key not in self.variants:
            self.variants[key] = self._build(*key)
        return self.variants[key]

    def _build(self, plan: str, copies: str, wire: str) -> Decoder:
        decoder, layouts = self.decoders[plan], self.layouts[plan]
        layers, progress = decoder.stack.layers, Progress()
        ops: Ops = decoder.ops
        if self.ids_LPK is not None:
            ops = ForcedRouting(ops, layers, self.ids_LPK)
        if wire == "own":
            dispatcher = self.exchanges.dispatcher(ops, progress)
        else:
            exchange = self._widened(plan, wire)
            dispatcher = FlatDispatcher(ops, exchange, self.exchanges.topology, progress)
        parallel = parallel_over(ops, layers, layouts, dispatcher, progress)
        if copies == "expert":
            sharded = [_per_expert(s) for s in parallel.sharded]
            parallel = ParallelLayerRunner(ops, layers, sharded, dispatcher, progress)
        return decoder.over(parallel)

    def _widened(self, plan: str, wire: str) -> Exchange:
        """Of ranks that have one exchange."""
        decoder, layouts = self.decoders[plan], self.layouts[plan]
        (exchange,), topology = self.exchanges.exchanges, self.exchanges.topology
        flat = FlatDispatcher(decoder.ops, exchange, topology, Progress())
        sharded = parallel_over(
            decoder.ops, decoder.stack.layers, layouts, flat, Progress()
        ).sharded
        own = next(s.wire for s in sharded if s is not None)
        dtype, back = {"bf16": (torch.bfloat16, 1), "fp32": (torch.float32, 2)}[wire]
        return Widened(exchange, own.row_bytes, replace(own, payload=dtype).row_bytes, back)


def _per_expert(sharded: ShardedExperts | None) -> ShardedExperts | None:
    # Of an ``AssignmentTable``, ``FlatDispatcher`` only asks ``assign``.
    return sharded and replace(sharded, table=OnePerExpert(sharded.table))


def blocks_of(sequence: int, tokens: int) -> tuple[int, ...]:
    """Sequences are of one length, and follow one another."""
    each = -(-tokens // BLOCK)
    return tuple(range(sequence * each, (sequence + 1) * each))


def set_up(settings: Mapping[str, Any], environ: Mapping[str, str]) -> StepRunner:
    """Load the experts of every plan that are this rank's, and meet the others."""
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    here = int(environ["LOCAL_WORLD_SIZE"])
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    torch.set_num_threads(1)
    ops = choose_ops(threads=settings["threads"])
    layouts = {
        name: {
            int(layer): LayerLayout(np.array(expert_S, np.int32), settings["experts"], world)
            for layer, expert_S in rows.items()
        }
        for name, rows in settings["plans"].items()
    }
    decoders = {
        name: load_decoder(
            settings["model"],
            ops=ops,
            options=LoadOptions(quantization=settings["quantization"]),
            experts={layer: layout.of_rank(rank) for layer, layout in of_plan.items()},
        )
        for name, of_plan in layouts.items()
    }
    sequences = settings["sequences"][rank]
    blocks = len(sequences) * len(blocks_of(0, len(sequences[0])))
    cache = next(iter(decoders.values())).new_cache(blocks, BLOCK)
    store = notes_at(host, port, rank)
    lanes = Lanes((SEGMENT_BYTES,) * 2 * MOST_MICROBATCHES, DEADLINE_S)
    topology = Topology(tuple(r // here for r in range(world)))
    exchanges = open_exchanges(settings["backend"], Group(rank, world, store), topology, lanes)
    ids_LPK = _recorded(settings["routing"], rank) if settings.get("routing") else None
    return StepRunner(exchanges, decoders, layouts, sequences, cache, {}, ids_LPK)


def _recorded(file: str, rank: int) -> Tensor:
    """[L, P, K] of this rank's sequences, from ``ids_RSWLK`` in an .npy file."""
    ids_SWLK = np.load(file, mmap_mode="r")[rank]
    return places(torch.from_numpy(np.array(ids_SWLK, np.int32)), BLOCK)


def notes_at(host: str, port: int, rank: int) -> NoteStore:
    """Rank 0 keeps them; the others may be there before it."""
    if rank == 0:
        return host_store(host, port, trust=TRUST)[0]
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            return join_store(host, port, trust=TRUST)
        except UnavailableError:
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def main() -> None:
    channel = Channel()
    requests = channel.requests()
    runner = set_up(next(requests), os.environ)
    channel.reply({"rank": runner.exchanges.rank})
    gc.disable()
    for request in requests:
        channel.reply(runner.run(**request))
        gc.collect(0)  # here, where it is not timed
    runner.exchanges.close()


if __name__ == "__main__":
    main()
