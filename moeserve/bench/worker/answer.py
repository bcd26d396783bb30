"""The worker's side of a measurement: one JSON request per line, one JSON reply per line.

A worker opens its ``Channel`` before it imports anything large, says ``ready`` when it could
answer, and serves until its input ends. Whatever libraries print goes to standard error. Imports
the standard library only, so that it also runs in an environment that lacks this package.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


class Channel:
    """Owns what was standard output."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, **said: Any) -> None:
        self._send(said)

    def serve(self, handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
        """``{"do": name, **arguments}`` calls a handler; its result is the reply."""
        for line in sys.stdin:
            asked = json.loads(line)
            self._send(handlers[asked.pop("do")](**asked))

    def _send(self, message: Mapping[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()
