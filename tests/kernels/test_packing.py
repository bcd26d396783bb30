"""However rows lie before they are packed, whenever they are rounded: the panels are the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.errors import CheckpointError
from moeserve.kernels.cpu import _cpu
from moeserve.kernels.cpu.memory import HUGE_PAGE, SharedPages
from moeserve.kernels.cpu.packing import pack
from moeserve.kernels.matrix import Block, Pieces, Rounded, joined, to_int4, to_int8

FORMS = ("float32", "bfloat16", "float16", "int8", "int4", "rounded float32", "rounded bfloat16")


pytestmark = pytest.mark.usefixtures("native", "two_threads")


def block(form: str, rows: int, into: int) -> Block:
    w = torch.randn(rows, into)
    w[torch.rand(rows) < 0.1] = 0
    w *= 2.0 ** torch.randint(-140, 120, (rows, 1))
    if form == "int4":
        return to_int4(w.clamp(-1e30, 1e30), 32)
    if form == "int8":
        return to_int8(w)
    floats = w.clamp(-6e4, 6e4).to(getattr(torch, form.split()[-1]))
    return Rounded(floats, "w") if "rounded" in form else floats


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    count=st.integers(1, 5),
    cut=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    into=st.integers(1, 150),
    paired=st.booleans(),
    stacked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pieces_pack_to_the_panels_of_the_whole(
    form: str, count: int, cut: list[int], into: int, paired: bool, stacked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    count = count if stacked else 1
    into += into % 2 if form == "int4" else 0
    cut = [2 * rows for rows in cut] if paired else cut
    pieces = Pieces(
        tuple(tuple(block(form, rows, into) for rows in cut) for _ in range(count)), stacked
    )
    whole = joined(pieces)
    assert pieces.shape == whole.shape
    bias = torch.randn(whole.shape[:-1])
    ours, theirs = pack(pieces, bias, paired=paired), pack(whole, bias, paired=paired)
    for mine, other in zip(ours.memory, theirs.memory, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_names_the_block_that_is_no_number(bad: float, dtype: torch.dtype) -> None:
    fine, wrong = torch.randn(40, 33).to(dtype), torch.randn(40, 33).to(dtype)
    wrong[39, 32] = bad
    pieces = Pieces(((Rounded(fine, "gate"), Rounded(wrong, "up")),), stacked=False)
    with pytest.raises(CheckpointError, match=r"^up holds NaN or infinity"):
        pack(pieces)
    with pytest.raises(CheckpointError, match=r"^up holds NaN or infinity"):
        joined(pieces)


def test_all_matrices_of_a_stack_are_one_native_call() -> None:
    def calls(experts: int) -> int:
        blocks = tuple((to_int8(torch.randn(8, 64)),) * 2 for _ in range(experts))
        before = _cpu.calls()
        pack(Pieces(blocks, stacked=True), paired=True)
        return _cpu.calls() - before

    assert calls(2) == calls(50) == 2  # codes, scales


def test_small_matrices_share_huge_pages_until_the_last_is_gone() -> None:
    """Each on lines of its own; large ones have pages of their own."""
    pages = SharedPages()
    sizes = [1, 64, 100_000, HUGE_PAGE - 1, HUGE_PAGE - 1, HUGE_PAGE - 1, HUGE_PAGE - 1, 5]
    pieces = [pages.take(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    assert {piece.data_ptr() % 64 for piece in pieces} == {0}
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert all((piece == i).all() for i, piece in enumerate(pieces))
    shared = [piece.untyped_storage().data_ptr() for piece in pieces]
    assert len(set(shared)) == 2
    assert pages.take(HUGE_PAGE).untyped_storage().data_ptr() not in shared
