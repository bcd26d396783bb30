"""The tensors of the Open Inference Protocol that a language model has, in messages and as values.

Datatypes are the protocol's: BYTES, BOOL and UINT32. A tensor's elements come typed in its
``contents``, or raw: little-endian, BYTES behind their length in four bytes. Wrong ones raise
InvalidRequestError, which names the tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeserve.errors import InvalidRequestError
from moeserve.pb import grpc_predict_v2_pb2 as pb

Value = bytes | bool
Output = bytes | int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``shape`` -1 is any length. Inputs that are ``optional`` may be left out, outputs that are so
    come where an input ``return_...`` asks for them."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)
    optional: bool = False


INPUTS = (
    TensorSpec("text_input", "BYTES", (-1,)),
    TensorSpec("stream", "BOOL", optional=True),
    TensorSpec("sampling_parameters", "BYTES", optional=True),
    TensorSpec("exclude_input_in_output", "BOOL", optional=True),
    TensorSpec("return_finish_reason", "BOOL", optional=True),
    TensorSpec("return_num_input_tokens", "BOOL", optional=True),
    TensorSpec("return_num_output_tokens", "BOOL", optional=True),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,), optional=True),
    TensorSpec("num_input_tokens", "UINT32", optional=True),
    TensorSpec("num_output_tokens", "UINT32", (-1,), optional=True),
)
_KNOWN_INPUTS: Mapping[str, TensorSpec] = {spec.name: spec for spec in INPUTS}
_DATATYPES: Mapping[str, str] = {spec.name: spec.datatype for spec in OUTPUTS}


def read_inputs(request: pb.ModelInferRequest) -> dict[str, list[Value]]:
    """The elements of each input, by name."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequestError(
            f"{len(raw)} raw contents for {len(request.inputs)} inputs: give one for each, or none",
            param="raw_input_contents",
        )
    found: dict[str, list[Value]] = {}
    for i, tensor in enumerate(request.inputs):
        spec = _KNOWN_INPUTS.get(tensor.name)
        if spec is None:
            raise InvalidRequestError(
                f"input {tensor.name!a:.60} is none of {', '.join(_KNOWN_INPUTS)}",
                param=tensor.name[:60],
            )
        if tensor.name in found:
            raise InvalidRequestError(f"input {tensor.name} is given twice", param=tensor.name)
        if tensor.datatype != spec.datatype:
            raise InvalidRequestError(
                f"input {tensor.name} is {tensor.datatype!a:.20}, expected {spec.datatype}",
                param=tensor.name,
            )
        if raw and tensor.HasField("contents"):
            raise InvalidRequestError(
                f"input {tensor.name} has contents beside raw ones: give either",
                param=tensor.name,
            )
        values = _raw_values(spec, raw[i]) if raw else _typed_values(spec, tensor.contents)
        _require_shape(spec, tensor.shape, len(values))
        found[tensor.name] = values
    for spec in INPUTS:
        if not spec.optional and spec.name not in found:
            raise InvalidRequestError(f"input {spec.name} is missing", param=spec.name)
    return found


def _typed_values(spec: TensorSpec, contents: pb.InferTensorContents) -> list[Value]:
    if spec.datatype == "BOOL":
        return list(contents.bool_contents)
    return list(contents.bytes_contents)


def _raw_values(spec: TensorSpec, raw: bytes) -> list[Value]:
    if spec.datatype == "BOOL":
        return [byte != 0 for byte in raw]
    values: list[Value] = []
    at = 0
    while at < len(raw):
        if len(raw) - at < 4:
            raise _cut_off(spec)
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if len(raw) - at < size:
            raise _cut_off(spec)
        values.append(raw[at : at + size])
        at += size
    return values


def _cut_off(spec: TensorSpec) -> InvalidRequestError:
    return InvalidRequestError(
        f"input {spec.name}: its raw bytes end within an element; each needs its length in four "
        "bytes before it",
        param=spec.name,
    )


def _require_shape(spec: TensorSpec, shape: Sequence[int], count: int) -> None:
    """Dimensions of one element more or less are alike: clients differ in them."""
    if any(size < 0 for size in shape) or math.prod(shape) != count:
        raise InvalidRequestError(
            f"input {spec.name} has {count} elements, which is not its shape {list(shape)!s:.60}",
            param=spec.name,
        )
    if count < 1 or (spec.shape == (1,) and count != 1):
        expected = "one element" if spec.shape == (1,) else "at least one element"
        raise InvalidRequestError(
            f"input {spec.name} has {count} elements, expected {expected}", param=spec.name
        )


def write_outputs(
    response: pb.ModelInferResponse, outputs: Mapping[str, Sequence[Output]], *, raw: bool
) -> None:
    """Adds each of ``outputs``, by name, as a vector."""
    for name, values in outputs.items():
        tensor = response.outputs.add(name=name, datatype=_DATATYPES[name], shape=[len(values)])
        if raw:
            response.raw_output_contents.append(b"".join(map(_raw_of, values)))
        elif tensor.datatype == "BYTES":
            tensor.contents.bytes_contents.extend(v for v in values if isinstance(v, bytes))
        else:
            tensor.contents.uint_contents.extend(v for v in values if isinstance(v, int))


def _raw_of(value: Output) -> bytes:
    if isinstance(value, bytes):
        return struct.pack("<I", len(value)) + value
    return struct.pack("<I", value)
