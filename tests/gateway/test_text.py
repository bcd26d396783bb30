"""Incremental text equals the text of all tokens at once, and shows nothing it must take back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moeserve.core import FinishReason, Request, RequestId, SamplingParams
from moeserve.gateway.text import (
    MOST_HELD,
    REPLACEMENT,
    Detokenizer,
    StopMatcher,
    TextStream,
    open_detokenizer,
)
from moeserve.models.tokenizer import Tokenizer

SPECIAL = "<|end|>"


class Wrapped:
    """A tokenizer that counts the ids it is asked to decode."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def byte_pieces(self, skip_special_tokens: bool = True) -> None:
        return None

    def id(self, token: str) -> int:
        found = self.inner.token_to_id(token)
        assert found is not None, token
        return found

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size()


def byte_level() -> Wrapped:
    """As GPT-2, DeepSeek, Qwen: every byte is a token, some pairs too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ã", "©"), ("ð", "Ł"), ("å", "¥")]
    vocab = {x: i for i, x in enumerate([*letters, *(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([SPECIAL])
    return Wrapped(inner)


def pieces() -> dict[str, int]:
    words = ["\u2581", "\u2581the", "\u2581a", "re", "s", "\u2581\u2581", "好", "é", "t"]
    return {x: i for i, x in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words])}


def byte_fallback() -> Wrapped:
    """As Llama and Mixtral: words with their space, bytes where there is no word."""
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=pieces(), merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens([SPECIAL])
    return Wrapped(inner)


def metaspace() -> Wrapped:
    """As SentencePiece without bytes."""
    vocab = {x: i for x, i in pieces().items() if not x.startswith("<0x")}
    vocab = {x: i for i, x in enumerate(vocab)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens([SPECIAL])
    return Wrapped(inner)


class Bytewise(Wrapped):
    """A tokenizer that tells its bytes."""

    def __init__(self, inner: tokenizers.Tokenizer, folder: Path) -> None:
        super().__init__(inner)
        inner.save(str(folder / "tokenizer.json"))
        self.loaded = Tokenizer.load(folder)

    def byte_pieces(self, skip_special_tokens: bool = True) -> Mapping[int, bytes] | None:  # type: ignore[override]
        return self.loaded.byte_pieces(skip_special_tokens)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wrapped]:
    found = {f.__name__: f() for f in (byte_level, byte_fallback, metaspace)}
    inner = byte_level().inner
    inner.add_tokens(["<｜é｜>", "é!", "a b"])
    return found | {"bytewise": Bytewise(inner, tmp_path_factory.mktemp("bytewise"))}


def whole(tokenizer: Wrapped, prompt: list[int], output: list[int], skip: bool) -> str:
    """What the output adds to the text of the prompt's whole characters, all at once."""
    ends = [tokenizer.decode(prompt[: len(prompt) - held], skip) for held in range(4)]
    before = next((e for e in ends if not e.endswith(REPLACEMENT)), ends[0])
    return tokenizer.decode(prompt + output, skip)[len(before) :]


def stream(tokenizer: Wrapped, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    detokenizer = open_detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.push(t) for t in output), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte_level", "bytewise", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_tokens_give_the_text_of_all_at_once(
    named: dict[str, Wrapped], kind: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = named[kind]
    ids = st.integers(0, tokenizer.size - 1)
    prompt = data.draw(st.lists(ids, max_size=30))
    output = data.draw(st.lists(ids, max_size=60))
    assert "".join(stream(tokenizer, prompt, output, skip)) == whole(
        tokenizer, prompt, output, skip
    )


