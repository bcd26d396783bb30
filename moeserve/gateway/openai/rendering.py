"""An answer as JSON text, in pieces none of which takes long.

The encoder lets no other thread run until it has ended, and the log-probabilities of long prompts
are megabytes. So long lists are encoded slice by slice. The text is that of ``json.dumps``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# Of a list, what is encoded at once.
SLICE = 512
# An answer's choices are objects of lists: what lies deeper is encoded as a whole.
DEEPEST = 5


def render(value: Any) -> bytes:
    """Raises ValueError for numbers that JSON has not."""
    return "".join(_pieces(value, 0)).encode()


def _pieces(value: Any, depth: int) -> Iterator[str]:
    if depth == DEEPEST or not isinstance(value, dict | list) or not value:
        yield _dumps(value)
    elif isinstance(value, dict):
        for i, (name, item) in enumerate(value.items()):
            yield f"{',' if i else '{'}{_dumps(name)}:"
            yield from _pieces(item, depth + 1)
        yield "}"
    elif len(value) > SLICE:
        for first in range(0, len(value), SLICE):
            yield ("," if first else "[") + _dumps(value[first : first + SLICE])[1:-1]
        yield "]"
    else:
        for i, item in enumerate(value):
            yield "," if i else "["
            yield from _pieces(item, depth + 1)
        yield "]"


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
