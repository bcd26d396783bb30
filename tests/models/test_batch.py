"""Spans become tensors, and are cut into microbatches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moeserve.models.batch import Span, pack_spans, split_spans

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


def test_a_step_may_be_empty() -> None:
    step = pack_spans([], BLOCK)
    assert len(step.token_ids_T) == len(step.logit_rows_R) == 0
    assert step.attention.query_start_S1.tolist() == [0]
    assert step.attention.blocks_SM.shape == (0, 0)
