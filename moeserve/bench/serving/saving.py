"""Outcomes as JSON lines, one object each, in the order of sending; times in seconds of the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from moeserve.bench.serving.outcomes import Outcome
from moeserve.errors import ConfigError

_DIGITS = 6


def save(outcomes: Iterable[Outcome], path: Path) -> None:
    """ConfigError where the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            for outcome in outcomes:
                file.write(line_of(outcome) + "\n")
    except OSError as error:
        raise ConfigError(f"--save={str(path)!r}: cannot be written: {error.strerror}") from error


def line_of(outcome: Outcome) -> str:
    shown = dataclasses.asdict(outcome)
    for name, value in shown.items():
        if isinstance(value, float):
            shown[name] = round(value, _DIGITS)
    shown["message_s"] = [round(at_s, _DIGITS) for at_s in outcome.message_s]
    return json.dumps(shown)