@pytest.mark.parametrize("kind", ["byte_level", "bytewise"])
@settings(max_examples=200, deadline=None)
@given(
    spelt=st.lists(st.sampled_from("ðŁĻĤÿ\u0122t"), max_size=120),
    cut=st.integers(0, 60),
)
def test_any_bytes_give_the_text_of_all_at_once(
    named: dict[str, Wrapped], kind: str, spelt: list[str], cut: int
) -> None:
    """Mostly not UTF-8, and longer than what is held back."""
    tokenizer = named[kind]
    ids = [tokenizer.id(x) for x in spelt]
    assert "".join(stream(tokenizer, ids[:cut], ids[cut:], True)) == whole(
        tokenizer, ids[:cut], ids[cut:], True
    )


@pytest.mark.parametrize("kind", ["byte_level", "bytewise", "byte_fallback"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the é好🙂 s\n\u0301", max_size=40), cut=st.integers(0, 40))
def test_whole_characters_only_are_shown(
    named: dict[str, Wrapped], kind: str, text: str, cut: int
) -> None:
    """Every character is spelt in bytes; nothing shown is ever a replacement character."""
    tokenizer = named[kind]
    ids = spell(tokenizer, text)
    prompt, output = spell(tokenizer, text[:cut]), ids[len(spell(tokenizer, text[:cut])) :]
    shown = stream(tokenizer, prompt, output, True)
    assert "".join(shown) == whole(tokenizer, prompt, output, True)
    assert REPLACEMENT not in "".join(shown)


def spell(tokenizer: Wrapped, text: str) -> list[int]:
    if tokenizer.inner.token_to_id("<0x00>") is not None:
        return [tokenizer.id(f"<0x{b:02X}>") for b in text.encode()]
    return tokenizer.inner.encode(text, add_special_tokens=False).ids


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.id(x) for x in "ðŁĻĤ"]
    assert stream(tokenizer, [], ids, True) == ["", "", "", "🙂", ""]


def test_where_bytes_are_told_no_token_is_decoded_twice(named: dict[str, Wrapped]) -> None:
    tokenizer = named["bytewise"]
    detokenizer = open_detokenizer(tokenizer, [tokenizer.id("t")], skip_special=True)
    decoded = tokenizer.decoded
    assert "".join(detokenizer.push(tokenizer.id(x)) for x in "ðŁĻĤs") == "🙂s"
    assert detokenizer.push(tokenizer.size + 1) == ""
    assert tokenizer.decoded == decoded


def test_an_unfinished_character_at_the_end_is_shown_as_wrong() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.id(x) for x in "tðŁ"]
    assert stream(tokenizer, [], ids, True) == ["t", "", "", REPLACEMENT]


@pytest.mark.parametrize("kind", ["byte_level", "bytewise"])
def test_a_character_that_the_prompt_began_is_completed(
    named: dict[str, Wrapped], kind: str
) -> None:
    tokenizer = named[kind]
    ids = [tokenizer.id(x) for x in "ðŁĻĤ"]
    assert stream(tokenizer, ids[:2], ids[2:], True) == ["", "🙂", ""]


@pytest.mark.parametrize("make", [byte_fallback, metaspace])
def test_the_space_before_a_word_is_kept_behind_a_prompt_and_not_without(
    make: Callable[[], Wrapped],
) -> None:
    tokenizer = make()
    the, end = tokenizer.id("\u2581the"), tokenizer.id(SPECIAL)
    assert stream(tokenizer, [the], [the, the], True) == [" the", " the", ""]
    assert stream(tokenizer, [], [the, the], True) == ["the", " the", ""]
    assert stream(tokenizer, [the, *[end] * 50], [the], True) == [" the", ""]
    assert stream(tokenizer, [the], [end, the], True) == ["", " the", ""]
    assert stream(tokenizer, [end], [the], True) == ["the", ""]


@pytest.mark.parametrize("token", ["Ã", "ÿ", "t", "\u0122", SPECIAL])
def test_a_token_costs_the_same_wherever_it_stands(token: str) -> None:
    """Also where no character ever gets whole, or nothing is shown at all."""
    tokenizer = byte_level()
    repeated = [tokenizer.id(token)] * 2000 if token != "\u0122" else [tokenizer.size + 1] * 2000
    detokenizer = Detokenizer(tokenizer, [tokenizer.id("t")], skip_special=True)
    for t in repeated:
        detokenizer.push(t)
    assert tokenizer.decoded < 2000 * (MOST_HELD + 20)


