"""What a door has to tell a rank, from the thread of the event loop to the rank's stream.

All that waits while the stream is busy goes in few messages, each far below ``rpc.MOST_BYTES``. A
rank reads what a message submits before what it ends, so an id that is to end and is then submitted
anew is of two messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from moeserve.core import FinishReason, Request, RequestId
from moeserve.engine.ranks.messages import write_submission
from moeserve.engine.sequence import History
from moeserve.pb import rank_pb2 as pb

# Token ids of one message: beyond it the next one is begun. Up to five bytes each.
MOST_TOKENS = 1 << 20
# Requests of one message, for they have more than tokens.
MOST_REQUESTS = 1 << 12


class Outgoing:
    """Of one stream. On the event loop's thread."""

    def __init__(self) -> None:
        self._messages: deque[pb.ToRank] = deque()
        self._tokens = 0  # of the last message
        self._ending: set[RequestId] = set()  # of the last message
        self._ready = asyncio.Event()

    def submit(self, request: Request, history: History, now: float) -> None:
        """ValueError where the request has no place in a message; nothing of it is sent then."""
        submission = pb.Submission()
        write_submission(submission, request, history, now)
        count = len(request.prompt_ids) + len(history.output_ids)
        message = self._last()
        full = self._tokens + count > MOST_TOKENS or len(message.submit) >= MOST_REQUESTS
        if request.id in self._ending or (message.submit and full):
            message = self._begin()
        message.submit.append(submission)
        self._tokens += count
        self._ready.set()

    def end(self, request_id: RequestId, reason: FinishReason) -> None:
        self._last().end.add(id=request_id, reason=reason.value)
        self._ending.add(request_id)
        self._ready.set()

    async def messages(self) -> AsyncIterator[bytes]:
        """What is to be sent, for as long as somebody asks."""
        while True:
            await self._ready.wait()
            while self._messages:
                yield self._messages.popleft().SerializeToString()
            self._ready.clear()

    def _last(self) -> pb.ToRank:
        return self._messages[-1] if self._messages else self._begin()

    def _begin(self) -> pb.ToRank:
        self._tokens, self._ending = 0, set()
        self._messages.append(pb.ToRank())
        return self._messages[-1]
