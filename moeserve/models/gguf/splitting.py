"""How a text is cut before merges, by the name that a GGUF file has for it.

The key is ``tokenizer.ggml.pre``. As ``tokenizer.json`` of the models has it that are known by the
name: normalisers, the cuts, and
whether a piece that is a token needs no merges. Names stand in llama.cpp; where a name stands for
several models, only what is equal for all of those we serve is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Splitting:
    """``parts`` come before the bytes of a piece become letters. ``adds_bos`` is said of texts
    where the file says nothing."""

    parts: tuple[Part, ...]
    normalised: bool = False
    by_words: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


def _cut(pattern: str) -> Part:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_DIGITS: Part = {"type": "Digits", "individual_digits": True}
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_ENDINGS}?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    _cut(r"\p{N}{1,3}"),
    _cut("[一-龥\u3040-ゟ゠-ヿ]+"),
    _cut(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
# Letters that have a case, of the Unicode that DeepSeek's first tokenizer was made with.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F "
    "386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 "
    "1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 "
    "2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 "
    "2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
    "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)


def _class_of(ranges: str) -> str:
    """Of hexadecimal code points, as a regular expression has them."""
    pairs = (part.split("-") for part in ranges.split())
    return "".join("-".join(chr(int(point, 16)) for point in pair) for pair in pairs)


_DEEPSEEK = (
    _cut("[\r\n]"),
    _cut(rf"\s?[{_class_of(_CASED)}]+"),
    _cut(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    _cut(r"\s+$"),
    _cut("[一-龥ࠀ-一가-\ud7ff]+"),
    _DIGITS,
)

SPLITTINGS: Mapping[str, Splitting] = {
    "deepseek-llm": Splitting(_DEEPSEEK),
    "deepseek-v3": Splitting(_DEEPSEEK3),
    "chatglm-bpe": Splitting((_cut(_LLAMA3),)),
    "glm4": Splitting((_cut(_LLAMA3),), ignore_merges=True),
    "gpt-2": Splitting((), by_words=True),
    "gpt-4o": Splitting((_cut(_GPT_4O),)),
    "llama-bpe": Splitting((_cut(_LLAMA3),), ignore_merges=True, adds_bos=True),
    "olmo": Splitting((), normalised=True, by_words=True),
    "qwen2": Splitting((_cut(_QWEN2),), normalised=True),
    "smollm": Splitting((_DIGITS,), by_words=True),
    "starcoder": Splitting((_DIGITS,), by_words=True),
}
