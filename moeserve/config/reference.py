"""Prints ``docs/settings.md``, the reference of all settings, from their declarations.

``make docs`` writes the file, and ``tests/test_config.py`` holds it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic.fields import FieldInfo

from moeserve.config.cluster import ClusterOptions, GatewayOptions
from moeserve.config.commands import COMMANDS, GROUPS
from moeserve.config.effect import RULES
from moeserve.config.group import Options
from moeserve.config.options import AnswerOptions, DoorOptions
from moeserve.config.sources import ENV_PREFIX, SECRETS, choices, flag_of
from moeserve.config.variables import MEANING

WIDTH = 100
INTRODUCTION = (
    "Written by `make docs` from `moeserve/config/options.py`: a change is made there.",
    "A flag wins over an environment variable, that over a line of the YAML file given with "
    "`--config`, and that over the default. Where `none` is a value, it takes back what a lower "
    "source has set. A `MOESERVE_...` variable or a key that is no setting is an error, and so is "
    "a value out of bounds; the message names the flag, the variable, or the file and its key. "
    "`--print-config` prints the settings as YAML that can be read back.",
    "A setting that was given and would change nothing is an error, too. A command refuses a key "
    "of the file that it does not take; variables may be of another command, since one environment "
    "serves all. Of what a command takes, these need another:",
)
ELSEWHERE = (
    "`moeserve evaluate` and `moeserve bench` have flags of their own for the runs that they "
    "compare (`--quantization`, `--dtype`, ...; see their `--help`), and read neither environment "
    "nor file. `moeserve doctor` looks at what `moeserve serve` would take from the environment."
)

# Who uses a group, where that is not every rank.
_USERS: Mapping[type[Options], str] = {
    AnswerOptions: "rank 0 alone",
    DoorOptions: "rank 0 alone",
    ClusterOptions: "every rank, and by gateways",
    GatewayOptions: "gateways",
}


def reference() -> str:
    """The text of the file."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Settings"
    for text in INTRODUCTION:
        yield from ("", *_wrapped(text))
    yield ""
    for rule in RULES:
        names = ", ".join(f"`{flag_of(name)}`" for name in sorted(rule.settings))
        yield from _wrapped(f"- {names}: {rule.needs}.", indent="  ")
    for group in GROUPS:
        yield from _section(group)
    yield from ("", "## Elsewhere", "")
    yield from _wrapped(ELSEWHERE)
    yield from ("", "These variables are no settings:", "")
    yield from ("| variable | what it says |", "|---|---|")
    yield from (f"| `{name}` | {text} |" for name, text in MEANING.items())


def _wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of ``text``, code in backticks unbroken."""
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(whole, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _section(group: type[Options]) -> Iterator[str]:
    title = (group.__doc__ or "").splitlines()[0].removesuffix(".")
    takers = [f"`{name}`" for name, kind in COMMANDS.items() if issubclass(kind, group)]
    yield from ("", f"## {title}", "")
    users = _USERS.get(group, "every rank")
    yield from _wrapped(f"Taken by {', '.join(takers)}; used by {users}.")
    yield ""
    yield "| flag | variable | YAML key | default | values | what it is |"
    yield "|---|---|---|---|---|---|"
    for name, field in group.model_fields.items():
        cells = (
            f"`{flag_of(name)}`",
            f"`{ENV_PREFIX}{name.upper()}`",
            f"`{name}`",
            f"`{str(field.default).lower()}`",
            _values(name, field),
            field.description or "",
        )
        yield f"| {' | '.join(cells)} |"


def _values(name: str, field: FieldInfo) -> str:
    """What may be said: words, or a kind and its bounds; and whether nothing may."""
    words = [f"`{word}`" for word in choices(field.annotation) if word != "N"]
    bounds = _bounds(field)
    if bool in _kinds(field.annotation):
        words += [f"`{flag_of(name)}`, `--no-{flag_of(name)[2:]}`; `true`, `false`"]
    elif int in _kinds(field.annotation) or float in _kinds(field.annotation):
        number = "a number" if float in _kinds(field.annotation) else "a whole number"
        words += [" ".join(filter(None, (number, _range(bounds))))]
        if field.description and "memory for" in field.description:
            words[-1] = "bytes, or a number with a unit such as `GiB`"
    elif Path in _kinds(field.annotation):
        words += ["a path"]
    elif not words:
        least = bounds.get("min_length", 0)
        words += [f"text of {least} characters or more" if least > 1 else "text"]
    if NoneType in _kinds(field.annotation):
        words += ["`none`"]
    return ", ".join(words) + ("; not shown in messages" if name in SECRETS else "")


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*(_kinds(part) for part in parts))


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """``ge``, ``le`` and ``min_length``, wherever they were declared."""
    found: dict[str, Any] = {}
    declared = [field, *(part for a in get_args(field.annotation) for part in (a, *get_args(a)))]
    for holder in declared:
        for bound in (*getattr(holder, "metadata", ()), holder):
            for name in ("ge", "le", "min_length"):
                value = getattr(bound, name, None)
                if isinstance(value, int | float):
                    found[name] = value
    return found


def _range(bounds: dict[str, Any]) -> str:
    least, most = bounds.get("ge"), bounds.get("le")
    if least is None:
        return ""
    return f"from {least:g} to {most:g}" if most is not None else f"from {least:g}"


if __name__ == "__main__":
    print(reference(), end="")
