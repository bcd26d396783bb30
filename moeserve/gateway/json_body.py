"""A request body as JSON: an object in UTF-8, without NaN, infinities and lone surrogates.

Parsing takes time and memory by the number of values, not of bytes: 16 MB may be five million
lists. So a body that may have many is parsed by a process of its own (``main``), which refuses
those with more values than a request needs, and gives the others back in a form that takes little
to read: long strings and lists of integers as bytes, beside a small rest.
"""

from __future__ import annotations

import array
import gc
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from moeserve.errors import InvalidRequestError
from moeserve.process.frames import Head
from moeserve.process.job_worker import WorkerProgram
from moeserve.process.serve_jobs import JobLimits, Reply, run_worker

Body = Mapping[str, Any]

# A conversation of 1024 messages with tools has some ten thousand.
MOST_VALUES = 1 << 16
MOST_DEPTH = 128
_LONG_STRING = 4096  # characters
_LONG_LIST = 64
_MARKS = (b",", b"[", b"{", b"\\")

# A body of 16 MB takes less than 1 GiB and 5 s.
_LIMITS = JobLimits(memory_bytes=3 << 29, cpu_s=20)
JSON_PROGRAM = WorkerProgram("parsing the body", "moeserve.gateway.json_body", niceness=5)


def parse_json(raw: bytes) -> Body:
    """The object without its nulls, which say the same as an absent field."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
        if b"\\u" in raw:  # an escape can spell half of a surrogate pair, which is no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("the body is not Unicode: it has a lone surrogate") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is a JSON {type(body).__name__}, expected an object")
    return {name: value for name, value in body.items() if value is not None}


def takes_long(raw: bytes, small: int, large: int, marks: int) -> bool:
    """Whether a body may have many values: it has more than ``large`` bytes, or more than ``small``
    of which more than ``marks`` begin or separate values or are escaped."""
    if len(raw) <= small or len(raw) > large:
        return len(raw) > large
    return sum(map(raw.count, _MARKS)) > marks


def pack(body: Body, most_ints: int) -> bytes:
    """``unpack`` makes the same of it. InvalidRequestError where it has more than ``MOST_VALUES``
    values, one more than ``MOST_DEPTH`` deep, or more than ``most_ints`` integers in long lists."""
    blobs: list[bytes] = []
    table: list[tuple[list[str | int], str, int]] = []
    rest: dict[str, Any] = {}
    # Where a value goes (container and key), its path from the top, and the value.
    todo: list[tuple[Any, str | int, list[str | int], Any]] = [
        (rest, k, [k], v) for k, v in body.items()
    ]
    values = ints = 0
    while todo:
        into, key, path, value = todo.pop()
        values += 1
        if values + len(todo) > MOST_VALUES:
            raise InvalidRequestError(
                f"the body has more than {MOST_VALUES} values: send less, or integers in lists"
            )
        if len(path) > MOST_DEPTH:
            raise InvalidRequestError(f"{path[0]!a:.60}: nested more than {MOST_DEPTH} deep")
        blob = _blob_of(value)
        if blob is not None:
            kind, content = blob
            ints += len(value) if kind != "s" else 0
            if ints > most_ints:
                raise InvalidRequestError(
                    f"the body has more than {most_ints} integers in lists, which is more than any "
                    "request takes: send less"
                )
            table.append((path, kind, len(content)))
            blobs.append(content)
            into[key] = None
        elif isinstance(value, dict):
            into[key] = inner = dict.fromkeys(value)
            todo += [(inner, k, [*path, k], v) for k, v in value.items()]
        elif isinstance(value, list):
            into[key] = items = [None] * len(value)
            todo += [(items, i, [*path, i], v) for i, v in enumerate(value)]
        else:
            into[key] = value
    ordered = {name: rest[name] for name in body}
    small = json.dumps({"rest": ordered, "table": table}, ensure_ascii=False).encode()
    return len(small).to_bytes(8, "little") + small + b"".join(blobs)


def unpack(packed: bytes) -> Body:
    size = int.from_bytes(packed[:8], "little")
    small = json.loads(packed[8 : 8 + size])
    body: dict[str, Any] = small["rest"]
    at = 8 + size
    for path, kind, length in small["table"]:
        content = packed[at : at + length]
        at += length
        into: Any = body
        for step in path[:-1]:
            into = into[step]
        into[path[-1]] = content.decode() if kind == "s" else array.array(kind, content).tolist()
    return body


def _blob_of(value: object) -> tuple[str, bytes] | None:
    """Type code and bytes of what is long; None where it stays as it is."""
    if isinstance(value, str) and len(value) > _LONG_STRING:
        return "s", value.encode()
    if isinstance(value, list) and len(value) >= _LONG_LIST and set(map(type, value)) == {int}:
        for code in ("i", "q"):
            try:
                return code, array.array(code, value).tobytes()
            except OverflowError:
                continue
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse(head: Mapping[str, Any], payload: bytes) -> Reply:
    return {}, pack(parse_json(payload), head["most_ints"])


def _prepare() -> tuple[Mapping[str, Any], Head]:
    return {"parse": _parse}, {}


def main() -> None:
    """Serve jobs on standard input and output."""
    gc.disable()  # JSON has no cycles, and of millions of lists every collection looks at all
    run_worker(_prepare, _LIMITS, _LIMITS)


if __name__ == "__main__":
    main()
