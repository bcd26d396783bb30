"""The weights of a rank, where they lie, and the KV that there is room for beside them.

All in memory; or within ``--memory``, experts on disk; or on a device; or on one that experts are
streamed to. ConfigError where there is too little of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moeserve.config.options import RankModelOptions
from moeserve.engine.device_memory import load_on_device
from moeserve.engine.device_streaming import KV_SHARE_OF_BUDGET, stream_to_device
from moeserve.engine.draft_loading import LoadedDraft
from moeserve.engine.kv_size import KvSize, size_kv
from moeserve.engine.policies.layered import most_kept
from moeserve.errors import ConfigError
from moeserve.host import read_memory
from moeserve.kernels.ops import Ops
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.decoder import Decoder, assemble
from moeserve.models.library import resolve_model
from moeserve.offload.load import Streaming


def load_weights(
    checkpoint: Checkpoint,
    ops: Ops,
    options: RankModelOptions,
    own: Mapping[int, Sequence[int]] | None,
    ranks: tuple[int, int] | None,
    progress: Callable[[int, int], None] | None,
    draft: LoadedDraft,
) -> tuple[Decoder, KvSize]:
    """``own`` are this rank's experts by layer; None is all. ``ranks`` are all, and those of this
    node; None where there is one. ``progress`` gets bytes read and bytes in all. The KV of
    ``draft`` has as many blocks."""
    options, beside = draft.within(options), draft.kv_bytes_per_token
    if ops.device.type != "cpu":
        if (streamed := stream_to_device(ops, options, ranks or (1, 1), beside)) is not None:
            return streamed
        decoder, room = load_on_device(checkpoint, ops, options, own, progress, ranks or (1, 1))
        per_token = decoder.kv_bytes_per_token + beside
        return decoder, size_kv(per_token, decoder.spec.max_positions, options, room)
    if options.memory is not None:
        return _within_memory(ops, options, own, beside, alone=ranks is None)
    decoder = assemble(checkpoint, ops, options, experts=own, progress=progress)
    available = read_memory().available // (1 if ranks is None else ranks[1])
    mapped = checkpoint.mapped_bytes + draft.mapped
    available = max(0, available - mapped - options.swap_memory)
    per_token = decoder.kv_bytes_per_token + beside
    return decoder, size_kv(per_token, decoder.spec.max_positions, options, available)


def _within_memory(
    ops: Ops,
    options: RankModelOptions,
    own: Mapping[int, Sequence[int]] | None,
    beside: int,
    *,
    alone: bool,
) -> tuple[Decoder, KvSize]:
    assert options.memory is not None, options
    if not alone and options.weights_window is not None:
        raise ConfigError(
            f"weights_window={options.weights_window}: one rank alone has a window of layers: "
            "leave it out, or serve without --ep"
        )
    budget = max(1, options.memory - options.swap_memory)
    options = options.model_copy(update={"memory": budget})
    kept = most_kept(options.max_num_batched_tokens, options.prefill_mode)
    streaming = Streaming.open(resolve_model(options.model), ops, options, own, kept)
    per_token, spec = streaming.decoder.kv_bytes_per_token + beside, streaming.decoder.spec
    modest = options.model_copy(update={"host_share": KV_SHARE_OF_BUDGET})
    size = size_kv(per_token, spec.max_positions, modest, streaming.room_for_kv)
    return streaming.load(size.num_blocks * options.block_size * per_token), size
