"""The tokenizer of a GGUF file is the one its model was published with."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner

from moeserve.errors import TokenizerError
from moeserve.models.checked_tokenizer import load_checked
from moeserve.models.gguf.splitting import SPLITTINGS
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer
from moeserve.models.tokenizer_parts import tokenizer_file, tokenizer_source

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
TALK = [{"role": "user", "content": "Hi, is 1234 = 12 34?"}]
TEXTS = (
    "Hello, world! It's 12345 apples.\n\n  def f(x):\n\treturn x**2  # done   ",
    "naïve café — “quoted” 日本語テキスト и русский 🙂🙂 e\u0301",
    "<|endoftext|>a<|user|>b <|end|>",
)
some = settings(max_examples=60)


def keys_of(folder: Path, pre: str) -> dict[str, Any]:
    """As the converter writes them of a byte-level ``tokenizer.json``."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    vocab = whole["model"]["vocab"] | {t["content"]: t["id"] for t in whole["added_tokens"]}
    special = {t["content"] for t in whole["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    found = {
        "general.architecture": "qwen3moe",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "[PAD320]"],
        "tokenizer.ggml.token_type": [
            *(CONTROL if t in special else NORMAL for t in tokens),
            UNUSED,
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.chat_template": settings["chat_template"],
        "tokenizer.ggml.eos_token_id": vocab[settings["eos_token"]],
    }
    if "bos_token" in settings:
        found["tokenizer.ggml.bos_token_id"] = vocab[settings["bos_token"]]
    found["tokenizer.ggml.add_bos_token"] = whole["post_processor"] is not None
    return found


@pytest.fixture(scope="module", params=["tiny", "demo"])
def both(
    request: pytest.FixtureRequest,
    writer: Any,
    save_tiny_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Tokenizer]:
    """The original, and that of the file."""
    path = tmp_path_factory.mktemp("tokenizer")
    folder, pre = resolve_model("demo"), "smollm"
    if request.param == "tiny":
        folder, pre = path, "gpt-2"
        save_tiny_tokenizer(folder)
        (folder / "config.json").write_text('{"eos_token_id": 256}')
    file = writer.GgufFile(keys_of(folder, pre)).save(path / "model.gguf")
    return Tokenizer.load(folder), Tokenizer.load(file)


def assert_same(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    original, found = both
    for special in (True, False):
        ids = original.encode(text, special)
        assert found.encode(text, special) == ids
        assert found.decode(ids, special) == original.decode(ids, special)


@some
@given(text=st.text(max_size=80) | st.text("aehot's 0189\n\t<|>end", max_size=60))
def test_texts_are_the_same_tokens(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    assert_same(both, text)


def test_so_is_everything_else(both: tuple[Tokenizer, Tokenizer]) -> None:
    original, found = both
    for text in TEXTS:
        assert_same(both, text)
    size = original.vocab_size
    assert found.vocab_size == size
    assert [found.token_bytes(i) for i in range(size + 1)] == [
        original.token_bytes(i) for i in range(size + 1)
    ]
    assert set(found.eos_ids) == set(original.eos_ids)
    assert found.named_specials == original.named_specials
    assert found.cost == original.cost
    assert found.render_chat(TALK) == original.render_chat(TALK)


def scored(extra: Sequence[str]) -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: unknown, begin, end, bytes, letters, and pieces by score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scores = [0.0] * len(tokens)
    for i, piece in enumerate([*extra, *"\u2581aehlotx"]):
        tokens.append(piece)
        scores.append(-float(i))
        kinds.append(NORMAL)
    return tokens, scores, kinds


PIECES = (
    "th",
    "\u2581t",
    "he",
    "\u2581the",
    "ll",
    "hell",
    "\u2581hello",
    "hello",
    "lo",
    "ell",
    "ot",
)


def slow_sentencepiece(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Of a text without special tokens: the best pair of neighbours first, of equal ones the first;
    what has no token goes as its bytes."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return found


@pytest.fixture(scope="module")
def by_score(writer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, scores, kinds = scored(PIECES)
    keys = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path: Path = writer.GgufFile(keys).save(tmp_path_factory.mktemp("scores") / "m.gguf")
    return path


@some
@given(text=st.text("thelo axé\n🙂", max_size=30))
def test_sentencepiece_merges_by_score(by_score: Path, text: str) -> None:
    tokens, scores, _ = scored(PIECES)
    found = Tokenizer.load(by_score)

    ids = slow_sentencepiece(text, tokens, scores)

    assert found.encode(text, False) == ids
    assert found.encode(text) == [1, *ids]
    assert found.decode(ids) == text


def test_merges_are_those_of_transformers(by_score: Path) -> None:
    """Its converter makes them of the same vocabulary."""
    from transformers.tokenization_utils_sentencepiece import generate_merges

    tokens, scores, kinds = scored(PIECES)
    rows = zip(tokens, scores, kinds, strict=True)
    normal = {t: s for t, s, kind in rows if kind == NORMAL}
    merges = json.loads(tokenizer_source(by_score))["model"]["merges"]
    ids = {t: i for i, t in enumerate(tokens)}
    assert [tuple(m) for m in merges] == generate_merges(ids, normal)


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_way_of_cutting_loads(pre: str, writer: Any, tmp_path: Path) -> None:
    keys = keys_of(resolve_model("demo"), pre)
    file = writer.GgufFile(keys).save(tmp_path / "m.gguf")
    found = Tokenizer.load(file)
    for text in TEXTS[:2]:
        ids = found.encode(text, False)
        assert (
            Inner.from_str(tokenizer_source(file)).encode(text, add_special_tokens=False).ids == ids
        )
        composed = SPLITTINGS[pre].normalised
        assert composed or found.decode(ids) == text
    assert found.cost.quick == (pre != "deepseek-llm")


def test_what_is_not_known_is_named(writer: Any, tmp_path: Path) -> None:
    demo, path = resolve_model("demo"), tmp_path / "m.gguf"
    good = keys_of(demo, "gpt-2")

    def said(**changes: Any) -> str:
        changed = good | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
        writer.GgufFile(changed).save(path)
        with pytest.raises(TokenizerError, match=r"m\.gguf: its tokenizer") as caught:
            Tokenizer.load(path)
        assert "put the model's tokenizer.json beside it" in caught.value.message
        return caught.value.message

    assert "tokenizer.ggml.pre='viking' is not known (only deepseek-llm" in said(pre="viking")
    assert "tokenizer.ggml.model='bert' is not known" in said(model="bert")
    assert "has the merge 'ab'" in said(merges=["ab"])
    assert "has a token twice" in said(tokens=["a", "a"], token_type=[1, 1])
    assert "token_type has no number for each token" in said(token_type=[1])
    assert "eos_token_id=99999 is beyond" in said(eos_token_id=99_999)
    assert "has no scores" in said(model="llama", merges=[])

    shutil.copy(demo / "tokenizer.json", tmp_path / "tokenizer.json")
    original, found = Tokenizer.load(demo), Tokenizer.load(path)
    assert found.encode(TEXTS[0]) == original.encode(TEXTS[0])


def test_the_original_may_be_in_the_file(writer: Any, tmp_path: Path) -> None:
    demo = resolve_model("demo")
    keys = {
        "general.architecture": "x",
        "tokenizer.huggingface.json": (demo / "tokenizer.json").read_text(),
    }
    file = writer.GgufFile(keys).save(tmp_path / "m.gguf")
    assert tokenizer_file(tmp_path) == file
    assert Tokenizer.load(file).encode(TEXTS[0]) == Tokenizer.load(demo).encode(TEXTS[0])


@pytest.mark.long
def test_a_process_that_may_be_ended_loads_it_too(both: tuple[Tokenizer, Tokenizer]) -> None:
    original, found = both
    loaded = load_checked(found.files.folder)
    assert loaded.encode(TEXTS[1]) == original.encode(TEXTS[1])
