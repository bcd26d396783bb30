"""Typed reads of a GGUF file's metadata, and which tensors stand beside it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moeserve.errors import CheckpointError
from moeserve.models.fields import Fields
from moeserve.models.gguf.header import GgufHeader, GgufTensor

ARCHITECTURE = "general.architecture"
MOST_LAYERS = 4096


class Metadata:
    """Of all files of a model, the first of which has the keys. Errors name ``file``."""

    def __init__(self, headers: Sequence[GgufHeader]) -> None:
        self.file: Path = headers[0].file
        self.fields = Fields(headers[0].values, str(self.file))
        self.architecture = self.fields.text(ARCHITECTURE, default="")
        self.tensors: Mapping[str, GgufTensor] = {
            name: tensor for header in headers for name, tensor in header.tensors.items()
        }

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self.fields.config.get(self.key(name)) is not None

    def size(self, name: str) -> int:
        return self.fields.size(self.key(name))

    def layers(self) -> int:
        """With those beyond the last, of modules that predict another token."""
        return self.fields.size(self.key("block_count"), most=MOST_LAYERS)

    def count(self, name: str, default: int) -> int:
        return self.fields.count(self.key(name), default=default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.fields.number(self.key(name), default=default)

    def flag(self, name: str) -> bool:
        return self.fields.flag(self.key(name), default=False)

    def text(self, name: str, default: str) -> str:
        return self.fields.text(self.key(name), default=default)

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.file}: tensor {name} is missing; download it again")
        return self.tensors[name]

    def some_layer_has(self, part: str) -> bool:
        return any(name.startswith("blk.") and name.endswith(part) for name in self.tensors)

    def only(self, neutral: Mapping[str, Iterable[object]]) -> None:
        """CheckpointError where a key is there with another value than these."""
        for name, allowed in neutral.items():
            value = self.fields.config.get(self.key(name))
            if value is not None and value not in allowed:
                raise CheckpointError(
                    f"{self.file}: {self.key(name)}={value!r} is not supported: use the model's "
                    f"safetensors"
                )
