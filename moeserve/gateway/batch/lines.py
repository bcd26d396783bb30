"""The input of a batch: JSON lines, one request each, as OpenAI's batch API has them.

    {"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

Lines are read one at a time, each within ``MOST_LINE_BYTES``, and counted from 1; empty ones are
none. A line's ``digest`` is of all its bytes, so a line that was changed is another one. What is
wrong with a line is a ``Refused`` for this line alone. Pure, but for the file that is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moeserve.errors import DataLossError
from moeserve.gateway.json_body import Body
from moeserve.gateway.limits import MAX_BODY_BYTES, MAX_N, MAX_PROMPTS

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# A body that is as long as a door takes, and what is around it.
MOST_LINE_BYTES = MAX_BODY_BYTES + (1 << 16)
MOST_CUSTOM_ID_CHARS = 512
DIGEST_BYTES = 16
_KEYS = ("custom_id", "method", "url", "body")
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class InputLine:
    """``raw`` is None where there are more than ``MOST_LINE_BYTES``."""

    number: int
    raw: bytes | None
    digest: bytes

    @property
    def own_digest(self) -> bytes:
        """Of the line at its place: equal lines have others."""
        return _digest_of(f"line {self.number}\n".encode() + self.digest)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a line asks for. ``sequences`` is how many the engine will have of it."""

    url: str
    body: bytes
    sequences: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a line is not run, as the ``error`` of its answer says it."""

    code: str
    message: str


def read_lines(path: Path) -> Generator[InputLine, None, None]:
    """All that are not empty; to be closed where it is not read to its end. DataLossError where the
    file cannot be read on."""
    number = 0
    try:
        with path.open("rb") as file:
            while piece := file.readline(MOST_LINE_BYTES + 2):
                number += 1
                raw = piece.rstrip(b"\r\n")
                if len(raw) > MOST_LINE_BYTES:
                    yield InputLine(number, None, _digest_of_long(file, piece))
                elif raw.strip():
                    yield InputLine(number, raw, _digest_of(raw))
    except OSError as error:
        raise DataLossError(
            f"{path}: cannot be read behind line {number}: {error.strerror}"
        ) from error


def custom_id_of(line: Body) -> str | Refused:
    """The name of a line's request."""
    given = line.get("custom_id")
    if not isinstance(given, str) or not 1 <= len(given) <= MOST_CUSTOM_ID_CHARS:
        return Refused(
            "invalid_custom_id",
            f"custom_id={shown(given)}: expected a text of 1 to {MOST_CUSTOM_ID_CHARS} characters",
        )
    return given


def asked_of(line: Body) -> Asked | Refused:
    """What a line asks for, whose ``custom_id`` is as it should be."""
    unknown = sorted(line.keys() - set(_KEYS))
    if unknown:
        return Refused("unknown_key", f"{shown(unknown[0])}: a line has {', '.join(_KEYS)}")
    if line.get("method") != "POST":
        return Refused("invalid_method", f"method={shown(line.get('method'))}: expected 'POST'")
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in URLS:
        return Refused("invalid_url", f"url={shown(url)}: expected one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        return Refused("invalid_body", f"body: a JSON {type(body).__name__}, expected an object")
    if body.get("stream"):
        return Refused("invalid_body", "body.stream: a batch has whole answers; leave it out")
    return Asked(url, json.dumps(body).encode(), _sequences(body))


def shown(value: object) -> str:
    """What a stranger wrote, short and on one line."""
    return f"{value!a:.100}"


def _sequences(body: dict[str, Any]) -> int:
    """Of a body whose fields the door has not looked at yet."""
    n, prompt = body.get("n"), body.get("prompt")
    copies = n if type(n) is int and 1 <= n <= MAX_N else 1
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return copies
    return copies * min(len(prompt), MAX_PROMPTS)


def _digest_of(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:DIGEST_BYTES]


def _digest_of_long(file: IO[bytes], first: bytes) -> bytes:
    """Of a line whose rest is not kept."""
    digest = hashlib.sha256(first)
    piece = first
    while not piece.endswith(b"\n") and (piece := file.readline(_PIECE)):
        digest.update(piece)
    return digest.digest()[:DIGEST_BYTES]
