"""From one row of logits to one token.

Each row is computed by itself, in float64, and draws from a counter-based generator keyed by
(seed, position of the new token): the token depends on its own logits and history only, never on
the batch (law 1). In this order: penalties, bias, tokens banned by ``min_tokens``, temperature,
min-p, top-k, top-p (over what the filters before left, renormalised). Equal logits: the lower
token id is greater. Log-probabilities are those of the model, before any of this.

The letter V is the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Chunk, Logprobs, Sampled, SamplingParams
from moeserve.errors import InternalError

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# So many candidates are sorted at once; of more, those that decide are found first.
FEW = 2048
# Bits of a weight below the first eight of its mantissa.
COARSE = 44
# Values of which only the greatest is looked at first.
STRETCH = 64


def sample(logits_V: NDArray[np.float32], chunk: Chunk, eos_ids: frozenset[int]) -> Sampled:
    """The token that follows the chunk. Raises InternalError if the logits are not numbers."""
    params = chunk.request.params
    best = int(logits_V.argmax())  # the first maximum, or the first NaN
    if not np.isfinite(logits_V[best]):
        raise InternalError(
            f"request {chunk.request.id}: the logits after position "
            f"{chunk.start + len(chunk.token_ids) - 1} hold {logits_V[best]} at token {best}"
        )
    banned = banned_ids(params, len(chunk.output_ids), eos_ids)
    token = best
    if params.temperature > 0 or banned or _shifts_logits(params):
        shifted_V = shift(logits_V, params, chunk.request.prompt_ids, chunk.output_ids, banned)
        if not np.isfinite(shifted_V.max()):
            raise InternalError(f"request {chunk.request.id}: no token is allowed")
        if params.temperature > 0:
            position = chunk.start + len(chunk.token_ids)
            token = draw(shifted_V, params, uniform(params.seed, position))
        else:
            token = int(shifted_V.argmax())
    logprobs = None if params.logprobs is None else score(logits_V, token, params.logprobs)
    return Sampled(chunk.request.id, token, logprobs)


def banned_ids(params: SamplingParams, made: int, eos_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that would end the request before ``min_tokens``."""
    if made >= params.min_tokens:
        return frozenset()
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)


def shift(
    logits_V: NDArray[np.float32],
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    banned: Iterable[int],
) -> Floats:
    """Logits after penalties, bias and bans."""
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
    for token in banned:
        x_V[token] = -np.inf
    return x_V


def draw(logits_V: Floats, params: SamplingParams, u: float) -> int:
    """The token at quantile ``u`` of the filtered distribution, in order of token ids."""
    ids = None  # all
    # Top-k and min-p each keep the upper part of one order: which goes first does not matter.
    if 0 < params.top_k < len(logits_V):
        ids = greatest(logits_V, params.top_k)
    weight = (logits_V if ids is None else logits_V[ids]) - logits_V.max()
    with np.errstate(over="ignore"):  # a tiny temperature makes the others infinitely unlikely
        weight /= params.temperature
    np.exp(weight, out=weight)
    if params.min_p > 0:
        kept = np.flatnonzero(weight >= params.min_p)
        weight, ids = weight[kept], kept if ids is None else ids[kept]
    if params.top_p < 1:
        kept = likeliest(weight, params.top_p)
        weight, ids = weight[kept], kept if ids is None else ids[kept]
    cumulative = weight.cumsum()
    chosen = np.searchsorted(cumulative, u * cumulative[-1], side="right")
    last = np.searchsorted(cumulative, cumulative[-1])  # the end, less what has no weight
    at = int(min(chosen, last))
    return at if ids is None else int(ids[at])


def greatest(values: NDArray[np.floating], k: int) -> Ids:
    """Positions of the ``k`` greatest, ascending; of equals the first."""
    if k >= len(values):
        return np.arange(len(values))
    if k * STRETCH < len(values) // 2:
        # As many stretches as k hold a value that is not below this: so do the k greatest.
        best = values[: len(values) // STRETCH * STRETCH].reshape(-1, STRETCH).max(1)
        few = np.flatnonzero(values >= np.partition(best, len(best) - k)[len(best) - k])
        return few[_select(values[few], k)]
    return _select(values, k)


def _select(values: NDArray[np.floating], k: int) -> Ids:
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > threshold)
    level = np.flatnonzero(values == threshold)
    return np.sort(np.concatenate((above, level[: k - len(above)])))


def likeliest(weight: Floats, p: float) -> Ids:
    """Positions of the fewest greatest whose share reaches ``p``, ascending."""
    total = weight.sum()
    # All that are lighter than this weigh less than 1 - p together: the rest can do without.
    heavy = np.flatnonzero(weight >= (1 - p) * total / len(weight) * 0.999)
    weight = weight[heavy]
    kept, level, before = np.zeros(len(heavy), np.bool_), np.arange(len(heavy)), 0.0
    if len(heavy) > FEW:
        # Positive floats are ordered as their bits: buckets by the first of them, greatest first.
        bits = weight.view(np.int64) >> COARSE
        bucket = bits.max() - bits
        reached = np.bincount(bucket, weight).cumsum()
        last = min(int(np.searchsorted(reached, p * total)), len(reached) - 1)
        before = float(reached[last - 1]) if last else 0.0
        kept, level = bucket < last, np.flatnonzero(bucket == last)
    order = level[np.argsort(-weight[level], kind="stable")]
    enough = before + weight[order].cumsum() >= p * total
    count = int(enough.argmax()) + 1 if enough.any() else len(order)
    kept[order[:count]] = True
    return heavy[kept]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    # The position is the counter's second word: 2**64 further numbers could follow each.
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, position, 0, 0]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def score(logits_V: NDArray[np.float32], token: int, count: int) -> Logprobs:
    """The model's log-probability of ``token`` and of the ``count`` best."""
    top = greatest(logits_V, count) if count else np.arange(0)
    best = top[np.argsort(-logits_V[top], kind="stable")]
    x_V = logits_V.astype(np.float64)
    highest = x_V.max()
    x_V -= highest
    np.exp(x_V, out=x_V)
    total = highest + np.log(x_V.sum())
    logprobs = [float(logits_V[i] - total) for i in (token, *best.tolist())]
    return Logprobs(logprobs[0], tuple(zip(best.tolist(), logprobs[1:], strict=True)))


def _shifts_logits(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
    )
