"""What ``Ops.sample`` takes for every row of logits, and what it gives back.

Named tuples, since every token of every request makes one of each. Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeserve.core import Logprobs, RequestId, SamplingParams


class SamplingRow(NamedTuple):
    """Whose logits a row holds, and the tokens before the one that they choose."""

    request_id: RequestId
    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]

    @property
    def position(self) -> int:
        """Of the token that is chosen, counted from the beginning of the prompt."""
        return len(self.prompt_ids) + len(self.output_ids)


class SampledRow(NamedTuple):
    """The token chosen from a row, and its log-probabilities if the request wants them.

    Where ``failure`` is not empty it says why no token could be chosen, and names the request.
    """

    token_id: int = -1
    logprobs: Logprobs | None = None
    failure: str = ""
