"""Requests read from traces of others, and from our own format.

====================  ==========================================================================
``azure`` (CSV)       Azure LLM 2023, 2024: TIMESTAMP, ContextTokens, GeneratedTokens
``burstgpt`` (CSV)    Timestamp (s), Request tokens, Response tokens; lines whose request failed,
                      which have no response tokens, are left out
``mooncake`` (JSONL)  timestamp (ms), input_length, output_length, hash_ids: one for each 512
                      tokens of the prompt, equal where the prompt is equal up to there
``jsonl``             ours: ``arrival_s``, ``output_tokens`` and one of ``prompt`` (a text, or a
                      list of token ids), ``input_tokens``, ``hash_ids`` with ``input_tokens`` and
                      ``block_size``
====================  ==========================================================================

A name that ends in ``.gz`` is read through gzip. A file may be a stranger's: lines and their number
are bounded, and ConfigError names the line. Times are as in the file; ``plan.replayed`` makes them
seconds after the start.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from moeserve.bench.serving.plan import MAX_TOKENS, PlannedRequest, TokenSpan
from moeserve.errors import ConfigError
from moeserve.regular_file import open_regular

MOST_REQUESTS = 1_000_000
MOST_LINE_BYTES = 64 << 20
MOONCAKE_BLOCK = 512
_MOST_KEY = (1 << 62) - 1
_OWN_KEY = 1 << 62  # of prompts that share nothing, by their line

Row = Mapping[str, Any]
_FORMATS: Mapping[str, tuple[str, ...]] = {  # what tells them apart: columns or keys that all have
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
    "jsonl": ("output_tokens",),
}
FORMATS = tuple(_FORMATS)


def read_trace(
    path: Path, form: str | None = None, most: int | None = None
) -> list[PlannedRequest]:
    """The first ``most`` requests, all of them by default; ``form`` None is told by the names."""
    found: list[PlannedRequest] = []
    most = MOST_REQUESTS if most is None else min(most, MOST_REQUESTS)
    with ExitStack() as stack:
        lines = _lines(path, stack)
        rows, form = _rows(path, lines, form)
        read = _READERS[form]
        for number, row in rows:
            if len(found) >= most:
                break
            try:
                request = read(row, number)
            except (KeyError, ValueError, TypeError, OverflowError, ConfigError) as error:
                why = f"has no {error}" if isinstance(error, KeyError) else str(error)
                raise ConfigError(f"{path}, line {number}: is no line of {form}: {why}") from error
            if request is not None:
                found.append(request)
    if not found:
        raise ConfigError(f"{path}: has no requests")
    return found


def _lines(path: Path, stack: ExitStack) -> Iterator[str]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise ConfigError(f"--trace={str(path)!r}: cannot be read: {error.strerror}") from error
    if file is None:
        raise ConfigError(f"--trace={str(path)!r}: is no regular file")
    stack.enter_context(file)
    source: BinaryIO = file
    if path.suffix == ".gz":
        source = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
    return _bounded(path, source)


def _bounded(path: Path, source: BinaryIO) -> Iterator[str]:
    try:
        while line := source.readline(MOST_LINE_BYTES + 1):
            if len(line) > MOST_LINE_BYTES:
                raise ConfigError(f"{path}: has a line longer than {MOST_LINE_BYTES} bytes")
            yield line.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _rows(
    path: Path, lines: Iterator[str], form: str | None
) -> tuple[Iterator[tuple[int, Row]], str]:
    """Rows with the numbers of their lines, and the format: the one that was asked for, or else the
    first that has the names of the first row."""
    first = next(lines, "")
    if first.lstrip().startswith("{"):
        names = list(_object(path, 1, first))
        rows = _objects(path, itertools.chain([first], lines))
    else:
        names = next(csv.reader(io.StringIO(first)), [])
        rows = _csv(path, lines, names)
    fitting = [known for known, needed in _FORMATS.items() if set(needed) <= set(names)]
    if form is None and not fitting:
        raise ConfigError(f"{path}: is of no known format: expected one of {', '.join(FORMATS)}")
    if form is not None and form not in FORMATS:
        raise ConfigError(f"--trace-format={form!r}: expected one of {', '.join(FORMATS)}")
    if form is not None and form not in fitting:
        raise ConfigError(f"{path}: {form} has {', '.join(_FORMATS[form])} in its first line")
    return rows, form or fitting[0]


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _object(path, number, line)


def _object(path: Path, number: int, line: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}, line {number}: expected an object")
    return found


def _csv(path: Path, lines: Iterator[str], columns: list[str]) -> Iterator[tuple[int, Row]]:
    try:
        for number, cells in enumerate(csv.reader(lines), 2):
            if cells:
                yield number, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise ConfigError(f"{path}: is no CSV: {error}") from error


def _azure(row: Row, line: int) -> PlannedRequest | None:
    at = datetime.fromisoformat(row["TIMESTAMP"])
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return _sized(line, at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(row: Row, line: int) -> PlannedRequest | None:
    return _sized(
        line, float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"])
    )


def _mooncake(row: Row, line: int) -> PlannedRequest | None:
    input_tokens = _integer(row, "input_length")
    return _sized(
        line,
        _number(row, "timestamp") / 1000,
        input_tokens,
        _integer(row, "output_length"),
        _blocks(row.get("hash_ids", []), input_tokens, MOONCAKE_BLOCK),
    )


def _own(row: Row, line: int) -> PlannedRequest | None:
    unknown = row.keys() - {
        "arrival_s", "output_tokens", "prompt", "input_tokens", "hash_ids", "block_size"
    }  # fmt: skip
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is not known")
    at_s = _number(row, "arrival_s") if "arrival_s" in row else 0.0
    output_tokens = _integer(row, "output_tokens")
    if "prompt" not in row:
        count = _integer(row, "input_tokens")
        if "hash_ids" not in row:
            return _sized(line, at_s, count, output_tokens)
        blocks = _blocks(row["hash_ids"], count, _integer(row, "block_size"))
        return _sized(line, at_s, count, output_tokens, blocks)
    if {"input_tokens", "hash_ids", "block_size"} & row.keys():
        raise ValueError("a prompt says by itself how long it is")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return PlannedRequest(_finite(at_s), output_tokens, text=prompt)
    if not isinstance(prompt, list) or not all(type(x) is int and 0 <= x < 1 << 32 for x in prompt):
        raise ValueError("prompt: expected a text or a list of token ids")
    return PlannedRequest(_finite(at_s), output_tokens, token_ids=tuple(prompt))


_READERS: Mapping[str, Callable[[Row, int], PlannedRequest | None]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "mooncake": _mooncake,
    "jsonl": _own,
}


def _sized(
    line: int,
    at_s: float,
    input_tokens: int,
    output_tokens: int,
    blocks: tuple[TokenSpan, ...] = (),
) -> PlannedRequest | None:
    """None where the trace tells of a request that had no prompt or no answer."""
    if input_tokens == 0 or output_tokens == 0:
        return None
    if not 0 < input_tokens <= MAX_TOKENS:
        raise ValueError(f"{input_tokens} tokens of prompt: expected 1 to {MAX_TOKENS}")
    own = (TokenSpan(_OWN_KEY + line, input_tokens),)
    return PlannedRequest(_finite(at_s), output_tokens, spans=blocks or own)


def _blocks(hashes: object, tokens: int, block_size: int) -> tuple[TokenSpan, ...]:
    """A span for each hash, the last one with what is left."""
    if not isinstance(hashes, list) or not all(
        type(key) is int and 0 <= key <= _MOST_KEY for key in hashes
    ):
        raise ValueError("hash_ids: expected a list of integers from 0")
    if block_size < 1:
        raise ValueError(f"block_size {block_size}: expected at least 1")
    if hashes and not (len(hashes) - 1) * block_size < tokens <= len(hashes) * block_size:
        raise ValueError(f"{len(hashes)} hash_ids for {tokens} tokens in blocks of {block_size}")
    starts = range(0, tokens, block_size)
    pairs = zip(hashes, starts, strict=False)
    return tuple(TokenSpan(key, min(block_size, tokens - start)) for key, start in pairs)


def _number(row: Row, name: str) -> float:
    value = row[name]
    if type(value) not in (int, float):
        raise ValueError(f"{name}={value!r:.60}: expected a number")
    return _finite(float(value))


def _integer(row: Row, name: str) -> int:
    value = row[name]
    if type(value) is not int:
        raise ValueError(f"{name}={value!r:.60}: expected an integer")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value}: is no time")
    return value
