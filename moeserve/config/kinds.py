"""Kinds of values that settings have: sizes in bytes, ports, counts, times, secrets."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}iB": 1024 ** (i + 1) for i, unit in enumerate("KMGT")}
_UNITS |= {f"{unit}B": 1000 ** (i + 1) for i, unit in enumerate("KMGT")}
_MOST_BYTES = 1 << 60


def parse_bytes(text: object) -> object:
    """``"2GiB"`` -> 2147483648; integers pass."""
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if not found or found[2].lower() not in units:
        raise ValueError(f"not a size; write bytes or a number with one of {', '.join(_UNITS)[2:]}")
    size = float(found[1]) * units[found[2].lower()]
    if size > _MOST_BYTES:
        raise ValueError("more than any machine has")
    return int(size)


def _reveal(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Port = Annotated[int, Field(ge=0, le=65535)]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]
Count = Annotated[int, Field(ge=1)]
# Hidden wherever it is shown, and written out where settings are handed on.
Secret = Annotated[SecretStr | None, PlainSerializer(_reveal)]
