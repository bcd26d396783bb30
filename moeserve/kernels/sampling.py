"""What ``Ops.sample`` takes for every row of logits, and what it gives back.

Named tuples, since every token of every request makes one of each. Letters: R rows, V vocabulary,
B its bytes: one bit for each token, bit i of byte b for token 8 b + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeserve.core import Logprobs, RequestId, SamplingParams


class SamplingRow(NamedTuple):
    """Whose logits a row holds, and the tokens before the one that they choose.

    ``takes_best`` where that is known to be the one of the greatest logit whatever the tokens are,
    and nothing else is asked for: such a row is told apart once, not in every step. ``allowed_B``
    are the tokens of which one has to be chosen, whatever else is asked for; None are all.

    With ``known`` nothing is chosen: the row's token is ``prompt_ids[known]``, and what is asked
    for are its log-probabilities.
    """

    request_id: RequestId
    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    takes_best: bool = False
    known: int = 0
    allowed_B: NDArray[np.uint8] | None = None

    @property
    def position(self) -> int:
        """Of the token that is chosen, counted from the beginning of the prompt."""
        return self.known or len(self.prompt_ids) + len(self.output_ids)


class SampledRow(NamedTuple):
    """The token chosen from a row, and its log-probabilities if the request wants them.

    Where ``failure`` is not empty it says why no token could be chosen, and names the request;
    ``asked`` where that follows from what the request asks for, which leaves no token.
    """

    token_id: int = -1
    logprobs: Logprobs | None = None
    failure: str = ""
    asked: bool = False


def sampling_row(
    request_id: RequestId,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> SamplingRow:
    """A row that is told apart."""
    best = (
        params.temperature <= 0
        and params.min_tokens <= 0
        and params.logprobs is None
        and not adjusts_logits(params)
    )
    return SamplingRow(request_id, params, prompt_ids, output_ids, best)


def allowing(row: SamplingRow, allowed_B: NDArray[np.uint8] | None) -> SamplingRow:
    """The row, of which only these tokens can be chosen; made in each step, hence without
    ``_replace``."""
    return tuple.__new__(SamplingRow, (*row[:-1], allowed_B))


def adjusts_logits(params: SamplingParams) -> bool:
    """Whether penalties, bias, or tokens that are forbidden change the logits."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or bool(params.allowed_token_ids)
        or bool(params.bad_token_ids)
    )
