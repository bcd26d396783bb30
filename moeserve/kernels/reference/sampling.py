"""``Ops.sample`` in numpy: from rows of logits to tokens, one row at a time.

Each row is computed by itself, in float64, and draws from a counter-based generator keyed by
(seed, position of the new token): the token depends on its own logits and history only, never on
the batch (law 1). In this order: tokens that a grammar does not allow, penalties, bias, tokens that
are not in ``allowed_token_ids``, those banned by ``min_tokens`` and as the end of
``bad_token_ids``, temperature, min-p, top-k, top-p (over what the filters before left,
renormalised). Where all that a grammar allows are banned, they are not. Equal logits: the lower
token id is greater. Log-probabilities are those of the model, before any of this.

Letters: R rows, V vocabulary, B its bytes (one bit for each token).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeserve.core import Logprobs, SamplingParams
from moeserve.errors import InternalError, InvalidRequestError
from moeserve.kernels.host_copy import to_host
from moeserve.kernels.sampling import SampledRow, SamplingRow, adjusts_logits

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# So many candidates are sorted at once; of more, those at the border are found first.
MOST_SORTED = 2048
# A weight's bits without these are its exponent and the first eight of its mantissa.
LOW_BITS = 44
# Consecutive values of which only the greatest is looked at first.
STRETCH = 64


def best_of_rows(logits_RV: Tensor) -> list[int]:
    """The token of the greatest logit of each row, the first of equals; -1 where that is not
    finite, or a logit is not a number."""
    host_RV = to_host(logits_RV)
    best_R = host_RV.argmax(axis=1)  # the first maximum of each row, or its first NaN
    sound_R = np.isfinite(host_RV[np.arange(len(best_R)), best_R])
    best: list[int] = np.where(sound_R, best_R, -1).tolist()
    return best


def sample_rows(
    logits_RV: Tensor,
    rows: Sequence[SamplingRow],
    eos_ids: frozenset[int],
    find_best: Callable[[Tensor], list[int]] = best_of_rows,
) -> list[SampledRow]:
    """One token for every row; a row that has none says why, and the others are not touched.

    ``find_best`` is ``best_of_rows`` or as good.
    """
    best_R = find_best(logits_RV)
    if any(row.allowed_B is not None for row in rows):
        best_R = _best_allowed(to_host(logits_RV), rows, best_R)
    new = tuple.__new__
    sampled = [new(SampledRow, (best, None, "", False)) for best in best_R]
    if -1 in best_R or not all(row.takes_best for row in rows):
        host_RV = to_host(logits_RV)
        for r, row in enumerate(rows):
            if best_R[r] < 0 or not (row.takes_best or takes_best(row, eos_ids)):
                sampled[r] = try_row(host_RV[r], row, eos_ids)
    return sampled


def _best_allowed(
    logits_RV: NDArray[np.float32], rows: Sequence[SamplingRow], best_R: Sequence[int]
) -> list[int]:
    """The best token of each row that is allowed, -1 where none can be taken; ``best_R`` is as if
    all were allowed. Where the best of all is allowed, as mostly, it is the best of those that
    are."""
    found = [*best_R]
    for r, (row, best) in enumerate(zip(rows, best_R, strict=True)):
        allowed_B = row.allowed_B
        if allowed_B is None or best < 0 or (allowed_B[best >> 3] >> (best & 7)) & 1:
            continue
        ids = np.flatnonzero(allowed_tokens(allowed_B, logits_RV.shape[1]))
        values = logits_RV[r, ids]
        at = int(values.argmax()) if len(ids) else -1
        found[r] = int(ids[at]) if at >= 0 and math.isfinite(values[at]) else -1
    return found


def allowed_tokens(allowed_B: NDArray[np.uint8], vocab: int) -> NDArray[np.bool_]:
    """Which tokens the bits allow: [V]."""
    return np.unpackbits(allowed_B, count=vocab, bitorder="little").view(np.bool_)


def takes_best(row: SamplingRow, eos_ids: frozenset[int]) -> bool:
    """Whether the token is the one of the greatest logit, and nothing else is asked for."""
    params = row.params
    return (
        params.temperature <= 0
        and not row.known
        and params.logprobs is None
        and not adjusts_logits(params)
        and not banned_ids(params, len(row.output_ids), eos_ids)
    )


def try_row(logits_V: NDArray[np.float32], row: SamplingRow, eos_ids: frozenset[int]) -> SampledRow:
    """``sample_row``, or why there is none."""
    try:
        return sample_row(logits_V, row, eos_ids)
    except InvalidRequestError as error:
        return SampledRow(failure=error.message, asked=True)
    except InternalError as error:
        return SampledRow(failure=error.message)
    except Exception:  # whatever it is, a row that cannot be sampled ends one request only
        logging.getLogger("moeserve.kernels").exception(
            "request %s cannot be sampled", row.request_id
        )
        return SampledRow(failure=f"request {row.request_id}: sampling failed")


def sample_row(
    logits_V: NDArray[np.float32], row: SamplingRow, eos_ids: frozenset[int]
) -> SampledRow:
    """The token that follows. InternalError if the logits are not numbers, InvalidRequestError if
    what the request forbids leaves no token."""
    params = row.params
    best = int(logits_V.argmax())  # the first maximum, or the first NaN
    if not math.isfinite(logits_V[best]):
        raise InternalError(
            f"request {row.request_id}: the logits after position {row.position - 1} hold "
            f"{logits_V[best]} at token {best}"
        )
    if row.known:
        token = row.prompt_ids[row.known]
        return SampledRow(token, logprobs_of(logits_V, token, params.prompt_logprobs or 0))
    banned = banned_ids(params, len(row.output_ids), eos_ids)
    token, allowed = best, row.allowed_B
    if params.temperature > 0 or banned or allowed is not None or adjusts_logits(params):
        adjusted_V = adjust_logits(logits_V, params, row.prompt_ids, row.output_ids, banned)
        if allowed is not None:
            forbidden_V = ~allowed_tokens(allowed, len(logits_V))
            adjusted_V[forbidden_V] = -np.inf
            if banned and not math.isfinite(adjusted_V.max()):  # the grammar's end has come
                adjusted_V = adjust_logits(logits_V, params, row.prompt_ids, row.output_ids, ())
                adjusted_V[forbidden_V] = -np.inf
        if not math.isfinite(adjusted_V.max()):
            raise InvalidRequestError(
                f"request {row.request_id}: no token is allowed: its grammar, allowed_token_ids, "
                "bad_words and logit_bias leave none"
            )
        if params.temperature > 0:
            token = draw_token(adjusted_V, params, uniform(params.seed, row.position))
        else:
            token = int(adjusted_V.argmax())
    wanted = params.logprobs
    return SampledRow(token, None if wanted is None else logprobs_of(logits_V, token, wanted))


def banned_ids(params: SamplingParams, made: int, eos_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that would end the request before ``min_tokens``."""
    if made >= params.min_tokens:
        return frozenset()
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)


