"""``Ops.sample`` on a device: what leaves it are the chosen tokens, and the numbers of those
log-probabilities that were asked for, in one copy.

Logits are adjusted as the oracle does (``reference.sampling``), in fp64, by edits that are made of
the requests on the host: penalties, biases, bans, masks of grammars. Sorting is exact, so filters
keep what the oracle keeps; which of two tokens a quantile falls to may be decided by roundings of
their weights (``device.sample``). Rows whose logits are no numbers, or of which nothing is allowed,
are the oracle's: they alone are copied to the host.

Letters: R rows, V vocabulary, B its bytes; N rows that are drawn from, S that are scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Logprobs
from moeserve.kernels.host_copy import to_host
from moeserve.kernels.reference.sampling import banned_ids, ends_of_bad, try_row, uniform
from moeserve.kernels.sampling import SampledRow, SamplingRow, adjusts_logits
from moeserve.kernels.triton.device import sample as kernels
from moeserve.kernels.triton.launch import launch, power_at_least
from moeserve.kernels.triton.products import best_of

BLOCK = 1024
# Logits that are adjusted and sorted at once, 24 bytes each: rows beyond them have another turn.
MOST_AT_ONCE = 1 << 23


@dataclass(slots=True)
class Edits:
    """Of logits [N, V], by their places in all: repeated ones are divided or multiplied, others
    added to, some banned; rows that begin at ``only`` keep nothing but the places in ``kept``.
    ``biased`` has a place's biases one after the other."""

    repeated: list[NDArray[np.float64]] = field(default_factory=list)  # [2, n]: place, penalty
    added: list[NDArray[np.float64]] = field(default_factory=list)  # [2, n]: place, summand
    biased: dict[int, list[NDArray[np.float64]]] = field(default_factory=dict)
    only: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    banned: list[int] = field(default_factory=list)

    def add(self, row: SamplingRow, start: int, eos_ids: frozenset[int]) -> None:
        """Those of a row whose logits begin at ``start``."""
        p = row.params
        if p.repetition_penalty != 1:
            seen = np.unique(np.asarray([*row.prompt_ids, *row.output_ids], np.int64))
            self.repeated.append(placed(seen, start, np.full(len(seen), p.repetition_penalty)))
        if row.output_ids and (p.presence_penalty or p.frequency_penalty):
            made = np.asarray(row.output_ids, np.int64)
            ids, counts = np.unique(made, return_counts=True)
            less = -(p.presence_penalty + p.frequency_penalty * counts)
            self.added.append(placed(ids, start, less))
        turns = Counter[int]()
        for token, bias in p.logit_bias:
            turn = self.biased.setdefault(turns[token], [])
            turn.append(placed(np.array([token]), start, [bias]))
            turns[token] += 1
        if p.allowed_token_ids:
            self.only.append(start)
            self.kept += [start + token for token in p.allowed_token_ids]
        banned = banned_ids(p, len(row.output_ids), eos_ids)
        ends = ends_of_bad(p.bad_token_ids, row.output_ids)
        self.banned += [start + token for token in {*banned, *ends}]


def placed(
    ids: NDArray[np.int64], start: int, values: Sequence[float] | NDArray[np.floating]
) -> NDArray[np.float64]:
    """Places are whole numbers, which fp64 holds."""
    return np.stack((ids + float(start), np.asarray(values, np.float64)))


def sample(
    logits_RV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]
) -> list[SampledRow]:
    """As ``reference.sampling.sample_rows``."""
    best_R = best_of(logits_RV)
    chosen_R = best_R.clone()
    drawn = [r for r, row in enumerate(rows) if needs_drawing(row, eos_ids)]
    for turn in in_turns(drawn, logits_RV.shape[1]):
        own = here(turn, logits_RV)
        chosen_R[own] = draw(logits_RV.index_select(0, own), [rows[r] for r in turn], eos_ids)
    known = [r for r, row in enumerate(rows) if row.known]
    if known:
        tokens = [int(rows[r].prompt_ids[rows[r].known]) for r in known]
        chosen_R[here(known, logits_RV)] = here(tokens, logits_RV).int()
    scored = [r for r, row in enumerate(rows) if scores_of(row) is not None]
    turns = [*in_turns(scored, logits_RV.shape[1])]
    parts = [spread(logits_RV, turn, chosen_R, [rows[r] for r in turn]) for turn in turns]
    whole = torch.cat([best_R.double(), chosen_R.double(), *(part.flatten() for part in parts)])
    found = to_host(whole)  # all that leaves the device
    count, at, scores = len(rows), 2 * len(rows), dict[int, NDArray[np.float64]]()
    for turn, part in zip(turns, parts, strict=True):
        size = part.numel()
        scores |= zip(turn, found[at : at + size].reshape(len(turn), -1), strict=True)
        at += size
    return [
        SampledRow(int(token), logprobs_in(scores.get(r), row))
        if best >= 0 and token >= 0
        else try_row(to_host(logits_RV[r]), row, eos_ids)
        for r, (row, best, token) in enumerate(
            zip(rows, found[:count], found[count : 2 * count], strict=True)
        )
    ]


def needs_drawing(row: SamplingRow, eos_ids: frozenset[int]) -> bool:
    """Whether its token may be another than that of the greatest logit."""
    p = row.params
    if row.known or (row.takes_best and row.allowed_B is None):
        return False
    asked = p.temperature > 0 or row.allowed_B is not None or adjusts_logits(p)
    return asked or bool(banned_ids(p, len(row.output_ids), eos_ids))


def scores_of(row: SamplingRow) -> int | None:
    """How many of the best tokens are wanted beside the chosen one; None where no numbers are."""
    return (row.params.prompt_logprobs or 0) if row.known else row.params.logprobs


