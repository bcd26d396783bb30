"""Stage 1: the most tokens per second that capacities and bandwidths allow. Pure.

Equations 1 to 7 of MoE-Lens (arXiv 2504.09345), for weights that come from a tier of ``delta``
seconds for one pass over all of them: from host memory to a device, or from disk to host memory.
Symbols: p tokens of a prompt, g generated ones, n tokens in parallel in one pass over the weights,
M tokens of KV that there is room for, N_e experts of which a token takes N_k, hidden h, expert
intermediate m h, s query heads to a KV head. docs/performance_model.md derives them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from moeserve.errors import ConfigError
from moeserve.offload.model.demand import ModelDemand
from moeserve.offload.model.locality import LONG
from moeserve.offload.model.machine import MachineModel
from moeserve.offload.model.residency import WeightsInMemory


class Resource(StrEnum):
    """What can bind: ``BATCH`` is that there are no more requests, or no more may run."""

    DISK = "disk"
    MEMORY_BANDWIDTH = "memory bandwidth"
    COMPUTE = "compute"
    KV_CAPACITY = "KV capacity"
    MEMORY_SIZE = "memory size"
    FIXED = "fixed cost of steps"
    BATCH = "number of requests"


def intensity(n: float, *, experts: int, top_k: int, ratio: float, group: float) -> float:
    """Eq 1: operations per byte of bf16 weights; ``ratio`` is m, ``group`` is s."""
    attention = 2 + 2 / group
    return n * (6 * ratio * top_k + attention) / (6 * ratio * experts + attention)


def saturating_tokens(
    operations_per_s: float, bytes_per_s: float, *, experts: int, top_k: int
) -> float:
    """Eq 2: n from which on arithmetic binds, not the stream of weights."""
    return operations_per_s / bytes_per_s * experts / top_k


def parallelism_memory_efficiency(p: float, g: float) -> float:
    """Eq 3: tokens in parallel for each token of KV, over the life of a request: its p + g tokens
    over the g steps in which it holds p, p + 1, ... of them."""
    if p < 0 or g <= 0:
        raise ConfigError(f"a prompt of {p} and an answer of {g} tokens: expected 0 and 1 or more")
    return 2 * (p + g) / ((2 * p + g) * g)


def streamed_bound(
    p: float, g: float, *, kv_tokens: float, delta: float, compute: float
) -> tuple[float, float]:
    """Eq 4: tokens per second, those of prompts included, and n; ``compute`` tokens per second are
    what arithmetic allows. ``delta`` 0 is weights that need no stream."""
    n = parallelism_memory_efficiency(p, g) * kv_tokens
    streamed = n / delta if delta > 0 else float("inf")
    return min(streamed, compute), n


def memory_traffic(kv_bytes_per_s: float, weight_bytes_per_s: float) -> float:
    """Eq 5: bytes per second of host memory that scanning KV and the stream of weights need."""
    return kv_bytes_per_s + weight_bytes_per_s


def attention_compute(kv_bytes_per_s: float, group: float, value_bytes: float = 2.0) -> float:
    """Eq 6: operations per second to attend to KV as fast as it is read: each number is multiplied
    and added once for each of the ``group`` query heads that share it."""
    return 2 * group * kv_bytes_per_s / value_bytes


def effective_kv(p: float, g: float) -> float:
    """Eq 7: how many times the KV there seems to be where requests are staggered, so that they hold
    p + g / 2 tokens on average, and not p + g all at once."""
    return (p + g) / (p + g / 2)


@dataclass(frozen=True, slots=True)
class ThroughputBound:
    """``tokens_per_s`` of prompts and answers, ``generated_per_s`` of answers alone; ``n`` tokens
    in parallel, and whether it is KV that keeps n from being greater. ``limits`` are what each
    resource by itself would allow, in tokens per second; ``binding`` has the least."""

    tokens_per_s: float
    generated_per_s: float
    n: float
    kv_limited: bool
    binding: Resource
    limits: dict[Resource, float]


def throughput_bound(
    machine: MachineModel,
    model: ModelDemand,
    p: int,
    g: int,
    *,
    kv_tokens: float,
    concurrency: float,
    weights: WeightsInMemory | None = None,
) -> ThroughputBound:
    """The same for the tiers disk, host memory and its processor, in steady state: at most
    ``concurrency`` requests at once, each for g steps. Weights in memory are read once a step; what
    is streamed (``streamed_a_step``) is also written to memory (the contention that eq 5 leaves
    out). Steps cost nothing by themselves here."""
    held = weights or WeightsInMemory()
    n_kv = parallelism_memory_efficiency(p, g) * kv_tokens
    n_batch = concurrency * (p + g) / g
    n = max(1.0, min(n_kv, n_batch))
    share_decode = g / (p + g)
    # Prompts may all fall into a few steps: most steps touch what their decoding tokens do.
    decoding = n * share_decode
    streamed = streamed_a_step(model, held, decoding, p, g)
    kv_scan = decoding * (p + g / 2) * model.kv_bytes_per_token
    touched = model.touched_bytes(decoding)
    from_memory = memory_traffic(kv_scan, touched) * machine.coldness(kv_scan + touched)
    memory = (from_memory + streamed) / machine.memory_bytes_per_s
    limits = {
        Resource.COMPUTE: 1.0 / seconds_of_arithmetic(machine, model, p, g),
        Resource.MEMORY_BANDWIDTH: n / memory if memory else float("inf"),
        Resource.DISK: float("inf"),
    }
    if streamed:
        limits[Resource.DISK] = n * machine.disk_rate(model.record_bytes) / streamed
    binding = min(limits, key=lambda resource: limits[resource])
    best = limits[binding]
    return ThroughputBound(best, best * share_decode, n, n_kv < n_batch, binding, limits)


def streamed_a_step(
    model: ModelDemand, held: WeightsInMemory, requests: float, p: int, g: int
) -> float:
    """Bytes, on average over the g steps of so many requests that come at once: of one all their
    prompts are in, and in the others what they prefer is there more and more. Requests that come
    one by one read more; what is there is predicted (``locality``), so the bound is as far off."""
    if held.all:
        return 0.0
    prompts = held.missing_bytes(model, requests * p)
    steps_by_made = Counter(min(made, LONG) for made in range(g - 1))
    answers = sum(
        steps * held.missing_bytes(model, requests, made) for made, steps in steps_by_made.items()
    )
    return (prompts + answers) / g


def seconds_of_arithmetic(machine: MachineModel, model: ModelDemand, p: int, g: int) -> float:
    """Of one token on average, prompts' and answers', where rows are many: no reads, no fixed
    costs."""
    total = 0.0
    context = (p * p / 2 + g * (p + g / 2)) / (p + g)
    for count, layer in model.layers:
        matrices = sum(m.weights * machine.product(m.kind).per_row(1.0) for m in layer.always)
        if layer.experts is not None:
            each = layer.experts.each
            per_row = machine.expert(each.kind).per_row(1.0)
            matrices += layer.experts.top_k * each.weights * per_row
        a = layer.attention
        matrices += a.operations * a.seen(context) * machine.attend(a.kind).prefill
        total += count * matrices
    head = model.head
    total += head.weights * machine.product(head.kind).per_row(1.0) * g / (p + g)
    return total * machine.slower_compute
