"""Which architectures we know; each is one declarative file beside this one.

::

    family                     what a family's file declares, and the keys that all share
    deepseek  glm4_moe         DeepSeek V2 to V3 and R1; GLM-4-MoE
    gpt_oss  mixtral  olmoe    GPT-OSS; Mixtral; OLMoE
    qwen2_moe  qwen3_moe       Qwen1.5 and 2; Qwen3
"""

from __future__ import annotations

from dataclasses import replace

from moeserve.errors import CheckpointError
from moeserve.models.checkpoint import Checkpoint
from moeserve.models.families import (
    deepseek,
    glm4_moe,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from moeserve.models.families.family import Family
from moeserve.models.fields import Fields
from moeserve.models.names import TensorNames
from moeserve.models.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (
    deepseek.V2,
    deepseek.V3,
    glm4_moe.FAMILY,
    gpt_oss.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
)


def read_spec(checkpoint: Checkpoint) -> tuple[ModelSpec, TensorNames]:
    """The model a checkpoint describes; its end tokens are those of all its configs."""
    spec, names = read_config(Fields(checkpoint.config, checkpoint.config_name))
    generation = Fields(
        checkpoint.generation_config, str(checkpoint.path / "generation_config.json")
    )
    eos_ids = tuple(dict.fromkeys((*generation.ids("eos_token_id"), *spec.eos_ids)))
    return replace(spec, eos_ids=eos_ids), names


def read_config(fields: Fields) -> tuple[ModelSpec, TensorNames]:
    """The model a ``config.json`` describes, and what its family calls its tensors."""
    family = _family_of(fields)
    return family.read(fields), family.names


def _family_of(fields: Fields) -> Family:
    architectures = fields.texts("architectures")
    if architectures:
        for family in FAMILIES:
            if family.architecture == architectures[0]:
                return family
        raise _unknown(fields, f"architecture {architectures[0]!r}")
    model_type = fields.text("model_type", default="")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise _unknown(fields, f"model_type {model_type!r}")


def _unknown(fields: Fields, what: str) -> CheckpointError:
    known = ", ".join(family.architecture for family in FAMILIES)
    return CheckpointError(f"{fields.where}: {what} is not supported; supported: {known}")
