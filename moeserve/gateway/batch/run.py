"""All lines of a batch: as many at once as the engine has use for, each answered once.

A line whose answer is in the output already is left out; one that cannot be run has an answer that
says why. What can only fail for the moment (a queue that is full, a process that is busy) is asked
again. What the output cannot take, and an engine that has died, end the run: all that is missing
then is done by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable, Set
from hashlib import sha256
from typing import Protocol

from starlette.types import ASGIApp

from moeserve.errors import InvalidRequestError, MoeserveError, UnavailableError
from moeserve.gateway.batch.answers import Answer, answer_line, refusal_line
from moeserve.gateway.batch.inside import post
from moeserve.gateway.batch.lines import (
    MOST_LINE_BYTES,
    Asked,
    InputLine,
    Refused,
    asked_of,
    custom_id_of,
)
from moeserve.gateway.batch.outputs import Outputs
from moeserve.gateway.service import InferenceService

# What may succeed later, and how long to wait for it; where others end meanwhile, from the start.
_PASSING = frozenset({429, 503, 504})
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class Watcher(Protocol):
    """Is told of every answer, on the event loop."""

    def on_answer(self, *, failed: bool) -> None: ...


class BatchRun:
    """Runs lines through ``app``, whose service is ``service``; at most ``most`` sequences of them
    are with the engine at a time."""

    def __init__(
        self,
        app: ASGIApp,
        service: InferenceService,
        outputs: Outputs,
        most: int,
        watcher: Watcher,
    ) -> None:
        self._app = app
        self._service = service
        self._outputs = outputs
        self._most = most
        self._watcher = watcher
        self._under_way = 0
        self._ended = 0  # lines, of any kind
        self._room = asyncio.Condition()
        self._seen: set[bytes] = set()

    async def run(self, lines: Iterable[InputLine]) -> None:
        """Until every line is answered. Raises what the output or the engine cannot go on after."""
        found = self._outputs.found
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, line in enumerate(lines):
                    if number % 64 == 0:
                        await asyncio.sleep(0)  # those that are answered already take no time
                    await self._begin(tasks, line, found)
        except* MoeserveError as group:
            raise _first(group) from None

    async def _begin(self, tasks: asyncio.TaskGroup, line: InputLine, found: Set[bytes]) -> None:
        """Starts a line, when there is room for it."""
        custom_id, asked = await self._read(line)
        if isinstance(asked, Refused):
            if line.own_digest not in found:
                said = Refused(asked.code, f"line {line.number}: {asked.message}")
                await self._write(refusal_line(line.own_digest, custom_id, said), failed=True)
            return
        if line.digest in found:
            return
        assert custom_id is not None, "who asks has a name"
        async with self._room:
            await self._room.wait_for(
                lambda: not self._under_way or self._under_way + asked.sequences <= self._most
            )
            self._under_way += asked.sequences
        tasks.create_task(self._answer(line, custom_id, asked))

    async def _read(self, line: InputLine) -> tuple[str | None, Asked | Refused]:
        """What a line asks, and its name as far as it has one."""
        if line.raw is None:
            return None, Refused("line_too_long", f"more than {MOST_LINE_BYTES} bytes")
        try:
            fields = await self._service.texts.parse_json(line.raw)
        except InvalidRequestError as error:
            return None, Refused("invalid_json_line", error.message.replace("the body", "it", 1))
        custom_id = custom_id_of(fields)
        if isinstance(custom_id, Refused):
            return None, custom_id
        name = sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:16]
        if name in self._seen:
            return custom_id, Refused("duplicate_custom_id", "a line before it has the custom_id")
        self._seen.add(name)
        return custom_id, asked_of(fields)

    async def _answer(self, line: InputLine, custom_id: str, asked: Asked) -> None:
        try:
            answer = await self._ask(asked)
            whole = answer_line(line.digest, custom_id, answer)
            await self._write(whole, failed=answer.status != 200)
        finally:
            async with self._room:
                self._under_way -= asked.sequences
                self._room.notify_all()

    async def _ask(self, asked: Asked) -> Answer:
        """What there is to say in the end."""
        tries, ended = 0, self._ended
        while True:
            answer = await post(self._app, asked.url, asked.body)
            if answer.status == 200:
                return answer
            if not self._service.ready:
                raise UnavailableError(
                    "the engine has stopped, the log tells why; give the same command again to "
                    "go on"
                )
            if self._ended != ended:
                tries, ended = 0, self._ended
            if tries == len(BACKOFF_S) or not _passes(answer):
                return answer
            await asyncio.sleep(BACKOFF_S[tries])
            tries += 1

    async def _write(self, line: bytes, *, failed: bool) -> None:
        """An answer that is there is written, though the run may be ending."""
        file = self._outputs.errors if failed else self._outputs.answers
        writing = asyncio.ensure_future(asyncio.to_thread(file.append, line))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing
            raise
        self._ended += 1
        self._watcher.on_answer(failed=failed)


def _passes(answer: Answer) -> bool:
    """Whether a failure may be over a little later: no field of the request is at fault."""
    if answer.status not in _PASSING:
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(answer.body)["error"]["param"] is None
    return False


def _first(group: BaseExceptionGroup[MoeserveError]) -> MoeserveError:
    """One of those that ended the run."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MoeserveError), error
    return error
