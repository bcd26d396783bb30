"""``python -m moeserve.models.text_worker``: a tokenizer and a chat template in a process that may
be ended.

Texts go as UTF-8, token ids as int32 in the machine's order. Starts without torch. Jobs:

    encode   text in, ids out; only their number where there are more than ``most``
    decode   ids in, text out
    render   {messages, add_generation_prompt, args} as JSON in, text out
    try      nothing in or out: some text and a conversation, as the others do them
"""

from __future__ import annotations

import argparse
import array
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeserve.errors import InvalidRequestError
from moeserve.models.tokenizer import Tokenizer
from moeserve.process.frames import Head
from moeserve.process.job_worker import WorkerProgram
from moeserve.process.serve_jobs import JobLimits, Reply, run_worker

# Loading: the largest published tokenizers take a few seconds and some hundred MiB.
PREPARING = JobLimits(memory_bytes=2 << 30, cpu_s=30)
MOST_TEXT_BYTES = 64 << 20
_TALK = ({"role": "user", "content": "Hi"},)
_TEXT = "Hello, world! 1 + 1 = 2\n"


def text_program(
    name: str, folder: Path, chat_template: Path | None, limits: JobLimits, niceness: int = 0
) -> WorkerProgram:
    """How a worker for this tokenizer is started."""
    template = () if chat_template is None else ("--chat-template", str(chat_template.absolute()))
    bounds = ("--memory-bytes", str(limits.memory_bytes), "--cpu-s", str(limits.cpu_s))
    words = (*template, *bounds, "--", str(folder.absolute()))
    return WorkerProgram(name, "moeserve.models.text_worker", words, niceness)


@dataclass(frozen=True, slots=True)
class TextJobs:
    """The handlers, for one tokenizer."""

    tokenizer: Tokenizer

    def encode(self, head: Mapping[str, Any], payload: bytes) -> Reply:
        ids = self.tokenizer.encode(payload.decode(), head["special"])
        if len(ids) > head["most"]:
            return {"tokens": len(ids)}, b""
        return {"tokens": len(ids)}, array.array("i", ids).tobytes()

    def decode(self, head: Mapping[str, Any], payload: bytes) -> Reply:
        ids = array.array("i", payload).tolist()
        return {}, _bounded(self.tokenizer.decode(ids, head["skip"]), "the text")

    def render(self, _: Mapping[str, Any], payload: bytes) -> Reply:
        wanted = json.loads(payload)
        text = self.tokenizer.render_chat(
            wanted["messages"], wanted["add_generation_prompt"], **wanted["args"]
        )
        return {}, _bounded(text, "what the model's chat template made")

    def try_out(self, _: Mapping[str, Any], __: bytes) -> Reply:
        """TokenizerError where the template cannot be compiled."""
        self.tokenizer.decode(self.tokenizer.encode(_TEXT))
        self.tokenizer.decode(range(min(self.tokenizer.vocab_size, 1024)))
        self.tokenizer.compile_template()
        if self.tokenizer.has_chat_template:
            with contextlib.suppress(InvalidRequestError):  # it wants other messages
                self.tokenizer.render_chat(_TALK)
        return {}, b""


def _bounded(text: str, what: str) -> bytes:
    """As UTF-8, which templates and tokenizers may have left."""
    try:
        found = text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{what} is not Unicode: {error}"[:200]) from error
    if len(found) > MOST_TEXT_BYTES:
        raise InvalidRequestError(f"{what} has {len(found)} bytes, at most {MOST_TEXT_BYTES}")
    return found


def main() -> None:
    """Serve jobs on standard input and output."""
    words = argparse.ArgumentParser(prog="moeserve.models.text_worker")
    words.add_argument("--chat-template", type=Path)
    words.add_argument("--memory-bytes", type=int, required=True)
    words.add_argument("--cpu-s", type=int, required=True)
    words.add_argument("folder", type=Path)
    args = words.parse_args()

    def prepare() -> tuple[Mapping[str, Any], Head]:
        jobs = TextJobs(Tokenizer.load(args.folder, args.chat_template, compiled=False))
        return {
            "encode": jobs.encode,
            "decode": jobs.decode,
            "render": jobs.render,
            "try": jobs.try_out,
        }, {}

    run_worker(prepare, PREPARING, JobLimits(args.memory_bytes, args.cpu_s))


if __name__ == "__main__":
    main()
