"""A model's chat template: messages to the text of a prompt.

It is a stranger's program. It runs in Jinja's immutable sandbox, which keeps it from the rest of
the process, but not from time and memory: compiling and rendering belong into a process that may
be ended (``text_worker``). So nothing is compiled before the first rendering, or ``compile``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moeserve.errors import CheckpointError, InvalidRequestError
from moeserve.models.files import read_text
from moeserve.models.generation_tag import GenerationTag

# What a program in the sandbox can raise; MemoryError is left to whoever bounds memory.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,  # also of Jinja's own, for a cycler of nothing
    TypeError,
    ValueError,
)
_SHOWN_ERROR = 1000  # characters of what a template says, which may be any text


class ChatTemplate:
    """One template, compiled when it is first needed. ``specials`` are the names of the model's
    special tokens, which a request may replace."""

    def __init__(self, source: str, specials: Mapping[str, str], where: Path) -> None:
        self.source = source
        self._specials = specials
        self._where = where
        self._compiled: jinja2.Template | None = None

    def compile(self) -> jinja2.Template:
        """CheckpointError where it is not Jinja."""
        if self._compiled is None:
            try:
                self._compiled = _sandbox().from_string(self.source)
            except (jinja2.TemplateError, RecursionError, OverflowError, SyntaxError) as error:
                raise CheckpointError(
                    f"{self._where}: the chat template is not valid Jinja: {error}"[:_SHOWN_ERROR]
                ) from error
        return self._compiled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation; InvalidRequestError where the template rejects it."""
        template = self.compile()
        try:
            return template.render(
                **{**self._specials, **kwargs},
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the model's chat template rejects these messages: {error}"[:_SHOWN_ERROR],
                param="messages",
            ) from error


def template_source(
    folder: Path, settings: Mapping[str, Any], given: Path | None = None
) -> str | None:
    """Of ``given``, of the folder's own file, or of ``tokenizer_config.json``; None without."""
    file = given or folder / "chat_template.jinja"
    if given is not None or file.exists():
        return read_text(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return found


def _sandbox() -> ImmutableSandboxedEnvironment:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: unlike Jinja's own, it escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
