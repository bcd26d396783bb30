"""Work on clients' texts: bodies parsed, conversations rendered, texts tokenised.

One object behind all doors, so that what may take long has one place where it is bounded, and
neither the event loop nor the interpreter's lock is held meanwhile:

    short texts     tokenised here, on the loop or on a thread that needs no lock
    templates       always rendered in a process that may be ended: they are a stranger's programs
    all that is long, or whose cost is unknown      in such a process too

Processes are few, and bounded in time, memory and in what waits for them; long work has one of its
own, so that short work does not wait for it. Where one fails, one request does.
"""

from __future__ import annotations

import array
import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeserve.errors import InvalidRequestError, TokenizerError
from moeserve.gateway import limits
from moeserve.gateway.json_body import JSON_PROGRAM, Body, parse_json, takes_long, unpack
from moeserve.models.text_worker import text_program
from moeserve.models.tokenizer import Tokenizer
from moeserve.process.pool import PoolLimits, WorkerPool
from moeserve.process.serve_jobs import JobLimits

# Measured on two cores: a text of 1 KB takes 0.5 ms, a thread 0.1 ms more, a process 0.5 ms more.
INLINE_CHARS = 1024
THREAD_CHARS = 8192
INLINE_IDS = 2048
# Up to here tokenising takes a few tenths of a second, beyond up to ten seconds.
QUICK_BYTES = 1 << 18
# Bodies of so many bytes are parsed here, and of so many where they have few values.
INLINE_BODY = 1 << 16
LARGE_BODY = 1 << 20
FEW_MARKS = 1 << 14
# Integers in the lists of a body that are taken whatever the model.
_LEAST_INTS = 1 << 16

_QUICK_JOB = JobLimits(memory_bytes=512 << 20, cpu_s=2)
_LONG_JOB = JobLimits(memory_bytes=3 << 29, cpu_s=30)
QUICK_POOL = PoolLimits(workers=2, jobs=1024, job_bytes=64 << 20, job_s=20.0, idle_s=600.0)
LONG_POOL = PoolLimits(workers=1, jobs=16, job_bytes=64 << 20, job_s=60.0)


class TextWork:
    """Owns what works on texts for one served model; ``tokenizer`` None serves token ids only."""

    def __init__(self) -> None:
        self._name = ""
        self._tokenizer: Tokenizer | None = None
        self._pools: dict[str, WorkerPool] = {}
        self._most_ints = limits.MAX_IDS
        self._warming: asyncio.Task[None] | None = None

    def serve(self, name: str, tokenizer: Tokenizer | None, model: limits.ModelLimits) -> None:
        """The model is there; bodies can be parsed before."""
        self._name, self._tokenizer = name, tokenizer
        wanted = max(model.vocab_size, limits.MAX_PROMPTS * model.max_len)
        self._most_ints = min(limits.MAX_IDS, max(_LEAST_INTS, wanted))

    def warm_up(self) -> None:
        """Starts what the first request will need, beside everything else."""
        tokenizer = self._tokenizer
        if tokenizer is not None and (tokenizer.has_chat_template or not tokenizer.cost.quick):
            self._warming = asyncio.create_task(self._text_pool(0).warm())

    @property
    def tokenizer(self) -> Tokenizer:
        """TokenizerError where the model has none."""
        if self._tokenizer is None:
            raise TokenizerError(
                f"model {self._name!r} has no tokenizer: send token ids instead of text",
                param="prompt",
            )
        return self._tokenizer

    @property
    def pools(self) -> Mapping[str, WorkerPool]:
        """Those that were needed so far: ``json``, ``quick``, ``long``."""
        return self._pools

    async def parse_json(self, raw: bytes) -> Body:
        """A body's object without its nulls. InvalidRequestError where it is none, or has more
        values than any request."""
        if not takes_long(raw, INLINE_BODY, LARGE_BODY, FEW_MARKS):
            return parse_json(raw)
        if "json" not in self._pools:
            self._pools["json"] = WorkerPool(JSON_PROGRAM, LONG_POOL)
        head = {"do": "parse", "most_ints": self._most_ints}
        _, packed = await self._pools["json"].ask(head, raw)
        return unpack(packed)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> str:
        """The prompt of a conversation; ``template_args`` (``tools`` among them) are the
        template's. All of it is as JSON has it. InvalidRequestError where the template rejects
        them, DeadlineError or ExhaustedError where it takes too much."""
        if not self.tokenizer.has_chat_template:
            return self.tokenizer.render_chat(messages)  # which says so
        wanted = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "args": template_args,
        }
        payload = json.dumps(wanted, ensure_ascii=False).encode()
        _, text = await self._text_pool(len(payload)).ask({"do": "render"}, payload)
        return text.decode()

    async def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        model: limits.ModelLimits | None = None,
        most: int = limits.MAX_LISTED_IDS,
    ) -> list[int]:
        """Token ids of a text, of no more than ``most``. With ``model`` it is a prompt: refused
        where there is no room for it, by its length alone where that says so. InvalidRequestError,
        ExhaustedError."""
        tokenizer, chars = self.tokenizer, len(text)
        if model is not None:
            limits.require_may_fit(chars, tokenizer.cost.least_tokens(chars), model)
        if chars <= THREAD_CHARS and tokenizer.cost.quick:
            if chars <= INLINE_CHARS:
                return tokenizer.encode(text, add_special_tokens)
            return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)
        most = most if model is None else model.max_len
        head = {"do": "encode", "special": add_special_tokens, "most": most}
        payload = text.encode()
        said, ids = await self._text_pool(len(payload)).ask(head, payload)
        if said["tokens"] > most:
            if model is not None:
                limits.room_for_answer(said["tokens"], model)
            raise InvalidRequestError(
                f"the text has {said['tokens']} tokens, at most {most} are listed: send it in "
                "parts",
                param="text",
            )
        return array.array("i", ids).tolist()

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, which are below the vocabulary's size."""
        if len(ids) <= INLINE_IDS:
            return self.tokenizer.decode(ids, skip_special_tokens)
        payload = array.array("i", ids).tobytes()
        head = {"do": "decode", "skip": skip_special_tokens}
        _, text = await self._text_pool(len(payload)).ask(head, payload)
        return text.decode()

    async def close(self) -> None:
        """Ends the processes, and what they do with UnavailableError; may be called again."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait({self._warming})
        for pool in self._pools.values():
            await pool.close()

    def _text_pool(self, size: int) -> WorkerPool:
        """For a job of so many bytes."""
        kind, job, pool, niceness = (
            ("quick", _QUICK_JOB, QUICK_POOL, 0)
            if size <= QUICK_BYTES
            else ("long", _LONG_JOB, LONG_POOL, 5)
        )
        if kind not in self._pools:
            files = self.tokenizer.files
            program = text_program(
                "work on the text", files.folder, files.chat_template, job, niceness
            )
            self._pools[kind] = WorkerPool(program, pool)
        return self._pools[kind]