def test_endless_invalid_bytes_are_shown_as_such_before_the_end() -> None:
    tokenizer = byte_level()
    shown = stream(tokenizer, [], [tokenizer.id("ÿ")] * 500, True)
    assert "".join(shown) == REPLACEMENT * 500
    assert len("".join(shown[:-1])) > 450


def test_byte_fallback_recovers_from_invalid_bytes() -> None:
    tokenizer = byte_fallback()
    output = [tokenizer.id("<0xFF>"), *spell(tokenizer, "好" * 40)]
    text = "".join(stream(tokenizer, [], output, True))
    assert text.endswith("好" * 30)
    assert text.startswith(REPLACEMENT)


stops_and_text = st.tuples(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=12),
    st.booleans(),
)


def first_stop(stops: Sequence[str], text: str, include: bool) -> tuple[str, bool]:
    """Letter by letter: the first moment at which the text ends in a stop string."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


@settings(max_examples=400)
@given(stops_and_text)
def test_a_stop_string_ends_the_text_however_it_is_cut(
    drawn: tuple[list[str], list[str], bool],
) -> None:
    stops, parts, include = drawn
    matcher, shown, stopped = StopMatcher(stops, include), "", False
    for part in parts:
        ready, stopped = matcher.push(part)
        shown += ready
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    assert (shown, stopped) == first_stop(stops, "".join(parts), include)


@given(stops_and_text)
def test_no_more_is_held_back_than_may_become_a_stop_string(
    drawn: tuple[list[str], list[str], bool],
) -> None:
    stops, parts, _ = drawn
    matcher, seen, shown = StopMatcher(stops, include=False), "", ""
    for part in parts:
        ready, stopped = matcher.push(part)
        seen, shown = seen + part, shown + ready
        if stopped:
            return
        held = seen[len(shown) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def text_stream(prompt: str = "t", **params: object) -> tuple[TextStream, Wrapped]:
    tokenizer = byte_level()
    request = Request(
        RequestId("r"),
        tuple(spell(tokenizer, prompt)),
        SamplingParams(**params),  # type: ignore[arg-type]
    )
    return TextStream(tokenizer, request), tokenizer


def test_a_stop_string_spans_tokens() -> None:
    text, tokenizer = text_stream(stop=("the",))
    got = [text.push(tokenizer.id(x), None) for x in ["s", "t", "he"]]
    assert [(p.text, p.stopped) for p in got] == [("s", False), ("", False), ("", True)]


def test_the_stop_string_is_shown_if_wanted() -> None:
    text, tokenizer = text_stream(stop=("the",), include_stop=True)
    got = [text.push(tokenizer.id(x), None) for x in ["s", "t", "he"]]
    assert "".join(p.text for p in got) == "sthe"


def test_what_might_have_been_a_stop_string_is_shown_at_the_end() -> None:
    text, tokenizer = text_stream(stop=("the",))
    got = [text.push(tokenizer.id("s"), None), text.push(tokenizer.id("t"), FinishReason.LENGTH)]
    assert [p.text for p in got] == ["s", "t"]


def test_the_first_min_tokens_are_not_searched_for_stops() -> None:
    text, tokenizer = text_stream(stop=("s",), min_tokens=2)
    got = [text.push(tokenizer.id("s"), None) for _ in range(3)]
    assert [(p.text, p.stopped) for p in got] == [("s", False), ("s", False), ("", True)]


def test_the_token_that_ends_a_request_is_shown_only_if_wanted() -> None:
    for include, shown in ((False, ""), (True, SPECIAL)):
        text, tokenizer = text_stream(include_stop=include, skip_special_tokens=False)
        assert text.push(tokenizer.id(SPECIAL), FinishReason.STOP).text == shown
