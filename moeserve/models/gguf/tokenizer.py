"""The tokenizer and the chat template of a GGUF file, as ``tokenizer.json`` and
``tokenizer_config.json`` would have them. No torch.

Two models are known: ``gpt2`` (merges of bytes; how a text is cut before stands in ``splitting``)
and ``llama`` (SentencePiece: two tokens become the one they spell, the best score first). A file
may have the original ``tokenizer.json`` instead. Whatever is wrong or not known is a TokenizerError
that says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moeserve.errors import CheckpointError, TokenizerError
from moeserve.models.gguf.metadata import Metadata
from moeserve.models.gguf.places import read_headers
from moeserve.models.gguf.splitting import SPLITTINGS

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
# Of all tokens of a vocabulary, what looking for merges may take: characters times characters.
_MOST_WORK = 1 << 26
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_REMEDY = "put the model's tokenizer.json beside it; prompts as token ids work without"
Json = dict[str, Any]


def gguf_tokenizer(file: Path) -> tuple[str, Json, tuple[int, ...]]:
    """Of the model whose first file this is: both, and its end tokens."""
    try:
        vocabulary = _Vocabulary(Metadata(read_headers(file)))
        return vocabulary.source(), vocabulary.settings(), vocabulary.end_tokens()
    except CheckpointError as error:
        raise TokenizerError(f"{error.message}; {_REMEDY}") from error


class _Vocabulary:
    """The keys of a tokenizer, read and checked."""

    def __init__(self, m: Metadata) -> None:
        self.file = m.file
        self.fields = m.fields
        self.tokens: tuple[str, ...] = self._texts("tokens")
        self.kinds = self._numbers("token_type")

    def source(self) -> str:
        """As ``tokenizer.json``."""
        given = self.fields.text("tokenizer.huggingface.json", default="")
        if given:
            return given
        model = self.fields.text("tokenizer.ggml.model", default="")
        if not self.tokens:
            raise self._wrong("has no tokens")
        if len(self._ids()) + self.kinds.count(_UNUSED) < len(self.tokens):
            raise self._wrong("has a token twice")
        if model == "gpt2":
            return json.dumps(self._bytewise())
        if model == "llama":
            return json.dumps(self._by_score())
        raise self._wrong(f"tokenizer.ggml.model={model!r} is not known (only gpt2, llama)")

    def settings(self) -> Json:
        """As ``tokenizer_config.json``."""
        found: Json = {}
        for ours, theirs in _NAMED.items():
            token = self._named(ours)
            if token is not None:
                found[theirs] = token
        template = self.fields.text("tokenizer.chat_template", default="")
        if template:
            found["chat_template"] = template
        return found

    def end_tokens(self) -> tuple[int, ...]:
        names = ("eos", "eot", "eom")
        ids = (i for name in names for i in self.fields.ids(f"tokenizer.ggml.{name}_token_id"))
        return tuple(dict.fromkeys(ids))

    def _bytewise(self) -> Json:
        name = self.fields.text("tokenizer.ggml.pre", default="")
        if name not in SPLITTINGS:
            known = ", ".join(SPLITTINGS)
            raise self._wrong(f"tokenizer.ggml.pre={name!r} is not known (only {known})")
        splitting = SPLITTINGS[name]
        level: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        words = {**level, "use_regex": splitting.by_words}
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": splitting.ignore_merges, "vocab": self._ids(),
            "merges": self._merges(),
        }  # fmt: skip
        return self._whole(
            {"type": "NFC"} if splitting.normalised else None,
            {"type": "Sequence", "pretokenizers": [*splitting.parts, words]},
            model,
            {**level, "use_regex": True},
            splitting.adds_bos,
        )

    def _by_score(self) -> Json:
        prefix = self.fields.flag("tokenizer.ggml.add_space_prefix", default=True)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        first = {"type": "Prepend", "prepend": _SPACE}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders: list[Json] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
        unknown = self._named("unknown") or next(
            (t for t, kind in zip(self.tokens, self.kinds, strict=True) if kind == _UNKNOWN), None
        )
        model = {
            "type": "BPE", "dropout": None, "unk_token": unknown,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": True, "ignore_merges": False, "vocab": self._ids(),
            "merges": self._merges() or list(self._merges_by_score()),
        }  # fmt: skip
        return self._whole(
            {"type": "Sequence", "normalizers": [first, spaces] if prefix else [spaces]},
            None,
            model,
            {"type": "Sequence", "decoders": [*decoders, strip] if prefix else decoders},
            adds_bos=True,
        )

    def _whole(
        self, normalizer: Json | None, pre: Json | None, model: Json, decoder: Json, adds_bos: bool
    ) -> Json:
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(),
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "post_processor": self._frame(adds_bos),
            "decoder": decoder,
            "model": model,
        }

    def _ids(self) -> dict[str, int]:
        """Of all tokens but those that only fill the vocabulary up."""
        both = zip(self.tokens, self.kinds, strict=True)
        return {token: i for i, (token, kind) in enumerate(both) if kind != _UNUSED}

    def _added(self) -> list[Json]:
        """Tokens that are found in a text before it is cut."""
        common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": token, "special": kind != _USER, **common}
            for i, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (_CONTROL, _USER, _UNKNOWN) and token
        ]

    def _frame(self, adds_bos: bool) -> Json | None:
        """What stands around a text: tokens of begin and end, where the file wants them."""
        around: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
        used: dict[str, Json] = {}
        bos, eos = self._named("bos"), self._named("eos")
        for token, wanted, at in (
            (bos, self.fields.flag("tokenizer.ggml.add_bos_token", default=adds_bos), 0),
            (eos, self.fields.flag("tokenizer.ggml.add_eos_token", default=False), 2),
        ):
            if token is not None and wanted:
                around.insert(at, {"SpecialToken": {"id": token, "type_id": 0}})
                number = self.tokens.index(token)
                used[token] = {"id": token, "ids": [number], "tokens": [token]}
        if not used:
            return None
        second = {"Sequence": {"id": "B", "type_id": 1}}
        pair = [*around, second]
        return {
            "type": "TemplateProcessing", "single": around, "pair": pair, "special_tokens": used,
        }  # fmt: skip

    def _merges(self) -> list[tuple[str, str]]:
        found = []
        for merge in self._texts("merges"):
            left, space, right = merge.partition(" ")
            if not (left and space and right):
                raise self._wrong(f"has the merge {merge[:60]!r}, which is no pair")
            found.append((left, right))
        return found

    def _merges_by_score(self) -> Iterator[tuple[str, str]]:
        """Every way of two tokens to spell a third, in the order of transformers' converter: by
        score, by how long the first is, by how long the second is."""
        scores = self._numbers("scores")
        both = zip(self.tokens, self.kinds, strict=True)
        normal = {token: i for i, (token, kind) in enumerate(both) if kind == _NORMAL}
        if not normal or len({scores[i] for i in normal.values()}) == 1:
            raise self._wrong("has no scores that tell tokens apart, and no merges")
        if sum(len(token) ** 2 for token in normal) > _MOST_WORK:
            raise self._wrong("has tokens that are too long")
        ways = [
            (-scores[number], -at, at - len(token), number, token[:at], token[at:])
            for token, number in normal.items()
            for at in range(1, len(token))
            if token[:at] in normal and token[at:] in normal
        ]
        return ((left, right) for *_, left, right in sorted(ways))

    def _named(self, name: str) -> str | None:
        ids = self.fields.ids(f"tokenizer.ggml.{name}_token_id")
        if not ids:
            return None
        if ids[0] >= len(self.tokens):
            raise self._wrong(f"{name}_token_id={ids[0]} is beyond its {len(self.tokens)} tokens")
        return self.tokens[ids[0]]

    def _texts(self, name: str) -> tuple[str, ...]:
        return self.fields.texts(f"tokenizer.ggml.{name}") or ()

    def _numbers(self, name: str) -> Sequence[float]:
        """One for each token; all tokens are normal ones where nothing is said of them."""
        found = self.fields.config.get(f"tokenizer.ggml.{name}")
        if found is None:
            return [_NORMAL] * len(self.tokens)
        numeric = isinstance(found, list) and all(isinstance(x, int | float) for x in found)
        if not numeric or len(found) != len(self.tokens):  # type: ignore[arg-type]
            raise self._wrong(f"tokenizer.ggml.{name} has no number for each token")
        return list(found)  # type: ignore[call-overload, no-any-return]

    def _wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: its tokenizer {problem}")
