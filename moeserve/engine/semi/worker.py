"""``python -m moeserve.engine.semi.worker KV LIFELINE``: the process that computes prompts.

It maps the weights of a packed folder, and the KV of the process that started it, which is the
descriptor ``KV``. Standard input is a socket: first comes what to load (``PromptsModel``), then one
step after the other (``messages``); each has one reply. It ends when the socket closes, and at
once, whatever it computes, when ``LIFELINE`` does: that is a pipe whose other end nobody has but
the process that started it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeserve.config.options import LoadOptions
from moeserve.engine.model_runner import ModelRunner
from moeserve.engine.rank_model import vocabulary_of
from moeserve.engine.semi.messages import read_step, write_result
from moeserve.engine.semi.table import shared_table
from moeserve.errors import MoeserveError
from moeserve.grammar.masks import GrammarMasks
from moeserve.kernels.select import set_threads
from moeserve.kernels.shared_memory import SharedMemory
from moeserve.models.decoder import ModelKvCache, load_decoder
from moeserve.process.frames import packed, read_frame

log = logging.getLogger("moeserve.engine.semi")


@dataclass(frozen=True, slots=True)
class PromptsModel:
    """What the process loads: a packed folder, as ``load`` says, over KV of so many blocks."""

    folder: Path
    load: LoadOptions
    num_blocks: int
    block_size: int
    eos_ids: frozenset[int]
    threads: int

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "load": self.load.model_dump(mode="json"),
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "eos_ids": sorted(self.eos_ids),
            "threads": self.threads,
        }

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> PromptsModel:
        return cls(
            Path(said["folder"]),
            LoadOptions(**said["load"]),
            said["num_blocks"],
            said["block_size"],
            frozenset(said["eos_ids"]),
            said["threads"],
        )


class PromptsRunner:
    """Runs steps of prompts over KV that is in ``memory``. What a request was before a step is in
    the step, so it is forgotten after it."""

    def __init__(self, model: PromptsModel, memory: SharedMemory) -> None:
        table = shared_table(model.threads, memory)
        decoder = load_decoder(model.folder, table, model.load)
        masks = GrammarMasks(vocabulary_of(model.folder, decoder, model.eos_ids))
        self._vocab = decoder.spec.vocab
        self._runner: ModelRunner[ModelKvCache] = ModelRunner(
            decoder, model.num_blocks, model.block_size, model.eos_ids, masks=masks
        )
        memory.require_all_taken()
        self._threads = model.threads

    def run(self, head: dict[str, Any], payload: bytes) -> bytes:
        """A step's message in, its result's out."""
        plan, threads = read_step(head, payload, self._vocab)
        if threads != self._threads:
            set_threads(threads)
            self._threads = threads
        try:
            return write_result(self._runner.run(plan))
        finally:
            self._runner.forget([chunk.request.id for chunk in plan.chunks])


def serve(connection: socket.socket, memory: SharedMemory) -> None:
    """Until the other side closes."""
    with connection, connection.makefile("rb") as stream:
        first = read_frame(stream)
        if first is None:
            return
        runner = PromptsRunner(PromptsModel.from_json(first[0]), memory)
        connection.sendall(packed({"ready": os.getpid()}))
        while (job := read_frame(stream)) is not None:
            try:
                reply = packed({"done": True}, runner.run(*job))
            except MoeserveError as error:
                log.exception("a step of prompts failed")
                reply = packed({"error": error.message})
            except Exception as error:  # whatever a backend raises ends this step's requests only
                log.exception("a step of prompts failed")
                reply = packed({"error": f"{type(error).__name__}: {error}"})
            connection.sendall(reply)


def end_with(lifeline: int) -> None:
    """End this process when the pipe's other end is closed."""

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(0)

    threading.Thread(target=watch, name="moeserve-lifeline", daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    memory, lifeline = map(int, arguments)
    end_with(lifeline)
    serve(socket.socket(fileno=os.dup(0)), SharedMemory.of(memory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
