"""KServe's inference protocol, with Triton's stream: the answers are those of the other doors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import InvalidRequestError
from moeserve.gateway.grpc.infer_request import read_request
from moeserve.gateway.grpc.kserve import KSERVE_SERVICE, MAX_INFLIGHT
from moeserve.gateway.grpc.tensors import read_inputs, write_outputs
from moeserve.pb import grpc_predict_v2_pb2 as pb
from moeserve.pb.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from conftest import House

TEXT = "Hello there"
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def kserve(house: House) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(house.channel)


def inference(*texts: str, name: str = "", model: str = "tiny", **inputs: Any) -> Any:
    """A request as Triton's clients make it, with raw contents. ``inputs`` are switches, and the
    object of sampling parameters."""
    request = pb.ModelInferRequest(model_name=model, id=name)

    def add(tensor: str, datatype: str, values: list[bytes]) -> None:
        request.inputs.add(name=tensor, datatype=datatype, shape=[len(values)])
        sized = (struct.pack("<I", len(v)) + v if datatype == "BYTES" else v for v in values)
        request.raw_input_contents.append(b"".join(sized))

    if texts:
        add("text_input", "BYTES", [text.encode() for text in texts])
    for tensor, value in inputs.items():
        if isinstance(value, dict):
            add(tensor, "BYTES", [json.dumps(value).encode()])
        else:
            add(tensor, "BOOL", [bytes([value])])
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, list[bytes | int]]:
    """Elements by tensor, from raw contents."""
    found: dict[str, list[bytes | int]] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        values: list[bytes | int] = []
        at = 0
        while at < len(raw):
            (number,) = struct.unpack_from("<I", raw, at)
            at += 4
            if tensor.datatype == "BYTES":
                values.append(raw[at : at + number])
                at += number
            else:
                values.append(number)
        assert list(tensor.shape) == [len(values)]
        found[tensor.name] = values
    return found


def plain(house: House, text: str, **params: Any) -> str:
    """The answer of the HTTP door."""
    body = {"prompt": text, **GREEDY, **params}
    return str(house.http.post("/v1/completions", json=body).json()["choices"][0]["text"])


def refused(call: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=60)
    return caught.value.code(), caught.value.details()


def test_an_inference_equals_a_completion(house: House, kserve: GRPCInferenceServiceStub) -> None:
    expected = plain(house, TEXT)
    request = inference(
        TEXT,
        name="seven",
        sampling_parameters=GREEDY,
        exclude_input_in_output=True,
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    response = kserve.ModelInfer(request, timeout=60)
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "seven")
    assert outputs_of(response) == {
        "text_output": [expected.encode()],
        "finish_reason": [b"length"],
        "num_input_tokens": [
            len(house.http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"])
        ],
        "num_output_tokens": [6],
    }
    whole = kserve.ModelInfer(inference(TEXT, sampling_parameters=GREEDY), timeout=60)
    assert outputs_of(whole) == {"text_output": [(TEXT + expected).encode()]}


def test_typed_contents_are_answered_in_kind(
    house: House, kserve: GRPCInferenceServiceStub
) -> None:
    request = pb.ModelInferRequest(model_name="tiny")
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    text.contents.bytes_contents.append(TEXT.encode())
    no_echo = request.inputs.add(name="exclude_input_in_output", datatype="BOOL", shape=[1])
    no_echo.contents.bool_contents.append(True)
    # As Triton's samples write them: parameters of the request, numbers as text.
    for name, value in (("temperature", "0"), ("max_tokens", "6"), ("ignore_eos", "true")):
        request.parameters[name].string_param = value
    request.parameters["top_k"].int64_param = -1
    response = kserve.ModelInfer(request, timeout=60)
    assert not response.raw_output_contents
    assert list(response.outputs[0].contents.bytes_contents) == [plain(house, TEXT).encode()]


def test_prompts_and_sequences_are_elements_of_one_tensor(
    house: House, kserve: GRPCInferenceServiceStub
) -> None:
    request = inference(
        "One", "Two", sampling_parameters={**GREEDY, "n": 2}, exclude_input_in_output=True
    )
    found = outputs_of(kserve.ModelInfer(request, timeout=60))["text_output"]
    one, two = plain(house, "One").encode(), plain(house, "Two").encode()
    assert found == [one, one, two, two]


def test_a_stream_joins_to_the_whole_and_tells_its_end(
    house: House, kserve: GRPCInferenceServiceStub
) -> None:
    request = inference(
        TEXT,
        name="s",
        stream=True,
        sampling_parameters=GREEDY,
        return_finish_reason=True,
        return_num_output_tokens=True,
    )
    answers = list(kserve.ModelStreamInfer(iter([request]), timeout=60))
    assert all(a.error_message == "" and a.infer_response.id == "s" for a in answers)
    parts = [outputs_of(a.infer_response) for a in answers]
    assert b"".join(p["text_output"][0] for p in parts).decode() == plain(house, TEXT)
    assert sum(p["num_output_tokens"][0] for p in parts) == 6
    assert [p["finish_reason"][0] for p in parts] == [b""] * (len(parts) - 1) + [b"length"]
    finals = [a.infer_response.parameters["triton_final_response"].bool_param for a in answers]
    assert finals == [False] * (len(parts) - 1) + [True]


def test_an_error_in_a_stream_is_an_answer_and_the_stream_goes_on(
    house: House, kserve: GRPCInferenceServiceStub
) -> None:
    requests = [
        inference(TEXT, name="wrong", sampling_parameters={"temperature": 9}),
        inference(TEXT, name="elsewhere", model="other"),
        inference(name="empty"),
        inference(TEXT, name="right", sampling_parameters=GREEDY, exclude_input_in_output=True),
    ]
    answers = {a.infer_response.id: a for a in kserve.ModelStreamInfer(iter(requests), timeout=60)}
    assert answers.keys() == {"wrong", "elsewhere", "empty", "right"}
    assert answers["wrong"].error_message.startswith("INVALID_ARGUMENT: temperature=9")
    assert answers["elsewhere"].error_message.startswith("NOT_FOUND: model 'other'")
    assert answers["empty"].error_message == "INVALID_ARGUMENT: input text_input is missing"
    assert all(
        a.infer_response.parameters["triton_final_response"].bool_param for a in answers.values()
    )
    right = outputs_of(answers["right"].infer_response)
    assert right == {"text_output": [plain(house, TEXT).encode()]}


def test_more_inferences_than_run_side_by_side_are_all_answered(
    kserve: GRPCInferenceServiceStub,
) -> None:
    count = MAX_INFLIGHT + 20
    requests = (
        inference(TEXT, name=str(i), stream=True, sampling_parameters={**GREEDY, "max_tokens": 2})
        for i in range(count)
    )
    ended = [
        a.infer_response.id
        for a in kserve.ModelStreamInfer(requests, timeout=60)
        if a.infer_response.parameters["triton_final_response"].bool_param
    ]
    assert sorted(ended, key=int) == [str(i) for i in range(count)]


def test_a_stream_that_is_cancelled_leaves_nothing_running(
    house: House, kserve: GRPCInferenceServiceStub
) -> None:
    long = {**GREEDY, "max_tokens": 400}
    requests = [inference(TEXT, stream=True, sampling_parameters=long) for _ in range(3)]
    call = kserve.ModelStreamInfer(iter(requests), timeout=60)
    next(iter(call))
    call.cancel()
    house.eventually(house.all_free, "every block is free")
    house.eventually(lambda: house.on_loop(lambda: house.server.service.running) == 0, "no stream")


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (inference(TEXT, model="other"), "NOT_FOUND", "is not served here"),
        (inference(TEXT, stream=True), "INVALID_ARGUMENT", "use ModelStreamInfer"),
        (inference(), "INVALID_ARGUMENT", "text_input is missing"),
        (inference(""), "INVALID_ARGUMENT", "prompt is empty"),
        (inference(TEXT, image=True), "INVALID_ARGUMENT", "input 'image' is none of"),
        (inference(TEXT, text_input=True), "INVALID_ARGUMENT", "given twice"),
        (inference(TEXT, sampling_parameters=True), "INVALID_ARGUMENT", "expected BYTES"),
        (inference(TEXT, sampling_parameters={"n": 99}), "INVALID_ARGUMENT", "n=99"),
        (inference(TEXT, sampling_parameters={"beams": 2}), "INVALID_ARGUMENT", "beams"),
        (inference(TEXT, sampling_parameters={"top_p": "x"}), "INVALID_ARGUMENT", "top_p='x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_refused_with_its_status(
    kserve: GRPCInferenceServiceStub, request_: Any, code: str, says: str
) -> None:
    status, details = refused(kserve.ModelInfer, request_)
    assert (status.name, says in details) == (code, True), details


def test_a_version_that_is_not_there_is_not_found(kserve: GRPCInferenceServiceStub) -> None:
    request = inference(TEXT)
    request.model_version = "2"
    assert refused(kserve.ModelInfer, request)[0] is grpc.StatusCode.NOT_FOUND


def test_server_and_model_describe_themselves(kserve: GRPCInferenceServiceStub) -> None:
    assert kserve.ServerLive(pb.ServerLiveRequest(), timeout=60).live
    assert kserve.ServerReady(pb.ServerReadyRequest(), timeout=60).ready
    assert kserve.ModelReady(pb.ModelReadyRequest(name="tiny"), timeout=60).ready
    assert not kserve.ModelReady(pb.ModelReadyRequest(name="other"), timeout=60).ready
    metadata = kserve.ModelMetadata(pb.ModelMetadataRequest(name="tiny"), timeout=60)
    described = [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs]
    assert described[:2] == [("text_input", "BYTES", [-1]), ("stream", "BOOL", [1])]
    config = kserve.ModelConfig(pb.ModelConfigRequest(name="tiny"), timeout=60).config
    assert config.model_transaction_policy.decoupled
    assert [i.name for i in config.input] == [t.name for t in metadata.inputs]
    assert [o.name for o in config.output] == [t.name for t in metadata.outputs]
    index = kserve.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=60)
    assert [(m.name, m.state) for m in index.models] == [("tiny", "READY")]
    for call, request in (
        (kserve.ModelMetadata, pb.ModelMetadataRequest(name="other")),
        (kserve.ModelConfig, pb.ModelConfigRequest(name="other")),
    ):
        assert refused(call, request)[0] is grpc.StatusCode.NOT_FOUND


def test_health_and_reflection_know_the_service(house: House) -> None:
    health = health_pb2_grpc.HealthStub(house.channel)
    for name in ("", "moeserve.v1.Inference", KSERVE_SERVICE):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(house.channel)

    def asked() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=KSERVE_SERVICE)

    listed, described = reflection.ServerReflectionInfo(asked(), timeout=60)
    assert KSERVE_SERVICE in {s.name for s in listed.list_services_response.service}
    assert len(described.file_descriptor_response.file_descriptor_proto) == 1


def test_numbers_are_the_specification_s() -> None:
    def numbers(message: Any) -> Iterable[tuple[str, int]]:
        return [(f.name, f.number) for f in message.DESCRIPTOR.fields]

    assert numbers(pb.ModelInferRequest) == list(
        zip(
            "model_name model_version id parameters inputs outputs raw_input_contents".split(),
            range(1, 8),
            strict=True,
        )
    )
    assert numbers(pb.ModelStreamInferResponse) == [("error_message", 1), ("infer_response", 2)]
    assert dict(numbers(pb.ModelConfig))["model_transaction_policy"] == 19


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=5), st.booleans())
def test_elements_survive_both_ways_of_writing(values: list[bytes], raw: bool) -> None:
    answer = pb.ModelInferResponse()
    write_outputs(answer, {"text_output": values}, raw=raw)
    request = pb.ModelInferRequest(raw_input_contents=answer.raw_output_contents)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(values)])
    if not raw:
        tensor.contents.bytes_contents.extend(answer.outputs[0].contents.bytes_contents)
    assert read_inputs(request) == {"text_input": values}


tensor_names = st.sampled_from(["text_input", "stream", "sampling_parameters", "other"])
tensors = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=tensor_names,
    datatype=st.sampled_from(["BYTES", "BOOL", "FP32", ""]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    contents=st.none()
    | st.builds(
        pb.InferTensorContents,
        bool_contents=st.lists(st.booleans(), max_size=2),
        bytes_contents=st.lists(st.binary(max_size=4) | st.just(b'{"n": "x"}'), max_size=2),
    ),
)


@given(
    st.builds(
        pb.ModelInferRequest,
        inputs=st.lists(tensors, max_size=3),
        raw_input_contents=st.lists(st.binary(max_size=12), max_size=3),
        id=st.text(max_size=140),
    )
)
def test_no_message_raises_anything_but_our_errors(request_: pb.ModelInferRequest) -> None:
    try:
        asked = read_request(request_, None)
    except InvalidRequestError:
        return
    assert asked.prompts
    assert len(asked.wanted.request_id) <= 128
