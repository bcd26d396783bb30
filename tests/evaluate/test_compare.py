"""Two runs side by side: windows, chunking, and models that are equal, or very much not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve.core import Request, RequestId, SamplingParams
from moeserve.errors import ConfigError
from moeserve.evaluate import answers as answering
from moeserve.evaluate import compare as comparing
from moeserve.evaluate.answers import BLOCK, answer
from moeserve.evaluate.arithmetic import draw_problems
from moeserve.evaluate.compare import Comparison, compare, examine
from moeserve.evaluate.texts import (
    SAMPLED,
    Window,
    opening_of,
    sampled_windows,
    windows_of_files,
)
from moeserve.models.batch import Span, pack_spans
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.tokenizer import Tokenizer

Tiny = Callable[[str], Decoder]
Folder = Callable[[str], Path]


def quiet(count: int) -> None:
    """Progress that nobody watches."""


def windows_like(decoder: Decoder, *sizes: int) -> list[Window]:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, decoder.spec.vocab, (n,), generator=draw).tolist() for n in sizes]
    return [Window(f"text {i % 2}", tuple(w)) for i, w in enumerate(ids)]


def contrast(reference: Decoder, tested: Decoder) -> Comparison:
    return compare(reference, tested, windows_like(reference, 33, 20, 33), quiet)


def with_permuted_head(decoder: Decoder, folder: Path, tmp_path: Path) -> Decoder:
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["lm_head.weight"]
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"lm_head.weight": weight[order]}, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    return load_decoder(tmp_path, ops=decoder.ops)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_model_equals_itself_exactly(family: str, tiny_decoder: Tiny) -> None:
    decoder = tiny_decoder(family)
    found = contrast(decoder, decoder)
    assert set(found.kl) == {0.0}
    assert found.whole.ratio.value == found.whole.same_top.value == 1
    assert [layer.layer for layer in found.routing] == list(decoder.spec.moe_layers)
    assert all(layer.equal == layer.overlap == 1 for layer in found.routing)


def test_a_permuted_head_shows_in_the_tokens_and_not_in_the_routing(
    tiny_decoder: Tiny, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    decoder = tiny_decoder("qwen3_moe")
    permuted = with_permuted_head(decoder, tiny_checkpoint("qwen3_moe"), tmp_path)
    found = contrast(decoder, permuted)
    assert found.whole.same_top.value < 0.1
    assert found.whole.kl.value > 0.1
    assert all(layer.equal == 1 for layer in found.routing)


def test_models_without_a_common_layer_have_no_routing_to_compare(tiny_decoder: Tiny) -> None:
    found = contrast(tiny_decoder("qwen3_moe"), tiny_decoder("mixtral"))
    common = {layer.layer for layer in found.routing}
    assert common == set()
    assert found.whole.same_top.value < 0.5


def test_losses_are_those_of_the_second_halves(tiny_decoder: Tiny) -> None:
    decoder = tiny_decoder("qwen3_moe")
    losses = []
    windows = windows_like(decoder, 33, 20, 33)
    for window in windows:
        blocks = range(-(-len(window.ids) // BLOCK))
        span = Span(window.ids[:-1], 0, blocks, window.scored)
        logits = decoder.forward(
            pack_spans([span], BLOCK), decoder.new_cache(len(blocks), BLOCK)
        ).double()
        target = torch.tensor(window.ids[-window.scored :])
        losses += torch.nn.functional.cross_entropy(logits, target, reduction="none").tolist()
    found = contrast(decoder, decoder)
    assert len(losses) == found.whole.tokens == sum(w.scored for w in windows) == 16 + 10 + 16
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp()
    assert found.whole.reference_perplexity.value == pytest.approx(float(expected), rel=1e-9)
    assert {t: d.tokens for t, d in found.by_text.items()} == {"text 0": 32, "text 1": 10}


def test_how_a_window_is_cut_into_steps_changes_no_bit(
    tiny_decoder: Tiny, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Folder, tmp_path: Path
) -> None:
    decoder = tiny_decoder("deepseek_v3")
    other = with_permuted_head(decoder, tiny_checkpoint("deepseek_v3"), tmp_path)
    whole = contrast(decoder, other)
    monkeypatch.setattr(comparing, "TOKENS_PER_STEP", 7)
    monkeypatch.setattr(comparing, "MOST_LOGITS", 3 * decoder.spec.vocab)
    assert contrast(decoder, other) == whole


def test_progress_adds_up_to_the_scored_tokens(tiny_decoder: Tiny) -> None:
    decoder, heard = tiny_decoder("qwen3_moe"), list[int]()
    found = compare(decoder, decoder, windows_like(decoder, 33, 20), heard.append)
    assert sum(heard) == found.whole.tokens


def test_a_model_does_as_well_as_itself_on_sums(
    tiny_decoder: Tiny, tiny_checkpoint: Folder
) -> None:
    decoder, tokenizer = tiny_decoder("qwen3_moe"), Tokenizer.load(tiny_checkpoint("qwen3_moe"))
    whole, *kinds = examine(decoder, decoder, tokenizer, draw_problems(12, 0), quiet)
    assert whole.kind == "all"
    assert whole.tested == whole.reference
    assert whole.within_noise
    assert [exam.tested.problems for exam in kinds] == [3, 3, 3, 3]


def test_answers_come_in_the_order_of_requests(tiny_decoder: Tiny) -> None:
    decoder = tiny_decoder("qwen3_moe")
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (3, 9, 1)]
    requests = [Request(RequestId(str(i)), (5 + i,), p) for i, p in enumerate(params)]
    together = answer(decoder, requests, frozenset())
    assert [len(ids) for ids in together] == [3, 9, 1]
    assert together == [answer(decoder, [r], frozenset())[0] for r in requests]
    assert answer(decoder, [], frozenset()) == []


def test_answers_are_the_same_where_memory_holds_one_at_a_time(
    tiny_decoder: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, heard = tiny_decoder("qwen3_moe"), list[int]()
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
    requests = [Request(RequestId(str(i)), (5 + i,), params) for i in range(3)]
    together = answer(decoder, requests, frozenset())
    monkeypatch.setattr(answering, "KV_BYTES", 1)
    assert answer(decoder, requests, frozenset(), heard.append) == together
    assert set(heard) == {1}
    assert sum(heard) == 18


def test_written_windows_repeat_with_their_seed(tiny_decoder: Tiny) -> None:
    decoder = tiny_decoder("qwen3_moe")
    windows = sampled_windows(decoder, window=20, tokens=15, seed=4)
    assert [len(w.ids) for w in windows] == [21, 21]
    assert [w.scored for w in windows] == [10, 10]
    assert {w.text for w in windows} == {SAMPLED}
    assert windows[0].ids != windows[1].ids
    assert windows == sampled_windows(decoder, window=20, tokens=15, seed=4)
    assert windows != sampled_windows(decoder, window=20, tokens=15, seed=9)


def test_windows_of_a_file_are_its_tokens_each_behind_the_opening(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(resolve_model("demo"))
    assert opening_of(tokenizer) == (0,)
    file = tmp_path / "story.txt"
    file.write_text("A cat sat on 12 mats.\n" * 40)
    windows = windows_of_files([file], tokenizer, window=64, tokens=10_000)
    assert all(w.ids[0] == 0 and len(w.ids) <= 65 for w in windows)
    joined = [i for w in windows for i in w.ids[1:]]
    assert joined == tokenizer.encode(file.read_text(), add_special_tokens=False)
    assert len({len(w.ids) for w in windows[:-1]}) == 1


def test_a_tokenizer_without_an_opening_adds_none(tiny_checkpoint: Folder) -> None:
    assert opening_of(Tokenizer.load(tiny_checkpoint("qwen3_moe"))) == ()


def test_files_share_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(resolve_model("demo"))
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text("One two three four five. " * 100)
    windows = windows_of_files(files, tokenizer, window=32, tokens=60)
    assert [w.text for w in windows] == ["a.txt", "a.txt", "b.txt", "b.txt"]
    assert sum(w.scored for w in windows) == 64


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "no text in it"), (b"a", "no text in it"), (b"\xff\xfe", "UTF-8")]
)
def test_a_file_without_text_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "odd.txt"
    file.write_bytes(content)
    tokenizer = Tokenizer.load(resolve_model("demo"))
    with pytest.raises(ConfigError, match=f"odd.txt.*{says}"):
        windows_of_files([file], tokenizer, window=32, tokens=60)
