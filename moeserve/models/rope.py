"""Rotary position embedding: from a config's spelling to cos and sin tables.

Two spellings are read: ``rope_parameters`` (one object), and ``rope_theta`` beside
``rope_scaling`` (older, with ``type`` for ``rope_type``). Dynamic NTK scaling equals no scaling up
to ``max_position_embeddings``, which is as far as we serve. Tables are computed once, so that a
position's row cannot depend on the batch. Letters: P positions, R rotary pairs, T tokens.

Sources: YaRN (2309.00071) sections 3.2-3.4; Llama 3.1's smoothing of frequency bands;
DeepSeek-V2's ``mscale_all_dim`` for the softmax scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeserve.errors import CheckpointError
from moeserve.kernels.ops import Rope
from moeserve.models.fields import Fields
from moeserve.models.spec import LEAST, RopeScaling, RopeSpec


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    interleaved: bool = False,
    theta: float = 10_000.0,
    partial: float = 1.0,
) -> RopeSpec:
    """The rope of a config; ``theta`` and ``partial`` are the family's defaults."""
    scaling = _scaling(fields)
    fraction = scaling.number(
        "partial_rotary_factor", default=fields.number("partial_rotary_factor", default=partial)
    )
    base = scaling.number("rope_theta", default=fields.number("rope_theta", default=theta))
    kind = scaling.text("rope_type", "type", default="default")
    plain = RopeSpec(base, int(head_dim * fraction), interleaved)
    if kind in ("default", "dynamic"):
        return plain
    trained = fields.size(
        "original_max_position_embeddings",
        default=scaling.size(
            "original_max_position_embeddings", default=fields.size("max_position_embeddings")
        ),
    )
    if kind == "linear":
        return _with(plain, RopeScaling.LINEAR, scaling.number("factor"), trained)
    if kind == "llama3":
        bands = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        return _with(plain, RopeScaling.LLAMA3, scaling.number("factor"), trained, bands=bands)
    if kind == "yarn":
        stretch = fields.size("max_position_embeddings") / trained
        return _yarn(plain, scaling, scaling.number("factor", default=stretch), trained)
    raise CheckpointError(
        f"{scaling.where}: rope_type={kind!r} is not supported "
        f"(only default, linear, dynamic, yarn, llama3)"
    )


def _yarn(plain: RopeSpec, scaling: Fields, factor: float, trained: int) -> RopeSpec:
    fast = scaling.number("beta_fast", default=32.0)
    slow = scaling.number("beta_slow", default=1.0)
    return _with(
        plain,
        RopeScaling.YARN,
        factor,
        trained,
        magnitude=_yarn_magnitude(scaling, factor),
        betas=(fast, slow),
        truncate=scaling.flag("truncate", default=True),
    )


def softmax_scale(fields: Fields, head_dim: int) -> float:
    """1 / sqrt(head_dim), times DeepSeek's squared YaRN temperature where the config has one."""
    scale = 1.0 / math.sqrt(head_dim)
    scaling = _scaling(fields)
    all_dim = scaling.number("mscale_all_dim", default=0.0)
    if scaling.text("rope_type", "type", default="default") == "default" or not all_dim:
        return scale
    temperature = _mscale(scaling.number("factor"), all_dim)
    return scale * temperature * temperature


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians per position of each pair, [R] fp32."""
    exponent_R = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    period_R = spec.theta**exponent_R
    plain_R = 1.0 / period_R
    if spec.scaling is RopeScaling.LINEAR:
        return plain_R / spec.factor
    if spec.scaling is RopeScaling.YARN:
        keep_R = 1 - _yarn_ramp(spec)
        return 1.0 / (spec.factor * period_R) * (1 - keep_R) + plain_R * keep_R
    if spec.scaling is RopeScaling.LLAMA3:
        low, high = spec.bands
        turns_R = spec.original_positions / (2 * math.pi / plain_R)
        smooth_R = ((turns_R - low) / (high - low)).clamp(0, 1)
        return (1 - smooth_R) * plain_R / spec.factor + smooth_R * plain_R
    return plain_R


def rope_tables(spec: RopeSpec, positions: int) -> Rope:
    angle_PR = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequencies(spec)
    cos_PR, sin_PR = angle_PR.cos().mul_(spec.magnitude), angle_PR.sin_().mul_(spec.magnitude)
    return Rope(cos_PR, sin_PR, spec.interleaved)


def _scaling(fields: Fields) -> Fields:
    for name in ("rope_parameters", "rope_scaling"):
        table = fields.table(name)
        if table is not None:
            nested = [k for k, v in table.config.items() if isinstance(v, dict)]
            if nested:
                raise CheckpointError(
                    f"{table.where}: a rope per layer type ({', '.join(nested)}) is not supported"
                )
            return table
    return Fields({}, f"{fields.where}: rope_scaling")


def _with(
    plain: RopeSpec,
    scaling: RopeScaling,
    factor: float,
    original_positions: int,
    *,
    magnitude: float = 1.0,
    betas: tuple[float, float] = (32.0, 1.0),
    truncate: bool = True,
    bands: tuple[float, float] = (1.0, 4.0),
) -> RopeSpec:
    return RopeSpec(
        plain.theta,
        plain.dim,
        plain.interleaved,
        scaling,
        factor,
        original_positions,
        magnitude,
        betas,
        truncate,
        bands,
    )


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_magnitude(scaling: Fields, factor: float) -> float:
    given = scaling.optional_number("attention_factor")
    if given is not None:
        return given
    mscale = scaling.number("mscale", default=0.0)
    all_dim = scaling.number("mscale_all_dim", default=0.0)
    if mscale and all_dim:
        whole = _mscale(factor, all_dim)
        if whole < LEAST:
            raise scaling.wrong("mscale_all_dim", all_dim, "one that scales by more than 0")
        return _mscale(factor, mscale) / whole
    return _mscale(factor)


def _yarn_ramp(spec: RopeSpec) -> Tensor:
    """0 for pairs that turn fast enough to keep, 1 for those to interpolate, [R]."""

    def pair_turning(turns: float) -> float:
        wavelength = spec.original_positions / (turns * 2 * math.pi)
        return spec.dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = pair_turning(spec.betas[0]), pair_turning(spec.betas[1])
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    pair_R = torch.arange(spec.dim // 2, dtype=torch.float32)
    return ((pair_R - low) / (high - low)).clamp(0, 1)
