"""An executor without a model: tokens are hashes of what the KV blocks hold.

Its "KV" of a position is a digest of all tokens up to it, written to the slot that the plan
assigns and read back through the block table in later steps, just as attention would. The next
token is drawn from the digest of the last position. So tokens depend on the request alone, as
long as blocks are shared, freed and preempted correctly; a wrong slot changes them or is found
here at once. It also asserts that a request's positions come in order and none is left out, and
that what runs in a group of layers goes through all of them: before that its slots hold nothing.
``NullSwapMemory`` is host memory beside it (``swapping``), whose KV are these digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from moeserve.core import BlockId, Chunk, Logprobs, RequestId, Sampled, Scored, StepPlan, StepResult
from moeserve.engine.executor import count_accepted
from moeserve.engine.swap_space import SwapRun


class NullExecutor:
    """Remembers digests for ``num_blocks * block_size`` slots, and where each request stands."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._slots: list[bytes | None] = [None] * (num_blocks * block_size)
        self._next_position: dict[RequestId, int] = {}
        # Whose tokens, from where to where, are on their way before which layer.
        self._under_way: dict[RequestId, tuple[int, int, int]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for request_id in plan.preempted + plan.ended:
            self._next_position.pop(request_id, None)
            self._under_way.pop(request_id, None)
        # All reads of a step see what the steps before wrote: attention of one request never
        # depends on what another writes in the same step.
        starts = [self._past(c) for c in plan.chunks]
        written: dict[int, RequestId] = {}
        sampled, scored = [], []
        for chunk, digest in zip(plan.chunks, starts, strict=True):
            digests = []
            for position, token in enumerate(chunk.token_ids, chunk.start):
                slot = self._slot(chunk, position)
                assert slot not in written, (
                    f"slot {slot} is written by {written[slot]} and {chunk.request.id}"
                )
                written[slot] = chunk.request.id
                digest = extend(digest, token)
                self._slots[slot] = digest if chunk.computed else None
                digests.append(digest)
            made = self._draw(chunk, digests)
            if made:
                sampled.append(Sampled(chunk.request.id, made))
            if chunk.scored:
                known = [digests[position - chunk.start] for position in chunk.scored]
                scored.append(Scored(chunk.request.id, tuple(map(self._score, known))))
            if chunk.computed:
                self._next_position[chunk.request.id] = chunk.start + chunk.kept(len(made))
        return StepResult(tuple(sampled), scored=tuple(scored))

    def slots_of(self, blocks: Sequence[BlockId], start: int, count: int) -> list[int]:
        """Where so many positions from ``start`` on lie, of a sequence in ``blocks``."""
        size, positions = self._block_size, range(start, start + count)
        return [blocks[p // size] * size + p % size for p in positions]

    def read(self, slots: Sequence[int]) -> list[bytes | None]:
        return [self._slots[slot] for slot in slots]

    def write(self, slots: Sequence[int], digests: Sequence[bytes | None]) -> None:
        for slot, digest in zip(slots, digests, strict=True):
            self._slots[slot] = digest

    def _score(self, digest: bytes) -> Logprobs:
        """What is said of the token behind this digest."""
        return Logprobs(-float(draw(digest, 0, self._vocab_size)))

    def _draw(self, chunk: Chunk, digests: Sequence[bytes]) -> tuple[int, ...]:
        """The tokens that follow the chunk's, whose digests these are."""
        seed, wanted = chunk.request.params.seed, digests[len(digests) - chunk.samples :]
        drawn = [draw(digest, seed, self._vocab_size) for digest in wanted]
        return tuple(drawn[: count_accepted(chunk.draft_ids, drawn)])

    def _past(self, chunk: Chunk) -> bytes:
        """The digest before the chunk's first token, read from its blocks and verified."""
        expected = self._next_position.get(chunk.request.id)
        assert expected is None or chunk.start == expected, (
            f"request {chunk.request.id} stands at {expected}, the chunk starts at {chunk.start}"
        )
        history = chunk.request.prompt_ids + tuple(chunk.output_ids)
        self._assert_layers_follow(chunk)
        own_ids = chunk.token_ids[: len(chunk.token_ids) - len(chunk.draft_ids)]
        stop = chunk.start + len(own_ids)
        assert own_ids == history[chunk.start : stop], "the chunk's tokens are not its own"
        assert own_ids, "an empty chunk"
        ends = stop == len(history) and chunk.computed > 0
        assert bool(chunk.samples) == ends, "sampled elsewhere than at the end"
        assert len(set(chunk.blocks)) == len(chunk.blocks), "a block twice in one table"
        digest = b""
        for position, token in enumerate(history[: chunk.start]):
            digest = extend(digest, token)
            found = self._slots[self._slot(chunk, position)]
            assert found == digest, f"position {position} of {chunk.request.id} is not in its slot"
        return digest

    def _assert_layers_follow(self, chunk: Chunk) -> None:
        """Tokens that are on their way go on where they are, and nothing else of their request."""
        where = chunk.start, chunk.start + len(chunk.token_ids)
        first = 0 if chunk.layers is None else chunk.layers.start
        before = self._under_way.pop(chunk.request.id, (*where, 0))
        assert before == (*where, first), (
            f"{chunk.request.id}: {before} is on its way, and {(*where, first)} comes"
        )
        if not chunk.computed:
            assert chunk.layers is not None
            self._under_way[chunk.request.id] = (*where, chunk.layers.stop)

    def _slot(self, chunk: Chunk, position: int) -> int:
        block = chunk.blocks[position // self._block_size]
        return block * self._block_size + position % self._block_size


class NullSwapMemory:
    """A ``SwapMemory`` of one cache, and a byte to the position; copies take no time."""

    place_bytes = caches = 1
    byte_s = 0.0

    def __init__(self, executor: NullExecutor, places: int) -> None:
        self.places = places
        self._executor = executor
        self._held: list[bytes | None] = [None] * places
        self._keys: dict[int, bytes] = {}

    def copy_out(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> None:
        for run, key in zip(runs, keys, strict=True):
            found = self._executor.read(self._executor.slots_of(blocks, run.start, run.count))
            self._held[run.at : run.at + run.count] = found
            self._keys[run.at] = key

    def copy_in(
        self, blocks: Sequence[BlockId], runs: Sequence[SwapRun], keys: Sequence[bytes]
    ) -> bool:
        if [self._keys[run.at] for run in runs] != [*keys]:
            return False
        for run in runs:
            slots = self._executor.slots_of(blocks, run.start, run.count)
            self._executor.write(slots, self._held[run.at : run.at + run.count])
        return True


def extend(digest: bytes, token: int) -> bytes:
    """The digest after one more token."""
    return sha256(digest + token.to_bytes(8, "little")).digest()


def draw(digest: bytes, seed: int, vocab_size: int) -> int:
    """The token that follows a sequence."""
    drawn = sha256(digest + seed.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn[:8], "little") % vocab_size
