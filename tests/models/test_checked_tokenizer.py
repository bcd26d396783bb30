"""A tokenizer and a template are a stranger's programs: what takes too much is one error that names
them, and this process never runs it."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from moeserve.errors import InvalidRequestError, TokenizerError
from moeserve.models import text_worker
from moeserve.models.checked_tokenizer import load_checked
from moeserve.models.text_worker import TextJobs
from moeserve.models.tokenizer import Tokenizer
from moeserve.models.tokenizer_cost import cost_of

SaveTokenizer = Callable[[Path], None]
Edit = Callable[[tokenizers.Tokenizer], Any]

pytestmark = pytest.mark.long

RANGE = "{% for {0} in range(99999) %}"
NESTED = "".join(RANGE.replace("{0}", name) for name in "abcd") + "{% endfor %}" * 4


@pytest.fixture
def folder(save_tiny_tokenizer: SaveTokenizer, tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    return tmp_path


def refused(folder: Path, *said: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TokenizerError, match="token ids still work") as caught:
        load_checked(folder)
    assert all(word in caught.value.message for word in (str(folder), *said)), caught.value.message
    assert "\n" not in caught.value.message
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 100, "it was run here"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NESTED, "took too long"),
        ("{{ 'a' * 3000000000 }}", "memory"),
        ("{{ '%2000000000d' % 1 }}", "memory"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ""),
        ("{% if %}", "not valid Jinja"),
    ],
    ids=["nested ranges", "folded", "format", "nested", "no Jinja"],
)
def test_a_template_that_takes_too_much_is_refused(folder: Path, template: str, said: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    refused(folder, said)


def test_a_template_that_asks_for_other_messages_is_not(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    assert load_checked(folder).has_chat_template


def test_what_a_template_makes_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_worker, "MOST_TEXT_BYTES", 100)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content * 10 }}")
    jobs = TextJobs(Tokenizer.load(folder))

    def render(content: str) -> bytes:
        wanted = {"messages": [{"content": content}], "add_generation_prompt": True, "args": {}}
        return jobs.render({}, json.dumps(wanted).encode())[1]

    assert render("é" * 5) == ("é" * 50).encode()
    with pytest.raises(InvalidRequestError, match="chat template made has 110 bytes, at most 100"):
        render("a" * 11)
    with pytest.raises(InvalidRequestError, match="is not Unicode"):
        render("\ud800")


def edited(folder: Path, edit: Edit) -> tokenizers.Tokenizer:
    file = str(folder / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(file)
    edit(inner)
    inner.save(file)
    return inner


def set_normalizer(inner: tokenizers.Tokenizer) -> None:
    """Every letter becomes 2^40."""
    double = [normalizers.Replace("e", "ee") for _ in range(40)]
    inner.normalizer = normalizers.Sequence(double)


def set_decoder(inner: tokenizers.Tokenizer) -> None:
    inner.decoder = decoders.Sequence([decoders.Replace("e", "ee") for _ in range(40)])


def set_pattern(inner: tokenizers.Tokenizer) -> None:
    """Time doubles with every letter of "llo"."""
    pattern = tokenizers.Regex(r"(?:(?:(?:\S+)+)+)+$")
    inner.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")


@pytest.mark.parametrize("edit", [set_normalizer, set_decoder], ids=["normalizer", "decoder"])
def test_a_tokenizer_that_makes_much_of_little_is_refused(folder: Path, edit: Edit) -> None:
    edited(folder, edit)
    refused(folder)


def test_a_tokenizer_of_unknown_cost_is_never_run_on_the_loop(folder: Path) -> None:
    assert Tokenizer.load(folder).cost.quick
    for edit in (set_normalizer, set_pattern):
        inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        edit(inner)
        cost = cost_of(inner)
        assert not cost.quick
        assert cost.chars_per_token is None


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        b'{"model": ' + b"[" * 100000,
        b"\0" * 64,
    ],
    ids=["huge id", "nested", "zeros"],
)
def test_a_tokenizer_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    try:
        load_checked(folder)
    except TokenizerError as error:
        assert "tokenizer.json" in error.message  # noqa: PT017 - the library may take it
        assert "\n" not in error.message  # noqa: PT017


def test_a_panic_of_the_library_is_an_error_of_ours(folder: Path) -> None:
    """Ids beyond what a token id may be make it panic; so does a vocabulary with holes."""
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?"}
    described["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    file.write_text(json.dumps(described))
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(TokenizerError, match="cannot tokenise this text"):
        tokenizer.encode("zzz")


def test_a_text_of_more_characters_has_more_tokens(folder: Path) -> None:
    """The bound by which prompts are refused unseen holds for what tokenizes best."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.cost.chars_per_token == len("<|endoftext|>")
    for text in ("<|endoftext|>" * 50, " the" * 50, "é" * 50, "a"):
        assert len(tokenizer.encode(text, False)) >= tokenizer.cost.least_tokens(len(text))
    assert tokenizer.cost.least_tokens(13 * 50 + 1) == 51


def absorbing(inner: tokenizers.Tokenizer) -> None:
    inner.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])


def composing(inner: tokenizers.Tokenizer) -> None:
    inner.normalizer = normalizers.NFC()


def dropping(inner: tokenizers.Tokenizer) -> None:
    inner.normalizer = normalizers.Strip()


@pytest.mark.parametrize(
    ("edit", "most"), [(absorbing, None), (dropping, None), (composing, 4 * 13)]
)
def test_nothing_is_claimed_of_a_tokenizer_that_drops_characters(
    folder: Path, edit: Edit, most: int | None
) -> None:
    assert cost_of(edited(folder, edit)).chars_per_token == most
