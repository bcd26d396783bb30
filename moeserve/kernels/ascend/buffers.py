"""What HCCL needs of its buffers, known before ranks start. Pure; sizes are bytes.

Ascend's fused dispatch and combine (``npu_moe_distribute_dispatch_v2``, ``..._combine_v2``) write
into windows of HCCL's buffer, whose size is HCCL_BUFFSIZE in MiB (default 200). One that is too
small shows as "MTE address out of range" in the middle of a step. The formulas are those of the
operators' documentation: for Atlas A3 twice what a rank may receive for its experts and what it
sends for its own tokens, in rows padded as the operators pad them; for A2 (``fullmesh``) twice what
it may receive, and 2 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from moeserve.errors import ConfigError
from moeserve.kernels.wire import up_to

VARIABLE = "HCCL_BUFFSIZE"
DEFAULT_MIB = 200
MIB = 1 << 20
# What vllm-ascend's deployments set, and launch scripts of ours do: memory that grows in place,
# kernels that move tokens by themselves, launches that do not wait.
ENVIRONMENT: Mapping[str, str] = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "HCCL_OP_EXPANSION_MODE": "AIV",
    "TASK_QUEUE_ENABLE": "1",
}


@dataclass(frozen=True, slots=True)
class ExpertTraffic:
    """A layer over ``world`` ranks: of ``tokens`` at most on each, every one goes to ``top_k``
    routed and ``shared`` experts that are ranks' of their own; ``local`` experts on a rank."""

    world: int
    local: int
    tokens: int
    hidden: int
    top_k: int
    shared: int = 0


class AtlasGeneration(StrEnum):
    """Of Atlas products: 910B chips, 910_93 dies."""

    A2 = "A2"
    A3 = "A3"


def least_buffer(t: ExpertTraffic, generation: AtlasGeneration = AtlasGeneration.A3) -> int:
    """Of HCCL's buffer."""
    if generation is AtlasGeneration.A2:
        rows = t.tokens * t.world * min(t.local, t.top_k)
        return 2 * (rows * 2 * t.hidden + 2 * MIB)
    received = t.local * t.tokens * t.world * up_to(up_to(2 * t.hidden, 32) + 64, 512)
    sent = (t.top_k + t.shared) * t.tokens * up_to(2 * t.hidden, 512)
    return 2 * (received + sent)


def least_mib(t: ExpertTraffic, generation: AtlasGeneration = AtlasGeneration.A3) -> int:
    """The value of ``HCCL_BUFFSIZE`` that holds it."""
    return -(-least_buffer(t, generation) // MIB)


def require_buffer(
    t: ExpertTraffic, environ: Mapping[str, str], generation: AtlasGeneration = AtlasGeneration.A3
) -> None:
    """ConfigError with the number where the buffer is too small."""
    said = environ.get(VARIABLE, "")
    if said and not said.isdecimal():
        raise ConfigError(f"{VARIABLE}={said!r}: expected a number of MiB")
    size, least = int(said) if said else DEFAULT_MIB, least_mib(t, generation)
    if size < least:
        how = f"{VARIABLE}={size}" if said else f"{VARIABLE} is not set, which means {size}"
        raise ConfigError(
            f"{how}: {t.tokens} tokens of {t.hidden} features on each of {t.world} ranks need "
            f"{least} MiB: set {VARIABLE}={least}, or lower max_num_batched_tokens"
        )
