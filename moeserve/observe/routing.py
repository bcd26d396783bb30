"""Record which experts each token chose, while serving, into one safetensors file.

Tensors of the file; sequences in order of first computation, tokens of each by position::

    topk_ids     [tokens, layers, k]  uint8, or int16 above 256 experts; best first
    positions    [tokens]             int32, within the token's sequence
    seq_lens     [sequences]          int32, tokens recorded
    prompt_lens  [sequences]          int32, so a token at position >= prompt_lens was generated
    cached_lens  [sequences]          int32, positions left out, see below
    domain_ids   [sequences]          int32, into the metadata's ``domains``

A token whose KV came from the prefix cache was never routed for this request: it is left out, and
counted in ``cached_lens``; so are draft tokens. What a preemption computes again is recorded once,
also where a request then runs on another rank: each rank has a file and a sequence of its own, and
leaves out, as cached, what the others have. Metadata (strings,
lists as JSON): ``format``, ``model``, ``num_experts``, ``moe_layers`` (decoder layer of each entry
of the second dimension), ``domains``, ``dropped_tokens`` (computed after ``max_tokens`` were
recorded).

Memory stays small: rows are appended to ``FILE.spool`` and put in order by ``close``, which writes
FILE in one piece or not at all. A disk that fails ends the recording and is logged; serving goes
on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Request, RequestId, StepPlan
from moeserve.errors import ConfigError
from moeserve.safetensors_header import StoredTensor, safetensors_header

FORMAT = "moeserve.routing.v1"
ROWS_PER_WRITE = 65536


class RoutingRecorder:
    """A step observer. ``close`` after the last step; ``max_tokens`` bounds the file."""

    def __init__(
        self,
        path: Path,
        *,
        model: str,
        moe_layers: Sequence[int],
        num_experts: int,
        top_k: int,
        max_tokens: int = 10_000_000,
    ) -> None:
        self._path = path
        self._model = model
        self._column = {layer: column for column, layer in enumerate(moe_layers)}
        self._num_experts = num_experts
        self._max_tokens = max_tokens
        ids = np.uint8 if num_experts <= 256 else np.int16
        self._row = np.dtype(
            [("sequence", "<i4"), ("position", "<i4"), ("ids", ids, (len(moe_layers), top_k))]
        )
        self._spool_path = path.with_name(path.name + ".spool")
        if path.is_dir():
            raise ConfigError(f"record_routing={str(path)!r}: is a folder; name a file in it")
        try:
            self._spool = self._spool_path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"record_routing={str(path)!r}: cannot write there ({error.strerror})"
            ) from error
        self._live: dict[RequestId, int] = {}
        self._domains: dict[str, int] = {}
        self._prompt_lens: list[int] = []
        self._domain_ids: list[int] = []
        self._rows = np.empty(0, self._row)  # of the step
        self._new_rows: list[NDArray[np.void]] = []  # those of them to be recorded
        self._seen: set[int] = set()
        self._log = logging.getLogger("moeserve.routing")
        self._recording = True
        self.recorded_tokens = 0
        self.dropped_tokens = 0

    def begin(self, plan: StepPlan) -> None:
        for request_id in plan.ended:
            self._live.pop(request_id, None)
        if not self._recording:
            self.dropped_tokens += plan.num_tokens
            return
        self._rows = np.empty(plan.num_tokens, self._row)
        self._new_rows = []
        self._seen = set()
        row = 0
        for chunk in plan.chunks:
            rows = self._rows[row : row + len(chunk.token_ids)]
            rows["sequence"] = self._sequence_of(chunk.request)
            rows["position"] = np.arange(chunk.start, chunk.start + len(rows))
            again = max(0, chunk.reached - chunk.start)
            self._new_rows.append(rows[again : len(rows) - len(chunk.draft_ids)])
            row += len(rows)

    def record(self, layer: int, ids_TC: NDArray[Any]) -> None:
        if self._recording:
            self._rows["ids"][:, self._column[layer]] = ids_TC
            self._seen.add(layer)

    def end(self) -> None:
        if not self._recording or not self._new_rows:
            return  # of several ranks, one may have no part in a step
        assert self._seen == set(self._column), f"layers seen: {sorted(self._seen)}"
        rows = np.concatenate(self._new_rows)
        kept = rows[: self._max_tokens - self.recorded_tokens]
        try:
            self._append(kept.tobytes())
        except OSError as error:
            self._log.error("%s: recording ends here (%s)", self._spool_path, error.strerror)
            self._recording, kept = False, kept[:0]
        self.recorded_tokens += len(kept)
        self.dropped_tokens += len(rows) - len(kept)
        if len(kept) < len(rows) and self._recording:
            self._log.warning(
                "%s is full with %d tokens: what follows is not recorded",
                self._path,
                self._max_tokens,
            )
            self._recording = False

    def close(self) -> None:
        """Put the file together; it appears complete, or the log says why it does not."""
        self._spool.close()
        try:
            self._write()
        except OSError as error:
            self._log.error(
                "record_routing=%r: cannot be written (%s); its rows are left in %s",
                str(self._path),
                error.strerror,
                self._spool_path,
            )

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._spool.write(left) :]

    def _write(self) -> None:
        rows = (
            np.memmap(self._spool_path, self._row, "r", shape=(self.recorded_tokens,))
            if self.recorded_tokens
            else np.empty(0, self._row)
        )
        order = np.lexsort((rows["position"], rows["sequence"]))
        sequence, position = rows["sequence"][order], rows["position"][order]
        recorded = np.bincount(sequence, minlength=len(self._prompt_lens))
        spans = np.zeros(len(self._prompt_lens), np.int64)
        np.maximum.at(spans, sequence, position + 1)
        small = {
            "positions": position,
            "seq_lens": recorded,
            "prompt_lens": self._prompt_lens,
            "cached_lens": spans - recorded,
            "domain_ids": self._domain_ids,
        }
        tensors = {name: np.asarray(values, np.int32) for name, values in small.items()}
        temporary = self._path.with_name(self._path.name + ".part")
        with temporary.open("wb") as file:
            file.write(self._header(tensors, rows["ids"]))
            for values in tensors.values():
                file.write(values.tobytes())
            for part in slices(len(order), ROWS_PER_WRITE):
                file.write(rows["ids"][order[part]].tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._spool_path.unlink()

    def _sequence_of(self, request: Request) -> int:
        """The index of a request's sequence, made when it is first seen."""
        if request.id not in self._live:
            self._live[request.id] = len(self._prompt_lens)
            self._prompt_lens.append(len(request.prompt_ids))
            self._domain_ids.append(self._domains.setdefault(request.domain, len(self._domains)))
        return self._live[request.id]

    def _header(self, tensors: dict[str, NDArray[np.int32]], ids: NDArray[np.generic]) -> bytes:
        metadata = {
            "format": FORMAT,
            "model": self._model,
            "num_experts": str(self._num_experts),
            "moe_layers": json.dumps(list(self._column)),
            "domains": json.dumps(list(self._domains)),
            "dropped_tokens": str(self.dropped_tokens),
        }
        kinds = {np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8", np.dtype(np.int16): "I16"}
        stored = [
            StoredTensor(name, kinds[values.dtype], values.shape, values.nbytes)
            for name, values in {**tensors, "topk_ids": ids}.items()
        ]
        return safetensors_header(stored, metadata)


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive parts of ``range(count)``."""
    return (slice(at, min(at + size, count)) for at in range(0, count, size))
