"""What this process takes already, and what it will take beside weights and KV.

Reads ``/proc/self/status``; where there is none (not on Linux) ``resource`` says the peak so far.
Sizes are bytes.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from moeserve.config.steps import MTP_WINDOW, StepOptions
from moeserve.kernels.ops import Ops
from moeserve.models.attention import kv_shape
from moeserve.models.spec import DenseSpec, GqaSpec, MlaSpec, ModelSpec, MoeSpec

# Doors, clients' requests, threads' stacks and the heap's gaps: what comes after the weights.
LATER = 96 << 20


def resident(status: Path = Path("/proc/self/status")) -> int:
    """In memory now, libraries that others use too included."""
    try:
        text = status.read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def scratch_of(spec: ModelSpec, tokens: int, sequences: int) -> int:
    """What a step of so many tokens, that samples for so many sequences, takes at most beside
    weights and KV: fp32 rows of every width there is, as often as kernels and waves hold them."""
    widest = max(_attention_row(x.attention) + _mlp_row(x.mlp, spec.hidden) for x in spec.layers)
    return tokens * 4 * (12 * spec.hidden + widest) + 3 * 4 * sequences * spec.vocab


def drafting_bytes(spec: ModelSpec, ops: Ops, kv_dtype: torch.dtype, options: StepOptions) -> int:
    """What guessing by the module of multi-token prediction takes beside its weights and a step: KV
    of its layer, rows of the steps' states, logits."""
    assert spec.mtp is not None, spec.architecture
    positions = options.max_num_seqs * MTP_WINDOW
    kv = ops.kv_bytes_per_block(kv_shape(spec.mtp.attention, 1, 1, kv_dtype)) * positions
    rows = 2 * options.max_num_batched_tokens * spec.hidden
    return kv + 4 * (rows + options.max_num_seqs * spec.vocab)


def kept_bytes(rows: int, hidden: int) -> int:
    """Of so many rows that are kept between two steps: the residual stream is fp32."""
    return rows * 4 * hidden


def _attention_row(spec: GqaSpec | MlaSpec) -> int:
    if isinstance(spec, GqaSpec):
        return 3 * (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    key = spec.kv_lora + spec.rope
    each = 2 * spec.nope + spec.rope + spec.kv_lora + key + spec.value
    return key + 2 * (spec.q_lora or 0) + spec.heads * each


def _mlp_row(spec: DenseSpec | MoeSpec, hidden: int) -> int:
    if isinstance(spec, DenseSpec):
        return 3 * spec.intermediate
    chosen = spec.router.top_k * (3 * spec.intermediate + hidden)
    return 2 * chosen + 3 * spec.shared + spec.router.num_experts
