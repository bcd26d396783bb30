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

# Most distributions reach top-p within so many tokens: only those are sorted.
FEW = 64


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
    with np.errstate(over="ignore"):  # a tiny temperature makes the others infinitely unlikely
        weight_V = np.exp((logits_V - logits_V.max()) / params.temperature)
    kept = np.flatnonzero(weight_V >= params.min_p) if params.min_p > 0 else None
    ids = np.arange(len(weight_V)) if kept is None else kept
    ids = keep_top_k(logits_V, ids, params.top_k)
    ids = keep_top_p(weight_V, ids, params.top_p)
    cumulative = weight_V[ids].cumsum()
    chosen = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(chosen, len(ids) - 1)])


def keep_top_k(value_V: Floats, ids: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The ``k`` greatest of ``ids``, which ascend; all of them for k = 0."""
    if k == 0 or k >= len(ids):
        return ids
    value = value_V[ids]
    threshold = np.partition(value, len(ids) - k)[len(ids) - k]
    above, level = ids[value > threshold], ids[value == threshold]
    return np.sort(np.concatenate((above, level[: k - len(above)])))


def keep_top_p(weight_V: Floats, ids: NDArray[np.int64], p: float) -> NDArray[np.int64]:
    """The fewest heaviest of ``ids``, which ascend, whose share reaches ``p``."""
    if p >= 1:
        return ids
    enough = p * weight_V[ids].sum()
    size = FEW
    while True:
        some = keep_top_k(weight_V, ids, size)
        order = some[np.argsort(-weight_V[some], kind="stable")]
        reached = weight_V[order].cumsum() >= enough
        if reached.any() or len(some) == len(ids):
            count = int(reached.argmax()) + 1 if reached.any() else len(order)
            return np.sort(order[:count])
        size *= FEW


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    # The position is the counter's second word: 2**64 further numbers could follow each.
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=[0, position, 0, 0]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def score(logits_V: NDArray[np.float32], token: int, count: int) -> Logprobs:
    """The model's log-probability of ``token`` and of the ``count`` best."""
    x_V = logits_V.astype(np.float64)
    top = keep_top_k(x_V, np.arange(len(x_V)), count) if count else np.arange(0)
    best = top[np.argsort(-x_V[top], kind="stable")]
    x_V -= x_V.max()
    x_V -= np.log(np.exp(x_V).sum())
    return Logprobs(float(x_V[token]), tuple((int(i), float(x_V[i])) for i in best))


def _shifts_logits(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
    )
