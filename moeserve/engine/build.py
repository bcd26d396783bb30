"""From a model folder to a running engine: weights, tokenizer, KV memory, threads.

What is not given is derived from the checkpoint and the machine, and the log says how. KV memory
defaults to room for ``max_num_seqs`` sequences of a usual length, and at most a share of what is
available; where that cannot hold the checkpoint's longest sequence, ``max_model_len`` shrinks to
what fits if it was not asked for, and is an error if it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeserve.core import Counters
from moeserve.engine.blocks import BlockPool
from moeserve.engine.loop import Engine, EngineObserver
from moeserve.engine.runner import LocalExecutor
from moeserve.engine.scheduler import Scheduler, SchedulerConfig
from moeserve.errors import ConfigError, TokenizerError
from moeserve.host import read_memory
from moeserve.kernels.reference import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.models.decoder import Decoder, load_decoder
from moeserve.models.library import resolve_model
from moeserve.models.spec import ModelSpec, MoeSpec
from moeserve.models.tokenizer import Tokenizer
from moeserve.models.weights import QUANTIZATIONS
from moeserve.observe.routing import RoutingRecorder

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES = DTYPES | {"int8": torch.int8}
USUAL_LEN = 2048
SHARE_OF_AVAILABLE = 0.5


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model being served. Where ``tokenizer`` is None, ``no_tokenizer`` says why.

    ``context`` is the longest sequence asked for, ``max_model_len`` what KV memory leaves of it.
    """

    name: str
    path: Path
    engine: Engine
    spec: ModelSpec
    tokenizer: Tokenizer | None
    no_tokenizer: str
    config: SchedulerConfig
    block_size: int
    num_blocks: int
    kv_bytes: int
    context: int
    recorder: RoutingRecorder | None

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len

    def close(self, timeout: float = 30.0) -> bool:
        """Stop the engine, end its streams, and complete the routing trace."""
        stopped = self.engine.stop(timeout)
        if stopped and self.recorder is not None:
            self.recorder.close()
        return stopped


@dataclass(frozen=True, slots=True)
class KvSize:
    """How many blocks, and the longest sequence that they serve."""

    num_blocks: int
    max_model_len: int


def build_engine(
    model: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    quantization: str = "auto",
    quantize_attention: bool = True,
    max_model_len: int | None = None,
    block_size: int = 16,
    num_blocks: int | None = None,
    kv_memory: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_queue: int = 1024,
    prefix_cache: bool = True,
    chat_template: Path | None = None,
    threads: int | None = None,
    record_routing: Path | None = None,
    observer: EngineObserver | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model and start its engine. ``progress`` hears bytes read and bytes in all."""
    path = resolve_model(model)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {sorted(DTYPES)}")
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_dtype={kv_dtype!r}: expected one of {sorted(KV_DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization={quantization!r}: expected one of {QUANTIZATIONS}")
    ops = choose_ops(threads=threads)
    if ops.name != ReferenceOps.name:
        torch.set_num_threads(1)  # the native pool has the cores: two pools would fight for them
    elif threads is not None:
        torch.set_num_threads(threads)
    tokenizer, no_tokenizer = load_tokenizer(path, chat_template)
    decoder = load_decoder(
        path,
        dtype=DTYPES[dtype],
        ops=ops,
        kv_dtype=KV_DTYPES[kv_dtype],
        quantization=quantization,
        quantize_attention=quantize_attention,
        progress=progress,
    )
    size = size_kv(
        decoder.kv_bytes_per_token,
        decoder.spec.max_positions,
        block_size=block_size,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        kv_memory=kv_memory,
        max_num_seqs=max_num_seqs,
        available=read_memory().available,
    )
    named = (*decoder.spec.eos_ids, *(tokenizer.eos_ids if tokenizer else ()))
    eos_ids = frozenset(i for i in named if i < decoder.spec.vocab)
    config = SchedulerConfig(
        max_model_len=size.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        eos_ids=eos_ids,
        prefix_cache=prefix_cache,
    )
    name = name or path.name
    recorder = None if record_routing is None else open_recorder(record_routing, name, decoder)
    counters = Counters()
    scheduler = Scheduler(config, BlockPool(size.num_blocks, block_size, counters), counters)
    executor = LocalExecutor(decoder, size.num_blocks, block_size, eos_ids, recorder)
    engine = Engine(scheduler, executor, tokenizer, observer)
    engine.start()
    return LoadedModel(
        name=name,
        path=path,
        engine=engine,
        spec=decoder.spec,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        config=config,
        block_size=block_size,
        num_blocks=size.num_blocks,
        kv_bytes=size.num_blocks * block_size * decoder.kv_bytes_per_token,
        context=max_model_len or decoder.spec.max_positions,
        recorder=recorder,
    )


def load_tokenizer(path: Path, chat_template: Path | None = None) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none: token ids can be served without."""
    try:
        return Tokenizer.load(path, chat_template), ""
    except TokenizerError as error:
        if chat_template is not None:
            raise ConfigError(f"chat_template={str(chat_template)!r}: {error.message}") from error
        logging.getLogger("moeserve.engine").warning("%s", error.message)
        return None, error.message


def open_recorder(path: Path, name: str, decoder: Decoder) -> RoutingRecorder:
    """A routing trace of this model."""
    layers = decoder.spec.moe_layers
    routers = {m.router for x in decoder.spec.layers if isinstance(m := x.mlp, MoeSpec)}
    if not routers:
        raise ConfigError(f"record_routing={str(path)!r}: model {name!r} has no MoE layers")
    return RoutingRecorder(
        path,
        model=name,
        moe_layers=layers,
        num_experts=max(r.num_experts for r in routers),
        top_k=max(r.top_k for r in routers),
    )


def size_kv(
    bytes_per_token: int,
    max_positions: int,
    *,
    block_size: int,
    max_model_len: int | None,
    num_blocks: int | None,
    kv_memory: int | None,
    max_num_seqs: int,
    available: int,
) -> KvSize:
    """Pure; refuses what is not ``available``."""
    if max_model_len is not None and max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len={max_model_len}: the checkpoint was made for {max_positions} positions"
        )
    longest = max_model_len or max_positions
    bytes_per_block = bytes_per_token * block_size
    if num_blocks is None and kv_memory is not None:
        num_blocks = kv_memory // bytes_per_block
    elif num_blocks is None:
        usual = max_num_seqs * -(-min(longest, USUAL_LEN) // block_size)
        wanted = max(usual, -(-longest // block_size))
        num_blocks = min(wanted, int(available * SHARE_OF_AVAILABLE) // bytes_per_block)
    if num_blocks * bytes_per_block > available:
        raise ConfigError(
            f"{num_blocks} KV blocks of {bytes_per_block} bytes do not fit in the {available} "
            f"bytes of memory available: lower num_blocks or kv_memory"
        )
    fits = num_blocks * block_size
    if fits < 2 or (max_model_len is not None and fits < max_model_len):
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
