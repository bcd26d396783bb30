"""Settings of steps: what they are made for, what they hold at most, who is in them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from moeserve.config.group import Options
from moeserve.config.kinds import Count, Milliseconds

# Bounds of a step for throughput, unless others are given: they are what memory has to be there
# for. What binds is KV, and what larger steps bring.
THROUGHPUT_TOKENS = 4096
THROUGHPUT_SEQS = 1024
# The newest positions of a request, of which the module of multi-token prediction keeps KV.
MTP_WINDOW = 128


class StepOptions(Options):
    """What a rank runs in one step at most."""

    objective: Literal["latency", "throughput"] = Field(
        default="latency",
        description="what steps are made for: latency runs whoever comes at once, throughput lets "
        "requests start as their KV will find room, in steps as large as pays",
    )
    fairness: Literal["off", "tenants"] = Field(
        default="tenants",
        description="who is next of those that wait: tenants takes, of a priority, the tenant (the "
        "name of its key) that was served fewest tokens; off takes them in order of arrival",
    )
    max_num_seqs: Count = Field(
        default=64, description="sequences in one step; for throughput 1024, as far as KV holds"
    )
    max_num_batched_tokens: Count = Field(
        default=512, description="tokens in one step; for throughput 4096, as far as that pays"
    )
    ttft_target: Milliseconds | None = Field(
        default=None,
        description="milliseconds to a request's first token: short prompts go first, and those "
        "that can still be in time before those that cannot; default: first come, first served",
    )
    tpot_target: Milliseconds | None = Field(
        default=None,
        description="milliseconds between two tokens of an answer: steps take no more tokens of "
        "prompts than keep it, and short prompts go first; default: as many as steps may have",
    )
    prefill_mode: Literal["chunk", "layer", "auto"] = Field(
        default="chunk",
        description="how prompts longer than a step are computed: in chunks, or through the layers "
        "in groups, one a step, which loads experts fewer times; auto goes by expected loads",
    )
    speculation: Literal["off", "ngram", "mtp", "draft", "auto"] = Field(
        default="off",
        description="guess tokens that follow and check them in the same step, as many as make "
        "tokens come sooner: ngram looks up what followed the same few tokens before, mtp asks the "
        "model's multi-token prediction module, draft a smaller model (--draft-model), auto looks "
        "up and asks whichever of these is there",
    )
    draft_model: str | None = Field(
        default=None,
        min_length=1,
        description="folder or GGUF file of the smaller model that guesses, with the tokenizer of "
        "the model; its weights and KV lie in memory beside the model's",
    )

    @property
    def asks_the_module(self) -> bool:
        """Whether the module of multi-token prediction guesses, where the model has it: with a
        draft model that does."""
        return self.speculation in ("mtp", "auto") and self.draft_model is None

    @model_validator(mode="before")
    @classmethod
    def _sized_for_the_objective(cls, given: Any) -> Any:
        """Bounds that were not given are those of the objective."""
        wanted = cls.model_fields["objective"].default
        if not isinstance(given, dict) or given.get("objective", wanted) != "throughput":
            return given
        tokens = given.get("max_num_batched_tokens", THROUGHPUT_TOKENS)
        most = int(tokens) if str(tokens).isdecimal() else THROUGHPUT_TOKENS
        seqs = max(1, min(THROUGHPUT_SEQS, most))
        return {"max_num_batched_tokens": tokens, "max_num_seqs": seqs} | given

    @model_validator(mode="after")
    def _every_sequence_has_a_token(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every running sequence needs a token in a step"
            )
        return self
