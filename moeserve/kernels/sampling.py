"""What ``Ops.sample`` takes for every row of logits, and what it gives back.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeserve.core import Logprobs, RequestId, SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """Whose logits a row holds, and the tokens before the one that they choose."""

    request_id: RequestId
    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]

    @property
    def position(self) -> int:
        """Of the token that is chosen, counted from the beginning of the prompt."""
        return len(self.prompt_ids) + len(self.output_ids)


@dataclass(frozen=True, slots=True)
class SampledRow:
    """The token chosen from a row, and its log-probabilities if the request wants them.

    Where ``failure`` is not empty it says why no token could be chosen, and names the request.
    """

    token_id: int = -1
    logprobs: Logprobs | None = None
    failure: str = ""
