"""Text to token ids and back, by what ``tokenizer_parts`` read; chat messages to a prompt.

Both are a stranger's, so loading, tokenising and rendering may take any time and memory: they are
bounded where they run in a process that may be ended (``text_worker``). ``checked_tokenizer`` loads
here what such a process has loaded before. Every token's bytes are known, so that half a UTF-8
character can be shown as what it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moeserve.errors import CheckpointError, TokenizerError
from moeserve.models.chat_template import ChatTemplate, template_source
from moeserve.models.tokenizer_cost import TokenizerCost, cost_of, require_decodable
from moeserve.models.tokenizer_parts import REMEDY, TokenizerParts, read_tokenizer_parts

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SHOWN_ERROR = 300  # characters
_NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where a tokenizer is from; ``chat_template`` is a Jinja file instead of the folder's."""

    folder: Path
    chat_template: Path | None = None


class Tokenizer:
    """The tokenizer of one model folder."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        files: TokenizerFiles,
        eos_ids: tuple[int, ...],
        specials: Mapping[str, str],
        template: ChatTemplate | None,
    ) -> None:
        self.files = files
        self.eos_ids = eos_ids
        self._specials = specials
        self.cost: TokenizerCost = cost_of(inner)
        self._inner = inner
        self._template = template
        self._alphabet = alphabet = _alphabet_of(inner)
        self._added = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
        self._bytewise = alphabet is not None and _decoder_of(inner).get("type") == "ByteLevel"
        self._pieces = {
            skip: BytePieces(inner, alphabet or {}, skip_special_tokens=skip)
            for skip in (True, False)
        }

    @classmethod
    def load(
        cls, path: str | Path, chat_template: Path | None = None, *, compiled: bool = True
    ) -> Tokenizer:
        """``chat_template`` is a Jinja file to use instead of the folder's. Unless ``compiled``,
        the template is compiled when it first renders."""
        files = TokenizerFiles(Path(path), chat_template)
        folder = files.folder
        parts = read_tokenizer_parts(folder)
        inner = _made_of(parts)
        try:
            specials = _named_specials(parts.settings)
            source = template_source(folder, parts.settings, chat_template)
            template = None if source is None else ChatTemplate(source, specials, folder)
            eos_ids = _eos_ids(parts.eos_ids, inner, specials)
        except CheckpointError as error:
            raise TokenizerError(f"{error.message}; {REMEDY}") from error
        tokenizer = cls(inner, files, eos_ids, specials, template)
        if compiled:
            tokenizer.compile_template()
        return tokenizer

    def compile_template(self) -> None:
        """TokenizerError where there is one that is not Jinja."""
        try:
            if self._template is not None:
                self._template.compile()
        except CheckpointError as error:
            raise TokenizerError(f"{error.message}; {REMEDY}") from error

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; a model's vocabulary may be padded beyond."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def named_specials(self) -> Mapping[str, str | None]:
        """The tokens that have a name, ``bos_token`` and the like; None where there is none."""
        return {name: self._specials.get(name) for name in _NAMED_SPECIALS}

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """Jinja, where the model has one."""
        return None if self._template is None else self._template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, without the interpreter's lock while it works. TokenizerError where the
        tokenizer fails on this text."""
        try:
            # Of one text: the library keeps the lock while it encodes a text by itself, and makes
            # offsets, which take as long again.
            found = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise self._failed("tokenise this text", error) from error
        return found[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Unfinished UTF-8 decodes to U+FFFD; ids beyond the vocabulary to nothing."""
        try:
            return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise self._failed("read these tokens", error) from error

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
                f"{self.files.folder}: the model has no chat template; ask for a completion of "
                f"a prompt instead"
            )
        return self._template.render(messages, add_generation_prompt, **kwargs)

    def _failed(self, what: str, error: BaseException) -> TokenizerError:
        file = self.files.folder / "tokenizer.json"
        return TokenizerError(f"{file}: cannot {what}: {error}"[:_SHOWN_ERROR])


def is_failure(error: BaseException) -> bool:
    """Whether the tokenizers library failed; its panics are no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


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


def _made_of(parts: TokenizerParts) -> tokenizers.Tokenizer:
    try:
        inner = tokenizers.Tokenizer.from_str(parts.source)
        inner.no_truncation()
        inner.no_padding()
    except BaseException as error:
        if not is_failure(error):
            raise
        raise TokenizerError(
            f"{parts.file}: not a tokenizer ({str(error)[:_SHOWN_ERROR]}); {REMEDY}"
        ) from error
    require_decodable(inner, str(parts.file))
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
    ids: Sequence[int], inner: tokenizers.Tokenizer, specials: Mapping[str, str]
) -> tuple[int, ...]:
    """The end tokens that the model names, and the tokenizer, each once."""
    own = inner.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return tuple(dict.fromkeys(ids if own is None else [*ids, own]))


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
