"""Spans become tensors, and are cut into microbatches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve.models.batch import Span, pack_spans, split_spans, split_step

BLOCK = 4


@st.composite
def steps(draw: st.DrawFn) -> list[Span]:
    found = []
    for i in range(draw(st.integers(0, 6))):
        count, start = draw(st.integers(1, 9)), draw(st.integers(0, 9))
        tokens = [100 * i + j for j in range(count)]
        found.append(Span(tokens, start, range(10 * i, 10 * i + 5), draw(st.integers(0, count))))
    return found


@given(spans=steps(), parts=st.integers(1, 5))
def test_a_cut_step_has_the_same_tokens_and_wants_the_same_logits(
    spans: list[Span], parts: int
) -> None:
    whole = pack_spans(spans, BLOCK)
    cut = split_spans(spans, parts)
    packed = [pack_spans(part, BLOCK) for part in cut]
    for name in ("token_ids_T", "positions_T", "slot_T"):
        assert [x for p in packed for x in getattr(p, name).tolist()] == getattr(
            whole, name
        ).tolist()
    wanted = [x for p in packed for x in p.token_ids_T[p.logit_rows_R].tolist()]
    assert wanted == whole.token_ids_T[whole.logit_rows_R].tolist()
    sizes = [len(p.token_ids_T) for p in packed]
    assert len(cut) == parts
    assert max(sizes) - min(sizes) <= 1
    assert not any(len(span.token_ids) == 0 for part in cut for span in part)


@given(spans=steps(), parts=st.integers(1, 5))
def test_attention_of_a_cut_span_sees_its_earlier_parts(spans: list[Span], parts: int) -> None:
    for part in split_spans(spans, parts):
        attention = pack_spans(part, BLOCK).attention
        assert attention.context_S.tolist() == [s.start + len(s.token_ids) for s in part]
        for row, span in zip(attention.blocks_SM.tolist(), part, strict=True):
            assert row[: len(span.blocks)] == list(span.blocks)


@given(spans=steps(), parts=st.integers(1, 5))
def test_a_packed_step_is_cut_as_its_spans_are(spans: list[Span], parts: int) -> None:
    cut = split_step(pack_spans(spans, BLOCK), parts)
    slow = [pack_spans(part, BLOCK) for part in split_spans(spans, parts)]
    assert len(cut) == parts
    for got, expected in zip(cut, slow, strict=True):
        for name in ("token_ids_T", "positions_T", "slot_T", "logit_rows_R"):
            assert getattr(got, name).dtype is getattr(expected, name).dtype
            assert getattr(got, name).tolist() == getattr(expected, name).tolist()
        one, other = got.attention, expected.attention
        assert one.query_start_S1.tolist() == other.query_start_S1.tolist()
        assert one.context_S.tolist() == other.context_S.tolist()
        assert one.blocks_SM.tolist() == other.blocks_SM.tolist()
        assert {x.dtype for x in (one.query_start_S1, one.context_S, one.blocks_SM)} == {
            torch.int32
        }


def test_a_step_may_be_empty() -> None:
    step = pack_spans([], BLOCK)
    assert len(step.token_ids_T) == len(step.logit_rows_R) == 0
    assert step.attention.query_start_S1.tolist() == [0]
    assert step.attention.blocks_SM.shape == (0, 0)
