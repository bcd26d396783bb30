"""Text becomes ids and comes back; templates are sandboxed; what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError, TokenizerError
from moeserve.models.tokenizer import Tokenizer

END, USER = 256, 257
TALK = [{"role": "user", "content": "Hi"}]


SaveTokenizer = Callable[[Path], None]


@pytest.fixture
def folder(save_tiny_tokenizer: SaveTokenizer, tmp_path: Path) -> Path:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer(
    save_tiny_tokenizer: SaveTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return Tokenizer.load(folder)


def set_up(folder: Path, file: str, **changes: Any) -> None:
    settings_file = folder / file
    known = json.loads(settings_file.read_text()) if settings_file.exists() else {}
    settings_file.write_text(json.dumps({**known, **changes}))


def with_template(folder: Path, template: object) -> Tokenizer:
    set_up(folder, "tokenizer_config.json", chat_template=template)
    return Tokenizer.load(folder)


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=50)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)

    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(text=st.text(max_size=200), special=st.booleans())
@settings(deadline=None, max_examples=50)
def test_ids_are_those_of_the_library(tokenizer: Tokenizer, text: str, special: bool) -> None:
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_file(str(tokenizer.files.folder / "tokenizer.json"))
    assert tokenizer.encode(text, special) == inner.encode(text, add_special_tokens=special).ids


def test_the_vocabulary_covers_every_byte(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert tokenizer.id_to_token(END) == "<|endoftext|>"
    assert tokenizer.token_to_id("<|endoftext|>") == END


def test_merges_make_fewer_tokens_than_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" to the")
    assert len(ids) < len(" to the")
    assert len({tokenizer.id_to_token(i) for i in range(320)}) == 320


def test_special_tokens_are_one_id_and_skipped_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|user|>b")

    assert ids[1] == USER
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|user|>b"
    assert tokenizer.token_bytes(USER) == b"<|user|>"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.id_to_token(5000) is None
    assert tokenizer.token_bytes(5000) == b""
    assert tokenizer.decode([*tokenizer.encode("ab"), 5000]) == "ab"


@given(ids=st.lists(st.integers(0, 330)), skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_the_bytes_of_tokens_make_the_text(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    pieces = tokenizer.byte_pieces(skip)
    assert pieces is not None
    text = b"".join(pieces[i] for i in ids).decode(errors="replace")
    assert text == tokenizer.decode(ids, skip)


def test_half_a_character_decodes_to_the_replacement_mark(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_sentencepiece_vocabularies_tell_their_bytes_too(folder: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581the": 2, "é": 3}
    inner = Inner(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    inner.save(str(folder / "tokenizer.json"))

    tokenizer = Tokenizer.load(folder)

    assert [tokenizer.token_bytes(i) for i in (1, 2, 3)] == [b"\n", b" the", "é".encode()]
    assert tokenizer.byte_pieces() is None


def test_special_tokens_of_the_template_are_added_on_request_only(folder: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import processors

    file = str(folder / "tokenizer.json")
    inner = Inner.from_file(file)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(file)

    tokenizer = Tokenizer.load(folder)

    assert tokenizer.encode("abcd")[0] == END
    assert END not in tokenizer.encode("abcd", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("abcdefgh")) == "abcdefgh", "nothing cut or padded"


def test_end_tokens_are_gathered_from_all_configs(folder: Path) -> None:
    set_up(folder, "generation_config.json", eos_token_id=[259, 256])
    set_up(folder, "config.json", eos_token_id=256)
    set_up(folder, "tokenizer_config.json", eos_token={"content": "<|assistant|>"})

    assert Tokenizer.load(folder).eos_ids == (259, 256, 258)


def test_a_chat_is_rendered_by_the_models_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(TALK) == "<|user|>Hi<|end|><|assistant|>"
    assert tokenizer.render_chat(TALK, add_generation_prompt=False) == "<|user|>Hi<|end|>"


def test_a_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content }}|{{ mood }}|{{ eos_token }}"
    )

    assert Tokenizer.load(folder).render_chat(TALK, mood="calm") == "Hi|calm|<|endoftext|>"


def test_a_chat_may_set_what_the_template_calls_a_special_token(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ eos_token }}")
    assert tokenizer.render_chat(TALK, eos_token="<stop>") == "<stop>"


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]

    assert with_template(folder, named).render_chat(TALK) == "y"


def test_what_templates_commonly_use_is_there(folder: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    rendered = with_template(folder, template).render_chat([{"content": "é<"}, {"content": "b"}])

    assert rendered == '{"content": "é<"}4'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ cycler() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_fails_is_the_requests_error(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template)

    with pytest.raises(InvalidRequestError, match="chat template rejects") as caught:
        tokenizer.render_chat(TALK)

    assert caught.value.param == "messages"


def test_without_a_template_a_chat_is_refused(folder: Path) -> None:
    tokenizer = with_template(folder, None)

    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template; ask for a completion"):
        tokenizer.render_chat(TALK)


def test_a_missing_tokenizer_is_named_with_the_remedy(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*token ids still work"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff"])
def test_a_broken_tokenizer_is_named_with_the_remedy(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*token ids still work"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", 7, [{"name": 3}, "x", None]])
def test_a_broken_template_is_named(folder: Path, template: object) -> None:
    if isinstance(template, list):
        assert not with_template(folder, template).has_chat_template
    else:
        with pytest.raises(TokenizerError, match="template"):
            with_template(folder, template)


def test_a_broken_side_config_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)