def here(numbers: Sequence[int], beside: Tensor) -> Tensor:
    """int64, on the device of ``beside``."""
    return torch.tensor(numbers, dtype=torch.int64).to(beside.device)


def in_turns(rows: Sequence[int], vocab: int) -> Iterator[Sequence[int]]:
    """As many at once as there is room for."""
    many = max(1, MOST_AT_ONCE // vocab)
    return (rows[at : at + many] for at in range(0, len(rows), many))


def draw(logits_NV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]) -> Tensor:
    """int32 [N]: tokens, -1 where none can be chosen."""
    (count, vocab), device = logits_NV.shape, logits_NV.device
    x_NV = adjusted(logits_NV, rows, eos_ids)
    asked = torch.from_numpy(np.array([asked_by(row) for row in rows])).to(device)
    cut = [n for n, row in enumerate(rows) if filters(row, vocab)]
    edges = torch.tensor([[-np.inf, vocab]], dtype=torch.float64).repeat(count, 1).to(device)
    block = min(power_at_least(vocab, 16), BLOCK)
    if cut:
        own = here(cut, x_NV)
        values, ids = x_NV.index_select(0, own).sort(dim=1, descending=True, stable=True)
        found = torch.empty(len(cut), 2, dtype=torch.float64, device=device)
        wanted = asked.index_select(0, own)
        launch(
            kernels.cut_kernel, (len(cut),), device, values, ids, wanted, found, vocab, BLOCK=block
        )
        edges[own] = found
    tokens = torch.empty(count, dtype=torch.int32, device=device)
    launch(kernels.draw_kernel, (count,), device, x_NV, asked, edges, tokens, vocab, BLOCK=block)
    return tokens


def asked_by(row: SamplingRow) -> list[float]:
    """As ``device.sample`` has it."""
    p = row.params
    quantile = uniform(p.seed, row.position) if p.temperature > 0 else 0.0
    return [max(0.0, p.temperature), float(p.top_k), p.top_p, p.min_p, quantile]


def filters(row: SamplingRow, vocab: int) -> bool:
    p = row.params
    return p.temperature > 0 and (0 < p.top_k < vocab or p.top_p < 1 or p.min_p > 0)


def adjusted(logits_NV: Tensor, rows: Sequence[SamplingRow], eos_ids: frozenset[int]) -> Tensor:
    """fp64 [N, V], as ``reference.sampling.adjust_logits``, and what grammars forbid."""
    vocab, edits = logits_NV.shape[1], Edits()
    for n, row in enumerate(rows):
        edits.add(row, n * vocab, eos_ids)
    x_NV = logits_NV.double()
    x = x_NV.view(-1)
    for place, penalty in moved(edits.repeated, x):
        old = x[place]
        x[place] = torch.where(old > 0, old / penalty, old * penalty)
    for pairs in (edits.added, *edits.biased.values()):
        for place, summand in moved(pairs, x):
            x[place] = x[place] + summand
    if edits.only:
        place = here(edits.kept, x)
        kept = x[place]
        x_NV[here([start // vocab for start in edits.only], x)] = -torch.inf
        x[place] = kept
    if edits.banned:
        x[here(edits.banned, x)] = -torch.inf
    allowed = {n: row.allowed_B for n, row in enumerate(rows) if row.allowed_B is not None}
    if allowed:
        own, bits = here([*allowed], x), torch.from_numpy(np.stack([*allowed.values()]))
        eight = torch.arange(8, dtype=torch.uint8, device=x.device)
        one = (bits.to(x.device)[:, :, None] >> eight) & 1
        free = one.flatten(1)[:, :vocab] > 0
        x_NV[own] = torch.where(free, x_NV.index_select(0, own), -torch.inf)
    return x_NV


def moved(pairs: Sequence[NDArray[np.float64]], beside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Places and values of all rows together, on the device; nothing where there are none."""
    if pairs and sum(part.shape[1] for part in pairs):
        both = torch.from_numpy(np.concatenate(pairs, 1)).to(beside.device)
        yield both[0].long(), both[1]


def spread(
    logits_RV: Tensor, own: Sequence[int], chosen_R: Tensor, rows: Sequence[SamplingRow]
) -> Tensor:
    """fp64 [S, 3 + 2 M] of rows ``own``: greatest logit, sum of all exponentials relative to it,
    the chosen token's logit; then ids and logits of the M best."""
    device, vocab = logits_RV.device, logits_RV.shape[1]
    at_S, most = here(own, logits_RV), max(scores_of(row) or 0 for row in rows)
    x_SV = logits_RV.index_select(0, at_S)
    sums = torch.empty(len(own), 2, dtype=torch.float64, device=device)
    block = min(power_at_least(vocab, 16), BLOCK)
    launch(kernels.spread_kernel, (len(own),), device, x_SV, sums, vocab, BLOCK=block)
    token_S1 = chosen_R.index_select(0, at_S).long().clamp(min=0)[:, None]
    parts = [sums, x_SV.gather(1, token_S1).double()]
    if most:
        values, ids = x_SV.sort(dim=1, descending=True, stable=True)
        parts += [ids[:, :most].double(), values[:, :most].double()]
    return torch.cat(parts, 1)


def logprobs_in(numbers: NDArray[np.float64] | None, row: SamplingRow) -> Logprobs | None:
    """Of a row of ``spread``."""
    if numbers is None:
        return None
    highest, total, own = numbers[:3]
    most, count = (len(numbers) - 3) // 2, scores_of(row) or 0
    whole = highest + np.log(total)
    ids, values = numbers[3 : 3 + most].astype(np.int64), numbers[3 + most :] - whole
    best = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    return Logprobs(float(own - whole), tuple(best))
