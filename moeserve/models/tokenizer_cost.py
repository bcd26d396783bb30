"""What may be known beforehand of a tokenizer's work, from its parts.

A tokenizer is put together by strangers: patterns may backtrack for ever, replacements double a
text many times over. ``cost_of`` says how many characters a token covers at most, so that a text
can be refused by its length, and whether a short text is always quick. Where a part is not among
those known here, nothing is claimed. Tokens become text beside the engine, with nobody to end it:
``require_decodable`` refuses what could make much of little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

from moeserve.errors import TokenizerError
from moeserve.models.tokenizer_parts import REMEDY

Part = Mapping[str, Any]

# The longest canonical decomposition has four characters, which NFC makes one.
_COMPOSED = 4
# Of a token: published models have up to some hundred.
_MOST_CHARS = 1 << 14
# What decoding may make of a character.
_MOST_GROWTH = 64.0
# Patterns of published models, all of which take time in proportion to the text.
_QUICK_PATTERNS = frozenset(
    (
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Qwen2 and Qwen3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Llama 3, GLM 4
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-OSS (o200k)
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # DeepSeek V3
        r"\p{N}{1,3}",
        r"[一-龥\u3040-ゟ゠-ヿ]+",
        r"[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    )
)


@dataclass(frozen=True, slots=True)
class TokenizerCost:
    """``chars_per_token``: a text of more than ``n`` times so many characters has more than ``n``
    tokens; None where that cannot be said. ``quick``: a short text takes little time and memory.
    """

    chars_per_token: int | None
    quick: bool

    def least_tokens(self, chars: int) -> int:
        """A text of so many characters has at least so many tokens."""
        return 0 if self.chars_per_token is None else -(-chars // self.chars_per_token)


def cost_of(inner: tokenizers.Tokenizer) -> TokenizerCost:
    normalizers = _parts(inner.normalizer, "normalizers")
    splits = _parts(inner.pre_tokenizer, "pretokenizers")
    if not isinstance(inner.model, models.BPE) or not all(map(_is_quick, [*normalizers, *splits])):
        return TokenizerCost(None, quick=False)
    vocab = inner.get_vocab(with_added_tokens=True)
    bytewise = any(part["type"] == "ByteLevel" for part in splits)
    eaters = any(t.lstrip or t.rstrip for t in inner.get_added_tokens_decoder().values())
    if eaters or not _spells_every_byte(inner.model, vocab, bytewise):
        return TokenizerCost(None, quick=True)
    composed = _COMPOSED if any(part["type"] == "NFC" for part in normalizers) else 1
    return TokenizerCost(composed * max(map(len, vocab)), quick=True)


def require_decodable(inner: tokenizers.Tokenizer, where: str) -> None:
    """TokenizerError where the text of a few tokens could be long without bound."""
    longest = max(map(len, inner.get_vocab(with_added_tokens=True)), default=0)
    if longest > _MOST_CHARS:
        raise TokenizerError(
            f"{where}: a token of {longest} characters, at most {_MOST_CHARS}; {REMEDY}"
        )
    growth = 1.0
    for part in _parts(inner.decoder, "decoders"):
        growth *= _growth(part)
    if growth > _MOST_GROWTH:
        raise TokenizerError(
            f"{where}: its decoder may make a text more than {_MOST_GROWTH:g} times as long; "
            f"{REMEDY}"
        )


def _growth(decoder: Part) -> float:
    match decoder:
        case {"type": "ByteLevel" | "ByteFallback" | "Fuse" | "Strip" | "Metaspace"}:
            return 1.0
        case {"type": "WordPiece" | "BPEDecoder" | "CTC"}:
            return 2.0  # a space before each token
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(content)}:
            return max(1.0, len(content) / len(found)) if found else float("inf")
    return float("inf")


def _parts(part: Any, inner: str) -> list[Part]:
    """A part as ``tokenizer.json`` describes it; of a sequence its parts."""
    if part is None:
        return []
    described = json.loads(part.__getstate__())
    nested = described.get(inner) if described.get("type") == "Sequence" else None
    return list(nested) if isinstance(nested, list) else [described]


def _is_quick(part: Part) -> bool:
    """Whether it takes time in proportion to the text, drops nothing, and lengthens it by a
    bounded number of characters alone."""
    match part:
        case {"type": "NFC" | "ByteLevel" | "Digits" | "Metaspace"}:
            return True
        case {"type": "Prepend", "prepend": str(added)}:
            return len(added) <= 1
        case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(content)}:
            return len(found) == len(content) == 1
        case {"type": "Split", "pattern": {"Regex": str(found)}, "behavior": behavior}:
            return found in _QUICK_PATTERNS and behavior != "Removed"
        case {"type": "Split", "pattern": {"String": str(found)}, "behavior": behavior}:
            return len(found) > 0 and behavior != "Removed"
    return False


def _spells_every_byte(model: models.BPE, vocab: Mapping[str, int], bytewise: bool) -> bool:
    """Whether no character is dropped, or joined with others, for want of a token."""
    if bytewise:
        return all(letter in vocab for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return bool(model.byte_fallback) and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
