"""Whether a device's experts are streamed to it, and how its memory and the host's are shared out
then.

They are where a packed model does not fit what the device may give (``--device-memory``), and where
``--memory`` bounds what the process takes of the host. Otherwise all weights lie on the device
(``device_memory``). Steps are not replayed then: the host looks at what each layer chooses.
Sizes are bytes.
"""

from __future__ import annotations

from moeserve.config.options import RankModelOptions
from moeserve.engine.device_memory import host_keeps_kv, needs_of
from moeserve.engine.kv_size import KvSize, size_kv
from moeserve.errors import ConfigError
from moeserve.host import read_memory
from moeserve.kernels.ops import Ops
from moeserve.models.decoder import Decoder
from moeserve.models.library import resolve_model
from moeserve.models.packed.layout import is_packed
from moeserve.offload.device_load import DeviceStreaming
from moeserve.offload.process_memory import LATER, resident

# Of what a budget leaves to KV and experts, KV gets half of the usual share: experts that are not
# in memory cost more than sequences that wait.
KV_SHARE_OF_BUDGET = 0.5
# Of what the host has free where --memory does not say: the rest is for others, and page tables.
HOST_SHARE = 0.8


def stream_to_device(
    ops: Ops, options: RankModelOptions, ranks: tuple[int, int], beside: int = 0
) -> tuple[Decoder, KvSize] | None:
    """The decoder, and the KV beside it; None where all weights are to lie on the device. ``ranks``
    are all, and those of this node. A token has ``beside`` bytes of KV of a draft model too.
    ConfigError where that was asked for and cannot be."""
    if ops.device.type == "npu" or ranks[0] > 1:
        if options.memory is not None:
            raise ConfigError(
                f"memory={options.memory}: experts are streamed from host memory to a CUDA device "
                "by one rank alone: leave out --memory, or give --device cpu"
            )
        return None
    folder = resolve_model(options.model)
    needs = needs_of(ops, options, ranks)
    if options.memory is None and (needs.fits(options, beside) or not is_packed(folder)):
        return None
    free, workspace = needs.card.free, needs.workspace
    return _stream(DeviceStreaming.open(folder, ops, options, free, workspace), beside)


def _stream(streaming: DeviceStreaming, beside: int) -> tuple[Decoder, KvSize]:
    options, decoder = streaming.options, streaming.decoder
    host, per_token = host_room(options), decoder.kv_bytes_per_token + beside
    on_host = host_keeps_kv(decoder, options.block_size, all_of_it=True)
    room = host if on_host else streaming.room_for_kv
    modest = options.model_copy(update={"host_share": KV_SHARE_OF_BUDGET})
    size = size_kv(per_token, decoder.spec.max_positions, modest, room)
    kv = size.num_blocks * options.block_size * per_token
    return streaming.load(0 if on_host else kv, host - kv if on_host else host), size


def host_room(options: RankModelOptions) -> int:
    """What experts, and KV that lies there, may take of host memory."""
    if options.memory is None:
        return int(read_memory().available * HOST_SHARE) - options.swap_memory
    left = options.memory - options.swap_memory - resident() - LATER
    if left <= 0:
        raise ConfigError(
            f"memory={options.memory}: the process itself takes {resident() + LATER} bytes and "
            f"{options.swap_memory} are for --swap-memory: give more"
        )
    return left
