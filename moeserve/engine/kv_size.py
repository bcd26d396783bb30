"""How many KV blocks a rank has, and the longest sequence that they serve.

KV memory defaults to room for ``max_num_seqs`` sequences of a usual length, and at most a share of
what is available to the rank (less, by ``host_share``, where others start beside it); where that
cannot hold the checkpoint's longest sequence, ``max_model_len`` shrinks to what fits if it was not
asked for, and is an error if it was. All ranks have as many blocks as the one with the least room.
Sizes are bytes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from moeserve.comm.group import Group
from moeserve.config.options import RankModelOptions
from moeserve.errors import ConfigError

USUAL_LEN = 2048
SHARE_OF_AVAILABLE = 0.5


@dataclass(frozen=True, slots=True)
class KvSize:
    """How many blocks, and the longest sequence that they serve."""

    num_blocks: int
    max_model_len: int


def size_kv(
    bytes_per_token: int, max_positions: int, options: RankModelOptions, available: int
) -> KvSize:
    """Pure; ConfigError for what is not ``available``, or cannot hold one request."""
    asked, block_size = options.max_model_len, options.block_size
    if asked is not None and asked > max_positions:
        raise ConfigError(
            f"max_model_len={asked}: the checkpoint was made for {max_positions} positions"
        )
    longest = asked or max_positions
    bytes_per_block = bytes_per_token * block_size
    num_blocks = _wanted_blocks(bytes_per_block, longest, options, available)
    if num_blocks * bytes_per_block > available:
        raise ConfigError(
            f"{num_blocks} KV blocks of {bytes_per_block} bytes do not fit in the {available} "
            f"bytes of memory available: lower num_blocks or kv_memory"
        )
    fits = num_blocks * block_size
    if fits < 2 or (asked is not None and fits < asked):
        raise ConfigError(
            f"KV memory holds {fits} tokens ({num_blocks} blocks of {block_size}, "
            f"{bytes_per_block} bytes each), and one request of max_model_len={longest} needs "
            f"{longest}: lower max_model_len, or give kv_memory={longest * bytes_per_token} or more"
        )
    if fits < longest:
        logging.getLogger("moeserve.engine").warning(
            "max_model_len is %d instead of the checkpoint's %d: that is what KV memory holds",
            fits,
            longest,
        )
    return KvSize(num_blocks, min(longest, fits))


def _wanted_blocks(
    bytes_per_block: int, longest: int, options: RankModelOptions, available: int
) -> int:
    """Those asked for, else as many as ``max_num_seqs`` usual sequences and the longest one need,
    within a share of what is available."""
    if options.num_blocks is not None:
        return options.num_blocks
    if options.kv_memory is not None:
        return options.kv_memory // bytes_per_block
    usual = options.max_num_seqs * -(-min(longest, USUAL_LEN) // options.block_size)
    wanted = max(usual, -(-longest // options.block_size))
    share = SHARE_OF_AVAILABLE * options.host_share
    return min(wanted, int(available * share) // bytes_per_block)


def least_of_all(group: Group, mine: KvSize | None) -> KvSize:
    """The size that every rank of the group has room for; all of them call it, those that will have
    no requests with None."""
    note = json.dumps(None if mine is None else [mine.num_blocks, mine.max_model_len]).encode()
    said = map(json.loads, group.all_gather("kv size", note))
    sizes = [size for size in said if size is not None]
    return KvSize(min(blocks for blocks, _ in sizes), min(longest for _, longest in sizes))
