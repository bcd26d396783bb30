"""What an inference of the Open Inference Protocol wants, as the service takes it.

Sampling parameters are named as in ``moeserve.v1``, or as vLLM names them where that differs, and
may be written as text, as Triton's clients do. They come as a JSON object in the tensor
``sampling_parameters``, or as parameters of the request. Whatever is wrong raises
InvalidRequestError or NotFoundError.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeserve.errors import InvalidRequestError, NotFoundError
from moeserve.gateway.grpc.tensors import OUTPUTS, Value, read_inputs
from moeserve.gateway.limits import BOUNDS, MAX_ID_CHARS, SWITCHES
from moeserve.gateway.service import ClientRequest
from moeserve.pb import grpc_predict_v2_pb2 as pb

VERSION = "1"
MAX_PARAMETERS_BYTES = 1 << 20
# Of the request's parameters, those that say how to serve it, and not how to sample.
_SERVING = frozenset(
    {"timeout", "priority", "triton_enable_empty_final_response", "binary_data_output"}
)
_RENAMED = {"include_stop_str_in_output": "include_stop"}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """``wanted`` of the service, and how to answer: ``prompts`` are put before their answers unless
    ``exclude_input``; ``outputs`` are the tensors asked for."""

    wanted: ClientRequest
    prompts: tuple[str, ...]
    stream: bool
    exclude_input: bool
    outputs: frozenset[str]
    raw: bool

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.wanted.n


def read_request(request: pb.ModelInferRequest, timeout_s: float | None) -> InferRequest:
    """``timeout_s`` is what the call has left; the request's own may be shorter."""
    require_version(request.model_name, request.model_version)
    inputs = read_inputs(request)
    prompts = tuple(_text("text_input", value) for value in inputs["text_input"])
    params = _sampling(request, inputs)
    n = BOUNDS["n"].check("n", params.pop("n", 1))
    stream = _flag(inputs, "stream")
    return InferRequest(
        wanted=ClientRequest(
            prompts=prompts,
            params=params,
            n=n,
            request_id=_own_id(request.id),
            model=request.model_name,
            timeout_s=_timeout(request, timeout_s),
        ),
        prompts=prompts,
        stream=stream,
        exclude_input=_excluded(inputs, stream),
        outputs=_outputs(request, inputs),
        raw=bool(request.raw_input_contents),
    )


def require_version(model: str, version: str) -> None:
    if version not in ("", VERSION):
        raise NotFoundError(
            f"model {model!a:.100} has version {VERSION}, not {version!a:.60}",
            param="model_version",
        )


def _own_id(given: str) -> str:
    """The client's, which need not be unique, and something that makes it so."""
    own = secrets.token_hex(8)
    fits = len(given) + len(own) < MAX_ID_CHARS and all(" " < char <= "~" for char in given)
    return f"{given or 'infer'}-{own}" if fits else f"infer-{own}"


def _timeout(request: pb.ModelInferRequest, left_s: float | None) -> float | None:
    given = request.parameters.get("timeout")
    if given is None or given.WhichOneof("parameter_choice") not in ("int64_param", "uint64_param"):
        return left_s
    own_s = (given.int64_param or given.uint64_param) / 1e6
    return own_s if left_s is None else min(own_s, left_s)


def _excluded(inputs: Mapping[str, Sequence[Value]], stream: bool) -> bool:
    if "exclude_input_in_output" not in inputs:
        return stream
    excluded = _flag(inputs, "exclude_input_in_output")
    if stream and not excluded:
        raise InvalidRequestError(
            "exclude_input_in_output=false: a stream has no place for the prompt",
            param="exclude_input_in_output",
        )
    return excluded


def _outputs(
    request: pb.ModelInferRequest, inputs: Mapping[str, Sequence[Value]]
) -> frozenset[str]:
    """Those asked for by name, or else the text; and those that a ``return_...`` asks for."""
    named = [tensor.name for tensor in request.outputs]
    known = {spec.name for spec in OUTPUTS}
    for name in named:
        if name not in known:
            raise InvalidRequestError(
                f"output {name!a:.60} is none of {', '.join(sorted(known))}", param=name[:60]
            )
    flagged = {name for name in known if _flag(inputs, f"return_{name}")}
    return frozenset(named or ["text_output"]) | flagged


def _flag(inputs: Mapping[str, Sequence[Value]], name: str) -> bool:
    return bool(inputs[name][0]) if name in inputs else False


def _text(name: str, value: Value) -> str:
    assert isinstance(value, bytes), name
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name}: not UTF-8 at byte {error.start}", param=name) from error


def _sampling(
    request: pb.ModelInferRequest, inputs: Mapping[str, Sequence[Value]]
) -> dict[str, object]:
    if "sampling_parameters" in inputs:
        given = _json_object(_text("sampling_parameters", inputs["sampling_parameters"][0]))
    else:
        given = {
            name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
            for name, value in request.parameters.items()
            if name not in _SERVING
        }
    return {
        _RENAMED.get(name, name): _typed(_RENAMED.get(name, name), value)
        for name, value in given.items()
        if value is not None
    }


def _json_object(text: str) -> dict[str, object]:
    if len(text) > MAX_PARAMETERS_BYTES:
        raise InvalidRequestError(
            f"sampling_parameters has {len(text)} characters, at most {MAX_PARAMETERS_BYTES}",
            param="sampling_parameters",
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"sampling_parameters: not JSON: {error}", param="sampling_parameters"
        ) from error
    if not isinstance(found, dict):
        raise InvalidRequestError(
            "sampling_parameters: expected a JSON object", param="sampling_parameters"
        )
    return found


def _typed(name: str, value: object) -> object:
    """Numbers and switches that are written as text; vLLM's -1 for every token."""
    if isinstance(value, str):
        if name in BOUNDS:
            value = _number(name, value)
        elif name in SWITCHES and value.lower() in ("true", "false"):
            value = value.lower() == "true"
    return 0 if name == "top_k" and value == -1 else value


def _number(name: str, text: str) -> int | float:
    try:
        return int(text[:40]) if BOUNDS[name].integer else float(text[:40])
    except ValueError as error:
        raise InvalidRequestError(f"{name}={text!a:.40}: not a number", param=name) from error
