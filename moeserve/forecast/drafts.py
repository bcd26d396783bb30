"""What the model that drafts would take of memory, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moeserve.config.options import RankModelOptions
from moeserve.engine.draft_loading import draft_wanted, require_same_tokens
from moeserve.errors import ConfigError, MoeserveError
from moeserve.forecast.predictions import NO_DRAFT, DraftSizes
from moeserve.kernels.ops import Ops
from moeserve.models.library import resolve_model
from moeserve.models.packed.checkpoint import open_checkpoint
from moeserve.offload.checkpoint_demand import demand_of, stored_sizes


def draft_sizes(options: RankModelOptions, model: Path, ops: Ops) -> DraftSizes:
    """ConfigError where ``serve`` would refuse it for ``model``."""
    name = draft_wanted(options)
    if name is None:
        return NO_DRAFT
    try:
        path = resolve_model(name)
        require_same_tokens(open_checkpoint(path), open_checkpoint(model))
        alone = options.model_copy(update={"speculation": "off", "draft_model": None})
        sizes = replace(stored_sizes(path, alone), drafts=0, draft_experts=0)  # its own module
    except ConfigError:
        raise
    except MoeserveError as error:
        raise ConfigError(f"draft_model={name!r}: {error.message}") from error
    demand = demand_of(sizes, alone, ops)
    return DraftSizes(demand.weight_bytes, demand.kv_bytes_per_token)