def adjust_logits(
    logits_V: NDArray[np.float32],
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    banned: Iterable[int],
) -> Floats:
    """Logits after penalties, bias and bans, of which tokens that are not allowed have one too."""
    x_V = logits_V.astype(np.float64)
    if params.repetition_penalty != 1:
        seen = np.unique(np.asarray([*prompt_ids, *output_ids], np.int64))
        x = x_V[seen]
        x_V[seen] = np.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty)
    if output_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
        x_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias:
        x_V[token] += bias
    if params.allowed_token_ids:
        allowed = np.array(params.allowed_token_ids, np.int64)
        kept = x_V[allowed]
        x_V.fill(-np.inf)
        x_V[allowed] = kept
    for token in (*banned, *ends_of_bad(params.bad_token_ids, output_ids)):
        x_V[token] = -np.inf
    return x_V


def ends_of_bad(bad: Iterable[Sequence[int]], output_ids: Sequence[int]) -> Iterator[int]:
    """The last tokens of those sequences whose other tokens the answer ends with."""
    for *others, last in bad:
        if not others or list(output_ids[-len(others) :]) == others:
            yield last


def draw_token(logits_V: Floats, params: SamplingParams, u: float) -> int:
    """The token at quantile ``u`` of the filtered distribution, in order of token ids."""
    ids = None  # all
    # Top-k and min-p each keep the upper part of one order: which goes first does not matter.
    if 0 < params.top_k < len(logits_V):
        ids = top_k(logits_V, params.top_k)
    weight = (logits_V if ids is None else logits_V[ids]) - logits_V.max()
    with np.errstate(over="ignore"):  # a tiny temperature makes the others infinitely unlikely
        weight /= params.temperature
    np.exp(weight, out=weight)
    if params.min_p > 0:
        kept = np.flatnonzero(weight >= params.min_p)
        weight, ids = weight[kept], kept if ids is None else ids[kept]
    if params.top_p < 1:
        kept = top_p(weight, params.top_p)
        weight, ids = weight[kept], kept if ids is None else ids[kept]
    cumulative = weight.cumsum()
    chosen = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    last = np.searchsorted(cumulative, cumulative[-1])  # the end, less what has no weight
    at = int(min(chosen, last))
    return at if ids is None else int(ids[at])


