"""A rank without a model: the KV of a position is drawn from the tokens up to it, and a token from
the KV of all positions before it, as it lies in the cache. So wrong KV makes wrong tokens.

References are counted as the real pool does: whoever forgets one is seen by ``references``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeserve.core import (
    BlockId,
    CacheScope,
    Event,
    FinishReason,
    Logprobs,
    Request,
    RequestId,
)
from moeserve.engine.sequence import NEW, HeldKv, History
from moeserve.errors import ExhaustedError, InvalidRequestError, UnavailableError
from moeserve.kernels.kv_layout import KvBlockLayout
from moeserve.kernels.kv_runs import (
    copy_positions,
    export_by_blocks,
    import_by_blocks,
    resized,
)
from moeserve.kernels.ops import KvRuns, KvShape
from moeserve.kernels.reference.ops import ReferenceOps

VOCAB = 997
EOS = 7


@dataclass
class Sequence_:
    request: Request
    sink: Any
    history: History
    outputs: list[int]
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    scored: int = 0

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt_ids, *self.outputs]


class ToyHouse:
    def __init__(
        self,
        blocks: int = 64,
        block_size: int = 4,
        layers: int = 3,
        dtype: torch.dtype = torch.bfloat16,
        chunk: int = 8,
        step_s: float = 0.0,
        max_model_len: int = 1024,
        sizes: tuple[int, int, int] = (2, 5, 3),
    ) -> None:
        heads, head, value = sizes
        self.ops = ReferenceOps()
        shapes = [
            KvShape(blocks, block_size, heads + i % 2, head, value, dtype) for i in range(layers)
        ]
        self.caches = [self.ops.new_kv(shape) for shape in shapes]
        self.layouts = tuple(KvBlockLayout.of(shape) for shape in shapes)
        self.block_size = block_size
        self.chunk, self.step_s, self.max_model_len = chunk, step_s, max_model_len
        self.refs = [0] * blocks
        self.free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(map(BlockId, range(blocks)))
        self.block_of: dict[Any, BlockId] = {}
        self.key_of: dict[BlockId, Any] = {}
        self.waiting: OrderedDict[RequestId, Sequence_] = OrderedDict()
        self.running: OrderedDict[RequestId, Sequence_] = OrderedDict()
        self.kept: dict[RequestId, HeldKv] = {}
        self.tells: list[Callable[[], None]] = []
        self.lock = threading.RLock()
        self.go = threading.Event()
        self.go.set()
        self.stopping = False
        self.imported = self.computed = self.steps = 0
        self.refusal: Exception | None = None
        self.histories: list[History] = []
        self.aborted: list[tuple[str, FinishReason]] = []
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    # --- as tests see it

    @property
    def references(self) -> int:
        return sum(self.refs)

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def close(self) -> None:
        self.stopping = True
        self.go.set()
        self.thread.join(10)
        assert not self.thread.is_alive()

    # --- KvHouse

    def borrow(self, token_ids: Sequence[int], scope: CacheScope) -> HeldKv | None:
        with self.lock:
            return self._allocate(list(token_ids), scope, len(token_ids))

    def publish(self, held: HeldKv, token_ids: Sequence[int], scope: CacheScope) -> None:
        with self.lock:
            size = self.block_size
            for b in range(min(held.computed, len(token_ids)) // size):
                key = (scope, tuple(token_ids[: (b + 1) * size]))
                block = held.blocks[b]
                assert self.refs[block] > 0
                if key not in self.block_of and block not in self.key_of:
                    self.block_of[key], self.key_of[block] = block, key

    def give_back(self, held: HeldKv, *, forget: bool = False) -> None:
        with self.lock:
            for block in held.blocks:
                assert self.refs[block] > 0, f"block {block} is given back twice"
                self.refs[block] -= 1
                if not self.refs[block]:
                    self.free[block] = None

    def export_kv(self, layer: int, blocks: Sequence[BlockId], out_NX: Tensor) -> None:
        assert all(self.refs[b] > 0 for b in blocks), "a block that nobody holds is read"
        out_NX.copy_(self.ops.export_kv(self.caches[layer], torch.tensor(list(blocks))))

    def import_kv(self, layer: int, blocks: Sequence[BlockId], data_NX: Tensor) -> None:
        assert all(self.refs[b] == 1 and b not in self.key_of for b in blocks), "shared blocks"
        self.imported += len(blocks)
        self.ops.import_kv(self.caches[layer], torch.tensor(list(blocks)), data_NX)

    def export_runs(self, blocks: Sequence[BlockId], runs: KvRuns, out_X: Tensor) -> Tensor:
        return export_by_blocks(self, blocks, runs, out_X)

    def import_runs(
        self, blocks: Sequence[BlockId], runs: KvRuns, digests_RD: Tensor, data_X: Tensor
    ) -> Tensor:
        return import_by_blocks(self, blocks, runs, digests_RD, data_X)

    def submit(self, request: Request, sink: Any, history: History = NEW) -> None:
        with self.lock:
            if self.refusal is not None:
                raise self.refusal
            if self.stopping:
                raise UnavailableError("stopped")
            if request.id in self.waiting or request.id in self.running:
                raise InvalidRequestError(f"{request.id} is in use")
            longest = len(request.prompt_ids) + request.params.max_tokens
            if longest > len(self.refs) * self.block_size:
                raise ExhaustedError("never", param="max_tokens")
            assert not history.sources, "nobody here asks them"
            assert len(history.output_ids) < request.params.max_tokens
            seq = Sequence_(request, sink, history, list(history.output_ids))
            seq.scored = history.reached
            if history.kv is not None:
                assert history.kv.computed < len(seq.tokens), history
                assert len(history.kv.blocks) * self.block_size >= history.kv.computed
                assert all(self.refs[b] > 0 for b in history.kv.blocks)
                seq.blocks, seq.computed = list(history.kv.blocks), history.kv.computed
            self.histories.append(history)
            self.waiting[request.id] = seq

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        with self.lock:
            self.aborted.append((request_id, reason))
            seq = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
            if seq is None:
                return
            self.give_back(HeldKv(tuple(seq.blocks), 0))
        seq.sink.deliver([Event(request_id, finish=reason, error="the request was cancelled")])

    def look(self, request_id: RequestId) -> HeldKv | None:
        with self.lock:
            seq = self.running.get(request_id)
            if seq is None:
                return None
            return self._share(seq)

    def look_within(self, request_id: RequestId) -> None:
        """Its steps compute position by position."""

    def layers_done(self, step: int) -> int:
        return len(self.layouts)

    def take_kept(self, request_id: RequestId) -> HeldKv | None:
        with self.lock:
            return self.kept.pop(request_id, None)

    def made(self, request_id: RequestId) -> tuple[int, ...] | None:
        with self.lock:
            seq = self.running.get(request_id)
            return None if seq is None else tuple(seq.outputs)

    def detach(self, request_id: RequestId) -> tuple[HeldKv, tuple[int, ...]] | None:
        with self.lock:
            seq = self.running.pop(request_id, None)
            if seq is None:
                return None
        seq.sink.give_back(request_id, seq.computed)
        return HeldKv(tuple(seq.blocks), seq.computed), tuple(seq.outputs)

    def on_step(self, tell: Callable[[], None]) -> Callable[[], None]:
        self.tells.append(tell)
        return lambda: self.tells.remove(tell)

    between_steps = on_step

    # --- the engine

    def _share(self, seq: Sequence_) -> HeldKv:
        for block in seq.blocks:
            self.refs[block] += 1
        return HeldKv(tuple(seq.blocks), seq.computed)

    def _allocate(self, tokens: list[int], scope: CacheScope, longest: int) -> HeldKv | None:
        size, shared = self.block_size, []
        for b in range((len(tokens) - 1) // size):
            block = self.block_of.get((scope, tuple(tokens[: (b + 1) * size])))
            if block is None:
                break
            shared.append(block)
        fresh = -(-longest // size) - len(shared)
        if fresh > len([b for b in self.free if b not in shared]):
            return None
        for block in shared:
            self.free.pop(block, None)
            self.refs[block] += 1
        taken = [self.free.popitem(last=False)[0] for _ in range(fresh)]
        for block in taken:
            self.refs[block] = 1
            self.block_of.pop(self.key_of.pop(block, None), None)
        return HeldKv((*shared, *taken), len(shared) * size)

    def _admit(self) -> None:
        for request_id, seq in list(self.waiting.items()):
            longest = len(seq.request.prompt_ids) + seq.request.params.max_tokens
            if seq.blocks:
                more = -(-longest // self.block_size) - len(seq.blocks)
                held = self._allocate([0], CacheScope("more", request_id), more * self.block_size)
                if held is None:
                    return
                seq.blocks += held.blocks
            else:
                held = self._allocate(seq.tokens, seq.request.scope, longest)
                if held is None:
                    return
                seq.blocks, seq.computed = list(held.blocks), held.computed
                if seq.request.params.prompt_logprobs is not None and not seq.outputs:
                    seq.computed = 0
                    self.give_back(held)
                    fresh = self._allocate(seq.tokens, CacheScope(request_id), longest)
                    assert fresh is not None
                    seq.blocks = list(fresh.blocks)
            self.running[self.waiting.pop(request_id).request.id] = seq

    def _serve(self) -> None:
        while not self.stopping:
            self.go.wait()
            events: list[tuple[Any, list[Event]]] = []
            with self.lock:
                self._admit()
                busy = bool(self.running)
                for seq in list(self.running.values()):
                    events.append((seq.sink, self._advance(seq)))
            for sink, found in events:
                if found:
                    sink.deliver(found)
            if busy:
                self.steps += 1
                for tell in list(self.tells):
                    tell()
            time.sleep(self.step_s if busy else 0.002)

    def _advance(self, seq: Sequence_) -> list[Event]:
        request, tokens, found = seq.request, seq.tokens, []
        stop = min(len(tokens), seq.computed + self.chunk)
        for position in range(seq.computed, stop):
            self._compute(seq, tokens, position)
        params = request.params
        if params.prompt_logprobs is not None:
            scored = range(max(seq.computed, seq.scored), min(stop, len(request.prompt_ids) - 1))
            scores = tuple(Logprobs(float(draw(tokens[: p + 2]) % 100)) for p in scored)
            if scores:
                found.append(Event(request.id, prompt_logprobs=scores))
        seq.computed = stop
        self.publish(HeldKv(tuple(seq.blocks), stop), tokens, request.scope)
        if stop < len(tokens):
            return found
        token = self._sample(seq)
        seq.outputs.append(token)
        logprobs = () if params.logprobs is None else (Logprobs(float(token % 10)),)
        finish = None
        if token == EOS and not params.ignore_eos:
            finish = FinishReason.STOP
        elif len(seq.outputs) >= params.max_tokens or len(seq.tokens) >= self.max_model_len:
            finish = FinishReason.LENGTH
        found.append(Event(request.id, (token,), logprobs, finish))
        if finish is not None:
            del self.running[request.id]
            if seq.history.keep:
                self.kept[request.id] = HeldKv(tuple(seq.blocks), seq.computed)
            else:
                self.give_back(HeldKv(tuple(seq.blocks), 0))
        return found

    def _compute(self, seq: Sequence_, tokens: list[int], position: int) -> None:
        self.computed += 1
        block = seq.blocks[position // self.block_size]
        assert block not in self.key_of, "a shared block is written"
        slot = torch.tensor([block * self.block_size + position % self.block_size])
        for layer, cache in enumerate(self.caches):
            seed = draw([layer, *tokens[: position + 1]])
            rng = np.random.default_rng(seed)
            s = cache.shape
            k = torch.tensor(rng.standard_normal((1, s.kv_heads, s.head_size)).astype("f"))
            v = torch.tensor(rng.standard_normal((1, s.kv_heads, s.value_size)).astype("f"))
            self.ops.write_kv(cache, k, v, slot)

    def _sample(self, seq: Sequence_) -> int:
        found = hashlib.sha256(str(seq.request.params.seed).encode())
        for layer, layout in enumerate(self.layouts):
            rows = self.ops.export_kv(self.caches[layer], torch.tensor(seq.blocks))
            whole = resized(layout, seq.computed)
            out = torch.zeros(whole.nbytes, dtype=torch.uint8)
            for b in range(-(-seq.computed // self.block_size)):
                first = b * self.block_size
                count = min(self.block_size, seq.computed - first)
                copy_positions((layout, rows[b], 0), (whole, out, first), count)
            found.update(out.numpy().tobytes())
        return int.from_bytes(found.digest()[:4], "little") % VOCAB


def draw(numbers: Sequence[int]) -> int:
    digest = hashlib.sha256(np.array(numbers, "<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


@dataclass
class Sink:
    """Writes down what it hears."""

    events: list[Event] = field(default_factory=list)
    returned: list[tuple[str, int]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event], /) -> None:
        assert not self.ended.is_set(), "news after the last event"
        self.events += events
        if events[-1].finish is not None:
            self.ended.set()

    def give_back(self, request_id: RequestId, reached: int, /) -> None:
        self.returned.append((request_id, reached))
        self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [t for event in self.events for t in event.token_ids]

    @property
    def scores(self) -> list[Logprobs]:
        return [s for event in self.events for s in event.prompt_logprobs]

    @property
    def last(self) -> Event:
        return self.events[-1]


def alone(request: Request, **house: Any) -> Sink:
    """What a rank makes of a request that nobody interferes with."""
    toy = ToyHouse(**house)
    try:
        sink = Sink()
        toy.submit(replace(request, deadline=None), sink)
        assert sink.ended.wait(60)
        return sink
    finally:
        toy.close()
