"""Tokens drawn on a device are the reference's, and nothing else leaves it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeserve.core import RequestId, SamplingParams
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.sampling import SampledRow, SamplingRow, allowing, sampling_row
from moeserve.kernels.triton.double import DEVICE, Crossings, device_double

V = 150  # no power of two, and several blocks
EOS = frozenset({3, 9})
GREEDY = SamplingParams(temperature=0)
DRAWN = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=2.0, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=1e-30, top_k=5),
    SamplingParams(temperature=1.5, top_p=1e-9),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.3),
    SamplingParams(logit_bias=((7, 3.0), (8, -100.0), (7, 0.25)), bad_token_ids=((5,), (6, 5))),
    SamplingParams(allowed_token_ids=(3, 4, 90, 149), top_p=0.7),
    SamplingParams(min_tokens=10, stop_token_ids=(11,), logprobs=3),
    SamplingParams(temperature=0, repetition_penalty=2.0, logprobs=0),
    SamplingParams(temperature=0, min_tokens=9),
    replace(GREEDY, logprobs=7),
)


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    with device_double() as seen:
        yield seen


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.kernels.triton.sampling.BLOCK", 64)


def rows_for(params: tuple[SamplingParams, ...], seed: int) -> list[SamplingRow]:
    rows = []
    for n, p in enumerate(params):
        outputs = tuple(int(t) for t in np.random.default_rng(n).integers(0, V, n % 5))
        rows.append(
            sampling_row(RequestId(str(n)), replace(p, seed=seed + n), (1, 2, 6), (*outputs, 6))
        )
    return rows


def logits_for(rows: int, seed: int) -> Tensor:
    """Many of them equal."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, V, generator=draw) * 6).round() / 4


def check(found: list[SampledRow], expected: list[SampledRow]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own._replace(logprobs=None) == other._replace(logprobs=None)
        assert (own.logprobs is None) == (other.logprobs is None)
        if own.logprobs is not None and other.logprobs is not None:
            mine, theirs = dict(own.logprobs.top), dict(other.logprobs.top)
            assert list(mine) == list(theirs)
            assert np.allclose([*mine.values()], [*theirs.values()], rtol=0, atol=1e-12)
            assert abs(own.logprobs.chosen - other.logprobs.chosen) < 1e-12


def test_tokens_are_the_references_whatever_is_asked(ops: Any) -> None:
    for seed in range(3):
        rows, logits = rows_for(DRAWN, seed), logits_for(len(DRAWN), seed)
        check(ops.sample(logits, rows, EOS), ReferenceOps().sample(logits, rows, EOS))


def test_masks_prompts_and_rows_without_a_token(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be chosen from says what the reference says; in turns of a few rows each."""
    monkeypatch.setattr("moeserve.kernels.triton.sampling.MOST_AT_ONCE", 3 * V)
    allowed = np.zeros(-(-V // 8), np.uint8)
    allowed[2:5] = 0b10010
    params = SamplingParams(temperature=0.8, top_k=4)
    ending = replace(GREEDY, min_tokens=50, stop_token_ids=tuple(range(V)))
    scored = replace(params, prompt_logprobs=2)
    given = (
        params,
        GREEDY,
        ending,
        GREEDY,
        params,
        replace(ending, logit_bias=((1, 1.0),)),
        GREEDY,
    )
    rows = [
        row if n in (3, 6) else allowing(row, allowed) for n, row in enumerate(rows_for(given, 5))
    ]
    rows[5] = rows[5]._replace(allowed_B=None)
    rows += [SamplingRow(RequestId("known"), scored, (4, 5, 6), (), known=2)]
    logits = logits_for(len(rows), 2)
    logits[4, 17], logits[6, 3] = torch.nan, torch.inf
    found = ops.sample(logits, rows, EOS)
    check(found, ReferenceOps().sample(logits, rows, EOS))
    assert found[4].failure and found[5].asked and found[6].failure


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_a_row_that_is_no_numbers_is_not_read_from_before_its_beginning(value: float) -> None:
    from moeserve.kernels.triton.device.sample import cut_kernel
    from moeserve.kernels.triton.launch import launch

    around = torch.full((1 + V,), value, dtype=torch.float64)
    ids = torch.arange(-1, V)
    around[0], edges = 123.0, torch.empty(1, 2, dtype=torch.float64)
    asked = torch.tensor([[0.8, 4.0, 0.9, 0.1, 0.5]], dtype=torch.float64)
    there = torch.device("cpu")
    launch(cut_kernel, (1,), there, around[1:], ids[1:], asked, edges, V, BLOCK=64)
    assert edges[0, 0] != 123.0 and edges[0, 1] == 0


def test_a_row_knows_nothing_of_others_and_only_tokens_leave(crossings: Crossings) -> None:
    from moeserve.kernels.triton.ops import TritonOps

    table, rows, logits = TritonOps(DEVICE), rows_for(DRAWN, 1), logits_for(len(DRAWN), 1)
    there = logits.to(DEVICE)
    before = replace(crossings)
    found = table.sample(there, rows, EOS)
    assert (crossings.to_host - before.to_host, crossings.waits) == (1, before.waits)
    for n in (0, 4, 10):
        assert table.sample(there[n : n + 1], [rows[n]], EOS) == [found[n]]
