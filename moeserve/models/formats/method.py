"""What ``quantization_config`` says about the tensors, checked; unknown methods are refused.

Exceptions (``ignore``, ``modules_to_not_convert``, ``dynamic``) are not read: a module that is
not quantised has a plain ``weight``, and says so itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moeserve.errors import CheckpointError
from moeserve.models.fields import Fields

COMPRESSED, FP8, GPTQ, AWQ, MXFP4 = "compressed-tensors", "fp8", "gptq", "awq", "mxfp4"
GGUF = "gguf"  # of no folder: what we say of such a file
METHODS = (COMPRESSED, FP8, GPTQ, AWQ, MXFP4, GGUF)
_FORMATS = (
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)
_REMEDY = "use a float32, float16 or bfloat16 copy of the model, or one of these methods"


@dataclass(frozen=True, slots=True)
class Method:
    """``name`` is "" for plain floats. ``groups`` are all group sizes the config mentions (a
    module has one of them), ``block`` is that of fp8 scales, and ``zeros_less_one`` says that
    GPTQ's zero points are stored less one."""

    name: str = ""
    groups: tuple[int, ...] = ()
    block: tuple[int, int] | None = None
    zeros_less_one: bool = False


def read_method(config: Fields) -> Method:
    """Raises for a method, format or version that no layout of ours reads."""
    for key, implied in (("quantization_config", ""), ("compression_config", COMPRESSED)):
        table = config.table(key)
        if table is None:
            continue
        name = table.text("quant_method", default=implied)
        if name not in METHODS:
            raise CheckpointError(
                f"{config.where}: {key} names the method {name or 'unnamed'!r}, which is not "
                f"supported; {_REMEDY}: {', '.join(METHODS)}"
            )
        return _READERS[name](table)
    return Method()


def _compressed(table: Fields) -> Method:
    groups = list(_tables(table, "config_groups"))
    for part in (table, *groups):
        part.only("format", *_FORMATS)
    sparsity = table.table("sparsity_config")
    if sparsity is not None:
        sparsity.only("format", "dense")
    transforms = table.table("transform_config")
    if transforms is not None and transforms.config.get("config_groups"):
        raise CheckpointError(f"{table.where}: transform_config is not supported; {_REMEDY}")
    weights = [w for group in groups if (w := group.table("weights")) is not None]
    blocks = {b for w in weights if (b := _block(w, "block_structure")) is not None}
    if len(blocks) > 1:
        raise CheckpointError(f"{table.where}: blocks of several sizes {sorted(blocks)}; {_REMEDY}")
    sizes = tuple(s for w in weights if (s := _group(w)) is not None)
    return Method(COMPRESSED, groups=sizes, block=next(iter(blocks), None))


def _fp8(table: Fields) -> Method:
    table.only("fmt", "e4m3", "float8_e4m3fn")
    return Method(FP8, block=_block(table, "weight_block_size"))


def _gptq(table: Fields) -> Method:
    table.only("checkpoint_format", "gptq", "gptq_v2")
    version = table.text("checkpoint_format", default="gptq")
    parts = [table, *_tables(table, "dynamic")]
    sizes = tuple(s for part in parts if (s := _group(part)) is not None)
    return Method(GPTQ, groups=sizes, zeros_less_one=version == "gptq")


def _awq(table: Fields) -> Method:
    table.only("bits", 4)
    if table.text("version", default="gemm").lower() != "gemm":
        raise table.wrong("version", table.config["version"], "'gemm', the order we can unpack")
    size = _group(table)
    return Method(AWQ, groups=() if size is None else (size,))


def _mxfp4(_: Fields) -> Method:
    return Method(MXFP4)


def _gguf(_: Fields) -> Method:
    return Method(GGUF)


_READERS = {
    COMPRESSED: _compressed, FP8: _fp8, GPTQ: _gptq, AWQ: _awq, MXFP4: _mxfp4, GGUF: _gguf,
}  # fmt: skip


def _tables(table: Fields, name: str) -> Iterator[Fields]:
    """The objects inside an object; others, such as an excluded module's ``{}``, are passed."""
    outer = table.table(name)
    for key, value in () if outer is None else outer.config.items():
        if isinstance(value, Mapping):
            yield Fields(value, f"{outer.where if outer else ''}: {key}")


def _group(table: Fields) -> int | None:
    """None where it is absent or -1: a whole row."""
    value = table.config.get("group_size")
    return None if value in (None, -1, 0) else table.size("group_size")


def _block(table: Fields, name: str) -> tuple[int, int] | None:
    value = table.config.get(name)
    if value is None:
        return None
    sizes = table.ids(name)
    if len(sizes) != 2 or min(sizes) < 1:
        raise table.wrong(name, value, "two sizes, such as [128, 128]")
    return sizes[0], sizes[1]
