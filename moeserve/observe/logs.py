"""The log of a process: lines of text for people, or one JSON object a line for programs.

A record may carry fields, given as ``extra={FIELDS: {...}}``: text shows them as ``name=value``
after the message, JSON beside ``time``, ``level``, ``logger`` and ``message``. Fields may hold what
a client sent: characters that would end the line, or drive a terminal, are escaped in them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

FIELDS = "fields"
LogFormat = Literal["text", "json"]


def configure_log(
    level: str, form: LogFormat, rank: int | None = None, stream: TextIO | None = None
) -> None:
    """Sends what is logged from ``level`` on to ``stream``, standard error by default. ``rank`` is
    named on every line, where it is given. Has no effect where a log was configured before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(rank) if form == "json" else TextFormatter(rank))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00,000 INFO moeserve.request: request id=cmpl-1 status=OK``."""

    def __init__(self, rank: int | None = None) -> None:
        who = "" if rank is None else f"rank {rank} "
        super().__init__(f"%(asctime)s {who}%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = fields_of(record).items()
        said = [super().formatMessage(record), *(f"{name}={_word(v)}" for name, v in fields)]
        return " ".join(said)


class JsonFormatter(logging.Formatter):
    """One object a line; ``exception`` is a traceback, times are UTC."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self._who = {} if rank is None else {"rank": rank}

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._who,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    """What the record carries beside its message; empty for most."""
    found: Mapping[str, object] = getattr(record, FIELDS, {})
    return found


def _word(value: object) -> str:
    """As it is where it is one plain word, else quoted, with all but printable ASCII escaped."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(" \"'=\\")
    return text if text and plain else json.dumps(text)