def top_k(values: NDArray[np.floating], k: int) -> Ids:
    """Positions of the ``k`` greatest, ascending; of equals the first."""
    if k >= len(values):
        return np.arange(len(values))
    if k * STRETCH < len(values) // 2:
        # At least k values are not below the k-th greatest maximum of a stretch, so none of the
        # k greatest is.
        best = values[: len(values) // STRETCH * STRETCH].reshape(-1, STRETCH).max(1)
        few = np.flatnonzero(values >= kth_greatest(best, k))
        return few[_top_k_of_all(values[few], k)]
    return _top_k_of_all(values, k)


def kth_greatest(values: NDArray[np.floating], k: int) -> np.floating:
    """Counted from 1, equal values one by one."""
    value: np.floating = np.partition(values, len(values) - k)[len(values) - k]
    return value


def _top_k_of_all(values: NDArray[np.floating], k: int) -> Ids:
    threshold = kth_greatest(values, k)
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)
    return np.sort(np.concatenate((above, level[: k - len(above)])))


def top_p(weight: Floats, p: float) -> Ids:
    """The nucleus (Holtzman et al.): positions of the fewest greatest weights whose share of all
    reaches ``p``, ascending; of equals the first."""
    total = weight.sum()
    # All that are lighter than this weigh less than 1 - p together: the rest can do without.
    heavy = np.flatnonzero(weight >= (1 - p) * total / len(weight) * 0.999)
    return heavy[_fewest_reaching(weight[heavy], p * total)]


def _fewest_reaching(weight: Floats, target: float) -> NDArray[np.bool_]:
    """Which are the fewest greatest whose sum reaches ``target``; all, if none do."""
    if len(weight) > MOST_SORTED:
        kept, border, sum_kept = _split_at_border(weight, target)
    else:
        kept, border, sum_kept = np.zeros(len(weight), np.bool_), np.arange(len(weight)), 0.0
    order = border[np.argsort(-weight[border], kind="stable")]
    reaches = sum_kept + weight[order].cumsum() >= target
    count = int(reaches.argmax()) + 1 if reaches.any() else len(order)
    kept[order[:count]] = True
    return kept


def _split_at_border(weight: Floats, target: float) -> tuple[NDArray[np.bool_], Ids, float]:
    """Which are certainly among the fewest greatest that reach ``target``, the positions of those
    of which only some are, and the sum of the first. Nothing is sorted: positive floats are ordered
    as their bits, so the high bits put them into buckets, greatest first."""
    bits = weight.view(np.int64) >> LOW_BITS
    bucket = bits.max() - bits
    reached = np.bincount(bucket, weight).cumsum()
    last = min(int(np.searchsorted(reached, target)), len(reached) - 1)
    sum_kept = float(reached[last - 1]) if last else 0.0
    return bucket < last, np.flatnonzero(bucket == last), sum_kept


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    # The position is the counter's second word: 2**64 further numbers could follow each.
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, position, 0, 0]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def logprobs_of(logits_V: NDArray[np.float32], token: int, count: int) -> Logprobs:
    """The model's log-probability of ``token`` and of the ``count`` best."""
    top = top_k(logits_V, count) if count else np.arange(0)
    best = top[np.argsort(-logits_V[top], kind="stable")]
    x_V = logits_V.astype(np.float64)
    highest = x_V.max()
    x_V -= highest
    np.exp(x_V, out=x_V)
    total = highest + np.log(x_V.sum())
    logprobs = [float(logits_V[i] - total) for i in (token, *best.tolist())]
    return Logprobs(logprobs[0], tuple(zip(best.tolist(), logprobs[1:], strict=True)))
