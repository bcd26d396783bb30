"""Text to token ids and back, from ``tokenizer.json``; chat messages to a prompt.

The chat template is a stranger's program: it runs in Jinja's immutable sandbox. Every token's
bytes are known, so that half a UTF-8 character can be shown as what it is.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moeserve.errors import CheckpointError, InvalidRequestError, TokenizerError
from moeserve.models.checkpoint import read_json
from moeserve.models.fields import Fields
from moeserve.models.generation_tag import GenerationTag

_REMEDY = "prompts as token ids still work"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What a program in the sandbox can raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of one model folder."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        eos_ids: tuple[int, ...],
        specials: Mapping[str, str],
        template: jinja2.Template | None,
        alphabet: Mapping[str, int] | None,
        where: Path,
        template_source: str | None = None,
    ) -> None:
        self.eos_ids = eos_ids
        self.template_source = template_source
        self._inner = inner
        self._specials = specials
        self._template = template
        self._alphabet = alphabet
        self._where = where
        self._added = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
        self._bytewise = alphabet is not None and _decoder_of(inner).get("type") == "ByteLevel"
        self._pieces = {
            skip: BytePieces(inner, alphabet or {}, skip_special_tokens=skip)
            for skip in (True, False)
        }

    @classmethod
    def load(cls, path: str | Path, chat_template: Path | None = None) -> Tokenizer:
        """``chat_template`` is a Jinja file to use instead of the folder's."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        inner = _read_tokenizer(file)
        try:
            settings = read_json(folder / "tokenizer_config.json", required=False)
            source = _template_of(folder, settings, chat_template)
            template = _compile(folder, source)
            specials = _named_specials(settings)
            eos_ids = _eos_ids(folder, inner, specials)
        except CheckpointError as error:
            raise TokenizerError(f"{error.message}; {_REMEDY}") from error
        return cls(inner, eos_ids, specials, template, _alphabet_of(inner), file, source)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; a model's vocabulary may be padded beyond."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Unfinished UTF-8 decodes to U+FFFD; ids beyond the vocabulary to nothing."""
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def byte_pieces(self, skip_special_tokens: bool = True) -> Mapping[int, bytes] | None:
        """For every id what it adds to the bytes that ``decode`` reads as UTF-8; None where a text
        is not just the bytes of its tokens, one after the other."""
        return self._pieces[skip_special_tokens] if self._bytewise else None

    def id_to_token(self, token_id: int) -> str | None:
        """As the vocabulary spells it."""
        return self._inner.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._inner.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, which need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None and all(letter in self._alphabet for letter in token):
            return bytes(self._alphabet[letter] for letter in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation. Encode it without adding special tokens."""
        if self._template is None:
            raise TokenizerError(
                f"{self._where.parent}: the model has no chat template; ask for a completion of "
                f"a prompt instead"
            )
        try:
            return self._template.render(
                **{**self._specials, **kwargs},
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(
                f"the model's chat template rejects these messages: {error}", param="messages"
            ) from error


class BytePieces(dict[int, bytes]):
    """The bytes of tokens of a byte-level decoder, kept once they were asked for.

    As the decoder does: a token with a letter that stands for no byte is text.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, alphabet: Mapping[str, int], skip_special_tokens: bool
    ) -> None:
        super().__init__()
        self._inner = inner
        self._alphabet = alphabet
        added = inner.get_added_tokens_decoder().items() if skip_special_tokens else ()
        self._skipped = {token_id for token_id, token in added if token.special}

    def __missing__(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            piece = b""
        elif all(letter in self._alphabet for letter in token):
            piece = bytes(self._alphabet[letter] for letter in token)
        else:
            piece = token.encode()
        self[token_id] = piece
        return piece


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    try:
        source = file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file}: cannot be read ({error}); {_REMEDY}") from error
    try:
        inner = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{file}: not a tokenizer ({error}); {_REMEDY}") from error
    inner.no_truncation()
    inner.no_padding()
    return inner


def _named_specials(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, each a string or an object with ``content``."""
    found = {}
    for name in _NAMED_SPECIALS:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _eos_ids(
    folder: Path, inner: tokenizers.Tokenizer, specials: Mapping[str, str]
) -> tuple[int, ...]:
    """The end tokens that any of the folder's configs names, each once."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name, required=False)
        ids.extend(Fields(config, str(folder / name)).ids("eos_token_id"))
    own = inner.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return tuple(dict.fromkeys(ids if own is None else [*ids, own]))


def _template_of(
    folder: Path, settings: Mapping[str, Any], given: Path | None = None
) -> str | None:
    file = given or folder / "chat_template.jinja"
    if given is not None or file.exists():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return found


def _compile(folder: Path, source: str | None) -> jinja2.Template | None:
    if source is None:
        return None
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _raise
    sandbox.globals["strftime_now"] = _strftime_now
    try:
        return sandbox.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{folder}: the chat template is not valid Jinja: {error}") from error


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


def _decoder_of(inner: tokenizers.Tokenizer) -> dict[str, Any]:
    """As ``tokenizer.json`` describes it; empty where there is none."""
    return json.loads(inner.decoder.__getstate__()) if inner.decoder else {}


def _alphabet_of(inner: tokenizers.Tokenizer) -> dict[str, int] | None:
    """Letter -> byte of a byte-level vocabulary; None for the others."""
    decoder = _decoder_of(inner)
    parts = decoder.get("decoders", [decoder])
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return None
    # GPT-2's table: printable bytes stand for themselves, the rest for letters from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
