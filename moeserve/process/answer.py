"""The child's side of a conversation: one JSON request per line, one JSON reply per line.

A child opens its ``Channel`` before it imports anything large, may say ``ready`` when it could
answer, and serves until its input ends. Whatever libraries print goes to standard error. Imports
the standard library only, so that it also runs in an environment that lacks this package.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Channel:
    """Owns what was standard output."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, **said: Any) -> None:
        self.reply(said)

    def serve(self, handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
        """``{"do": name, **arguments}`` calls a handler; its result is the reply."""
        for request in self.requests():
            self.reply(handlers[request.pop("do")](**request))

    def requests(self) -> Iterator[dict[str, Any]]:
        """Each wants one ``reply``."""
        for line in sys.stdin:
            yield json.loads(line)

    def reply(self, message: Mapping[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()
