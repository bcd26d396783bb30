"""Write a quantised copy of a model folder, as compressed-tensors, which others read too.

int8 is per row, with activations per token; int4 is in groups, for feed-forward matrices. Which
tensors are matrices is learnt by putting the decoder together from headers, so a tensor is rounded
here if and only if loading would round it. Everything else is copied as it is; what a GGUF file has
of a tokenizer is written beside it. The model is
streamed: memory holds a few million values at a time, and pages of the source are given back. The
copy is made beside its place and moved there when it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moeserve.config.options import LoadOptions
from moeserve.errors import CheckpointError, ConfigError
from moeserve.kernels.matrix import (
    Block,
    Int4Matrix,
    Matrix,
    Pieces,
    pack_nibbles,
    to_float,
    to_int8,
)
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.models.checkpoint import FLOATS, Checkpoint
from moeserve.models.decoder import build_decoder, open_weights
from moeserve.models.families import read_spec
from moeserve.models.formats.layouts import Stored
from moeserve.models.gguf.block_types import SUFFIXES
from moeserve.models.gguf.places import gguf_of
from moeserve.models.names import TensorNames
from moeserve.models.shards import PlannedTensor, Tensors, write_shards
from moeserve.models.survey import Headers
from moeserve.models.tokenizer_parts import write_tokenizer
from moeserve.models.weights import Rounding, Weights, pick

SHARD_BYTES = 4 << 30
# Values made at a time.
_PIECE = 1 << 18
# Of a group's greatest magnitude, what int4 reaches.
_CLIPS = tuple(1 - 0.025 * i for i in range(17))
_OWN_PARTS = (
    "weight weight_scale weight_scale_inv weight_packed weight_shape weight_zero_point "
    "weight_g_idx qweight qzeros scales g_idx"
).split() + list(SUFFIXES)
_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to round: ``attention`` and ``head`` may stay floats. Others cannot read a rounded head
    as widely as the rest."""

    scheme: Literal["int8", "int4"] = "int8"
    group: int = 128
    attention: bool = True
    head: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in ("int8", "int4"):
            raise ConfigError(f"scheme={self.scheme!r}: expected 'int8' or 'int4'")
        if self.group < 8 or self.group % 8:
            raise ConfigError(f"group={self.group}: expected a multiple of 8, such as 128")

    def of(self, module: str, into: int) -> str:
        """ "int8", "int4" or "none". Rows that are not whole groups take 8 bits."""
        if module.endswith(("lm_head", "shared_head.head")) and not self.head:
            return "none"
        to = Rounding(self.scheme, self.attention).of(module)
        return "int8" if to == "int4" and into % self.group else to


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written. ``left_out`` are tensors the model does not use and we cannot copy."""

    folder: Path
    int8: int
    int4: int
    kept: int
    bytes_before: int
    bytes_after: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "folder": str(self.folder),
            "int8_matrices": self.int8,
            "int4_matrices": self.int4,
            "tensors_kept": self.kept,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True, slots=True)
class Modules(Weights):
    """Records which modules a decoder reads: matrices that may be rounded, and floats."""

    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)
    floated: dict[str, tuple[int, int]] = field(default_factory=dict)
    stacks: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def matrix(self, module: str, out: int, into: int) -> Block:
        self.matrices[module] = out, into
        return Weights.matrix(self, module, out, into)

    def floats(self, module: str, out: int, into: int) -> Tensor:
        self.floated[module] = out, into
        return Weights.floats(self, module, out, into)

    def embedding(self, module: str, vocab: int, hidden: int) -> Tensor:
        if self.stored.in_blocks(module):  # which are written as floats
            self.floated[module] = vocab, hidden
        return Weights.embedding(self, module, vocab, hidden)

    def experts(
        self, name: str, num: int, out: int, into: int, own: Sequence[int], *, transposed: bool,
        paired: bool = False,
    ) -> Pieces:  # fmt: skip
        self.stacks[name] = num, out, into
        turned = {"transposed": transposed, "paired": paired}
        return Weights.experts(self, name, num, out, into, own, **turned)


def quantize(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """``progress`` is called with bytes written and bytes in all. ``out`` must not exist."""
    if out.exists():
        raise ConfigError(f"{out}: exists; give a folder that does not")
    # 1. What becomes of every tensor, from headers alone.
    modules, unread = list_modules(model)
    checkpoint = Checkpoint.open(model)
    plan = _Plan(Stored(checkpoint, modules.stored.method), recipe, modules)
    parts = list(plan.parts(read_spec(checkpoint)[1]))
    size = sum(part.nbytes for part in parts)
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        checkpoint.release()
        if progress is not None:
            progress(done, size)

    # 2. Weights one by one, then what stands beside them.
    with whole_or_not_at_all(out, size) as folder:
        write_shards(folder, parts, shard_bytes, written)
        copy_others(model, folder)
        config = {k: v for k, v in checkpoint.config.items() if k != "compression_config"}
        config["quantization_config"] = quantization_config(plan.schemes, recipe.group, plan.kept)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    kinds = list(plan.schemes.values())
    return Summary(
        out,
        kinds.count("int8"),
        kinds.count("int4"),
        sum(len(part.planned) == 1 for part in parts),
        checkpoint.total_bytes,
        sum(file.stat().st_size for file in out.glob("*.safetensors")),
        tuple(name for name in unread if name in plan.left_out),
    )


@contextmanager
def whole_or_not_at_all(out: Path, size: int) -> Iterator[Path]:
    """A folder beside ``out`` to write ``size`` bytes into, 0 where that is not known before, which
    then becomes ``out``.

    Raises ``CheckpointError`` where that cannot be written; whatever is raised, nothing is left.
    """
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        _require_space(folder, size)
        yield folder
        folder.rename(out)
    except OSError as error:
        remedy = "nothing was kept"
        if error.errno == errno.ENOSPC and size:
            remedy = f"{size} bytes are needed"
        raise CheckpointError(f"{out}: cannot be written: {error.strerror}; {remedy}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def list_modules(model: Path) -> tuple[Modules, tuple[str, ...]]:
    """Puts the decoder together from headers; raises what loading would raise about them."""
    headers = Headers.open(model)
    plain = open_weights(headers, ReferenceOps(), LoadOptions(quantization="none"))
    modules = Modules(headers, plain.stored, plain.ops, plain.dtype, plain.rounding)
    with torch.device("meta"):
        unread = build_decoder(modules).unread
    return modules, unread


class _Plan:
    """What becomes of every tensor; owns the choices made so far."""

    def __init__(self, stored: Stored, recipe: Recipe, modules: Modules) -> None:
        self.stored = stored
        self.recipe = recipe
        self.modules = modules
        self.schemes: dict[str, str] = {}
        self.kept: list[str] = []
        self.left_out: set[str] = set()
        self.linears = modules.matrices.keys() | modules.floated.keys()

    def parts(self, names: TensorNames) -> Iterator[Tensors]:
        """In the order of the source, which is then read from front to back."""
        if names.transposed and gguf_of(self.stored.checkpoint.path) is not None:
            raise self._only_ours("it")
        emitted: set[str] = set()
        for name in self.stored.checkpoint.in_order:
            module, _, part = name.rpartition(".")
            stack = name.removesuffix("_blocks").removesuffix("_scales")
            if stack in self.modules.stacks:
                if stack not in emitted:
                    emitted.add(stack)
                    yield from self._stack(stack, names)
            elif part in _OWN_PARTS and module in self.linears:
                if module not in emitted:
                    emitted.add(module)
                    yield self._module(module)
            elif self.stored.checkpoint.dtype(name) in FLOATS and not self.stored.needless(name):
                yield self._copy(name)
            else:
                self.left_out.add(name)

    def _module(self, module: str) -> Tensors:
        if module in self.modules.floated:
            shape = self.modules.floated[module]
            self.kept.append(module)
            return self._floats(module, shape)
        out, into = self.modules.matrices[module]
        scheme = self.recipe.of(module, into)
        if scheme == "none":
            self.kept.append(module)
            return self._floats(module, (out, into))
        return self._rounded(module, lambda: self.stored.exactly(module, out, into), out, into)

    def _rounded(self, module: str, read: Callable[[], Matrix], out: int, into: int) -> Tensors:
        scheme = self.schemes[module] = self.recipe.of(module, into)
        if scheme == "int8":
            eight = (
                PlannedTensor(f"{module}.weight", torch.int8, (out, into)),
                PlannedTensor(f"{module}.weight_scale", torch.float32, (out, 1)),
            )
            return Tensors(eight, lambda: _eight_bits(module, read()))
        group = self.recipe.group
        four = (
            PlannedTensor(f"{module}.weight_packed", torch.int32, (out, into // 8)),
            PlannedTensor(f"{module}.weight_scale", torch.float32, (out, into // group)),
            PlannedTensor(f"{module}.weight_shape", torch.int64, (2,)),
        )
        return Tensors(four, lambda: _four_bits(module, read(), group))

    def _stack(self, name: str, names: TensorNames) -> Iterator[Tensors]:
        """One module per expert and projection, as others expect them."""
        if names.transposed:
            raise self._only_ours(name)
        num, out, into = self.modules.stacks[name]
        prefix, _, kind = name.rpartition(".")
        gate, up, down = names.expert_parts
        cuts = {down: slice(0, out)}
        if kind == "gate_up_proj":
            cuts = {gate: slice(0, out // 2), up: slice(out // 2, out)}
        for e in range(num):
            for part, rows in cuts.items():
                yield self._rounded(
                    f"{prefix}.{e}.{part}",
                    lambda e=e, rows=rows: self.stored.checkpoint.get(name)[e, rows],  # type: ignore[misc]
                    rows.stop - rows.start,
                    into,
                )

    def _only_ours(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.stored.checkpoint.path}: {name} holds experts of GPT-OSS, whose quantised "
            f"copies others do not read; serve the model with --quantization instead"
        )

    def _floats(self, module: str, shape: tuple[int, int]) -> Tensors:
        name = f"{module}.weight"
        if self.stored.checkpoint.has(name) and self.stored.checkpoint.dtype(name) in FLOATS:
            return self._copy(name)
        planned = (PlannedTensor(name, torch.bfloat16, shape),)
        return Tensors(
            planned,
            lambda: (
                piece.bfloat16() for piece in _pieces(module, self.stored.exactly(module, *shape))
            ),
        )

    def _copy(self, name: str) -> Tensors:
        c = self.stored.checkpoint
        planned = (PlannedTensor(name, c.dtype(name), c.shape(name)),)
        return Tensors(planned, lambda: torch.split(c.get(name).reshape(-1), _PIECE))


def _pieces(module: str, matrix_NK: Matrix) -> Iterator[Tensor]:
    """Some rows at a time, in fp32."""
    out, into = matrix_NK.shape
    rows = max(1, _PIECE // into)
    for start in range(0, out, rows):
        piece = to_float(pick(matrix_NK, slice(start, start + rows)))
        if not bool(piece.abs().amax().isfinite()):
            raise CheckpointError(f"{module} holds NaN or infinity and cannot be rounded")
        yield piece


def fitted_int4(weight_NK: Tensor, group: int) -> Int4Matrix:
    """As ``to_int4``, but each group's scale is the one of a few that leaves the least squared
    error, clipping what it does not reach. Codes are -8..7. Rows are whole groups."""
    grouped = weight_NK.view(len(weight_NK), -1, group)
    most = grouped.abs().amax(-1)
    best, scale = torch.full_like(most, torch.inf), most / 7
    for share in _CLIPS:
        tried = most * (share / 7)
        error = (_codes(grouped, tried) * tried[..., None] - grouped).square().sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    codes = (_codes(grouped, scale) + 8).flatten(-2).to(torch.uint8)
    zero = torch.full(scale.shape, 8, dtype=torch.uint8)
    return Int4Matrix(pack_nibbles(codes), scale, zero, group)


def _codes(grouped: Tensor, scale: Tensor) -> Tensor:
    return (grouped / scale.where(scale > 0, 1.0)[..., None]).round().clamp(-8, 7)


def _eight_bits(module: str, matrix_NK: Matrix) -> Iterator[Tensor]:
    scales = []
    for piece in _pieces(module, matrix_NK):
        rounded = to_int8(piece)
        scales.append(rounded.scale)
        yield rounded.codes
    yield torch.cat(scales)


def _four_bits(module: str, matrix_NK: Matrix, group: int) -> Iterator[Tensor]:
    scales = []
    for piece in _pieces(module, matrix_NK):
        rounded = fitted_int4(piece, group)
        scales.append(rounded.scale)
        yield rounded.packed
    yield torch.cat(scales)
    yield torch.tensor(matrix_NK.shape)


def quantization_config(
    schemes: Mapping[str, str], group: int, kept: Iterable[str]
) -> dict[str, Any]:
    """What compressed-tensors says of a model whose modules have these schemes."""
    kinds = sorted(set(schemes.values()))
    groups = {}
    for i, kind in enumerate(kinds):
        others = {_pattern(m) for m, k in schemes.items() if k != kind}
        ours = {m: _pattern(m) for m, k in schemes.items() if k == kind}
        targets = sorted({m if p in others else p for m, p in ours.items()})
        groups[f"group_{i}"] = _group(kind, group, targets if len(kinds) > 1 else ["Linear"])
    formats = [_FORMAT[kind] for kind in kinds]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*kept, "lm_head"} - schemes.keys()),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_FORMAT = {"int8": "int-quantized", "int4": "pack-quantized"}


def _group(kind: str, group: int, targets: list[str]) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True, "actorder": None, "block_structure": None}
    weights: dict[str, Any] = {**common, "num_bits": 8, "strategy": "channel", "group_size": None}
    if kind == "int4":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": group}
    tokens = {**common, "num_bits": 8, "strategy": "token", "group_size": None}
    return {
        "targets": targets,
        "weights": {**weights, "dynamic": False, "observer": "minmax", "observer_kwargs": {}},
        "input_activations": {**tokens, "dynamic": True, "observer": None, "observer_kwargs": {}}
        if kind == "int8"
        else None,
        "output_activations": None,
        "format": _FORMAT[kind],
    }


def _pattern(module: str) -> str:
    """The module in every layer and expert."""
    return "re:^" + re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(module)) + "$"


def copy_others(model: Path, folder: Path) -> None:
    """Tokenizer, generation config, card: every file that is neither weights nor config.json."""
    if gguf_of(model) is not None:
        write_tokenizer(model, folder)
        return
    for file in sorted(model.iterdir()):
        weights = file.name.endswith(_NOT_COPIED) or file.name == "config.json"
        if file.is_file() and not weights and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"only {free} bytes are free")
