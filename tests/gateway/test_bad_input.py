"""Each wrong request gets the right code through both doors, and the server goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

BAD = grpc.StatusCode.INVALID_ARGUMENT
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _goes_on(house: House) -> Iterator[None]:
    """Whatever was sent, the next request is served."""
    yield
    assert len(house.tokens([72, 105], 2, ignore_eos=True)) == 2


def refused_by_grpc(house: House, code: grpc.StatusCode, says: str, **request: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.GenerateUnary(pb.GenerateRequest(**request), timeout=60)
    assert caught.value.code() is code, caught.value.details()
    assert says in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught_stream:
        list(house.stub.Generate(pb.GenerateRequest(**request), timeout=60))
    assert caught_stream.value.code() is code
    return str(caught.value.details())


def refused_by_http(
    house: House, status: int, says: str, path: str = "/v1/completions", **body: Any
) -> dict[str, Any]:
    answer = house.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    if "stream" not in body:
        streamed = house.http.post(path, json=body | {"stream": True})
        assert streamed.status_code == status
    return error


IDS = [72, 105]
# Field, value as gRPC spells it, value as HTTP spells it.
PARAMS: list[tuple[str, Any, Any]] = [
    ("temperature", -0.1, -0.1),
    ("temperature", 2.01, 2.01),
    ("temperature", NAN, "NaN"),
    ("temperature", INF, 1e400),
    ("top_p", 0.0, 0),
    ("top_p", 1.01, 1.01),
    ("top_p", NAN, [1]),
    ("min_p", -0.5, -0.5),
    ("min_p", 1.5, 1.5),
    ("top_k", 2**32 - 1, -1),
    ("repetition_penalty", 0.0, 0.0),
    ("repetition_penalty", 5e-324, 5e-324),
    ("repetition_penalty", 2.5, 2.5),
    ("presence_penalty", -2.5, -2.5),
    ("frequency_penalty", 1e30, 1e30),
    ("max_tokens", 0, 0),
    ("max_tokens", 513, -5),
    ("max_tokens", 2**32 - 1, 10**40),
    ("min_tokens", 17, 17),
    ("seed", 2**63, -1),
    ("seed", 2**64 - 1, 10**30),
    ("stop", [""], [""]),
    ("stop", ["x" * 257], "x" * 257),
    ("stop", ["x"] * 17, ["x"] * 17),
    ("stop_token_ids", [320], [320]),
    ("stop_token_ids", [1] * 65, [1] * 65),
    ("logit_bias", {320: 1.0}, {"320": 1.0}),
    ("logit_bias", {1: NAN}, {"one": 1}),
    ("logit_bias", {1: 101.0}, {"1": 101}),
    ("logprobs", 21, 21),
]


def test_parameters_out_of_bounds(house: House) -> None:
    for name, by_grpc, by_http in PARAMS:
        sampling = pb.SamplingParams(**{name: by_grpc})
        says = refused_by_grpc(house, BAD, name, token_ids=pb.TokenIds(ids=IDS), sampling=sampling)
        assert len(says) < 300
        if by_http == 1e400:  # JSON as text: httpx would refuse to write it
            raw = house.http.post(
                "/v1/completions",
                content=b'{"prompt": [72], "%s": 1e400}' % name.encode(),
                headers={"content-type": "application/json"},
            )
            assert raw.status_code == 400
            assert raw.json()["error"]["param"] == name
            continue
        error = refused_by_http(house, 400, name, prompt=IDS, **{name: by_http})
        assert error["param"] == name
        assert error["type"] == "invalid_request_error"


def test_too_many_sequences(house: House) -> None:
    for n in (17, 2**32 - 1):
        says = f"n={n}: expected an integer from 1 up to 16"
        refused_by_grpc(house, BAD, says, text="hi", n=n)
        refused_by_http(house, 400, f"n={n}", prompt="hi", n=n)


def test_n_that_is_no_count(house: House) -> None:
    for n in (0, -1, 1.5, "2", True):
        assert refused_by_http(house, 400, "n=", prompt="hi", n=n)["param"] == "n", n


def test_empty_prompts(house: House) -> None:
    refused_by_grpc(house, BAD, "empty", text="")
    refused_by_grpc(house, BAD, "empty", token_ids=pb.TokenIds())
    refused_by_grpc(house, BAD, "missing")
    for prompt in ("", [], [[]], ["hi", ""]):
        assert refused_by_http(house, 400, "empty", prompt=prompt)["param"] == "prompt"
    refused_by_http(house, 400, "missing")
    refused_by_http(house, 400, "messages", path="/v1/chat/completions", messages=[])


def test_prompts_over_the_limit_name_both_numbers(house: House) -> None:
    ids = [1] * 600
    says = refused_by_grpc(house, BAD, "600", token_ids=pb.TokenIds(ids=ids))
    assert "512" in says
    refused_by_http(house, 400, "600 tokens, but the model holds 512", prompt=ids)
    text = "x" * 2000
    assert "512" in refused_by_grpc(house, BAD, "2000 tokens", text=text)
    chat = [{"role": "user", "content": text}]
    refused_by_http(house, 400, "512", path="/v1/chat/completions", messages=chat)
    huge = "x" * (4 * 2**20 + 1)
    refused_by_grpc(house, BAD, "4194305 bytes, at most 4194304", text=huge)


def test_prompt_and_answer_that_do_not_fit_together(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=500)
    ids = [1] * 100
    refused_by_grpc(
        house, BAD, "ask for at most 412", token_ids=pb.TokenIds(ids=ids), sampling=sampling
    )
    refused_by_http(house, 400, "ask for at most 412", prompt=ids, max_tokens=500)


def test_token_ids_outside_the_vocabulary(house: House) -> None:
    refused_by_grpc(house, BAD, "320 is no token id", token_ids=pb.TokenIds(ids=[1, 320]))
    for bad in ([1, 320], [1, -1], [[1, 2.5]], [[1, True]], [10**50]):
        refused_by_http(house, 400, "no token id", prompt=bad)


def test_unknown_models_are_not_found(house: House) -> None:
    missing = grpc.StatusCode.NOT_FOUND
    refused_by_grpc(house, missing, "'other' is not served here", text="hi", model="other")
    error = refused_by_http(house, 404, "'tiny' is", prompt="hi", model="other")
    assert error["param"] == "model"


def test_labels_that_are_too_long(house: House) -> None:
    for name, value in (
        ("cache_salt", "s" * 129),
        ("domain", "d" * 65),
        ("request_id", "r" * 129),
        ("request_id", "a b"),
        ("request_id", "é"),
    ):
        refused_by_grpc(house, BAD, name, text="hi", **{name: value})
        assert refused_by_http(house, 400, name, prompt="hi", **{name: value})["param"] == name


def stream_whole(call: Callable[..., Any], raw: bytes, timeout: float) -> list[Any]:
    return list(call(raw, timeout=timeout))


def test_bytes_that_are_no_message_or_no_utf8(house: House) -> None:
    broken_text = {"Abort": b"\x0a\x02\xff\xfe", "Tokenize": b"\x12\x02\xff\xfe"}
    for method in ("Generate", "GenerateUnary", "Tokenize", "Abort"):
        path = f"/moeserve.v1.Inference/{method}"
        for raw in (b"\xff\xff\xff\xff", broken_text.get(method, b"\x1a\x02\xff\xfe")):
            call = house.channel.unary_unary(path)
            if method == "Generate":
                call = functools.partial(stream_whole, house.channel.unary_stream(path))
            with pytest.raises(grpc.RpcError) as caught:
                call(raw, timeout=60)
            assert caught.value.code() is BAD, method
            assert "UTF-8" in caught.value.details(), method


RAW_BODIES = {
    "nothing": b"",
    "half an object": b'{"prompt": "hi"',
    "a trailing comma": b'{"prompt": "hi",}',
    "NaN": b'{"prompt": "hi", "temperature": NaN}',
    "infinity": b'{"prompt": "hi", "temperature": -Infinity}',
    "a list": b'["hi"]',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "deep nesting": b"[" * 100_000,
    "a number of 5000 digits": b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a lone surrogate in a stop": b'{"prompt": "hi", "stop": "\\ud800"}',
    "a lone surrogate in the model": b'{"prompt": "hi", "model": "\\ud800"}',
    "a lone surrogate in a field": b'{"prompt": "hi", "\\ud800": 1}',
}


def test_bodies_that_are_no_request(house: House) -> None:
    for what, body in RAW_BODIES.items():
        answer = house.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, what
        assert answer.json()["error"]["message"], what


def test_bodies_over_the_limit_and_of_other_types(house: House) -> None:
    json_type = {"content-type": "application/json"}
    long = house.http.post("/tokenize", content=b" " * (16 * 2**20 + 1), headers=json_type)
    assert long.status_code == 413
    assert "16777216" in long.json()["error"]["message"]
    form = house.http.post("/v1/completions", data={"prompt": "hi"})
    assert form.status_code == 415
    assert "application/json" in form.json()["error"]["message"]


def test_unknown_routes_and_wrong_methods_have_the_same_shape(house: House) -> None:
    lost = house.http.get("/v1/nothing")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
    wrong = house.http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "POST" in wrong.json()["error"]["message"]


UNSUPPORTED: list[tuple[str, Any]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"),
    ("suffix", "end"),
    ("use_beam_search", True),
    ("length_penalty", 0.5),
    ("logits_processors", ["x"]),
    ("prompt_embeds", "AAAA"),
]


def test_known_but_unsupported_fields_are_refused_by_name(house: House) -> None:
    paths: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    }
    for name, value in UNSUPPORTED:
        for path, prompt in paths.items():
            body = prompt | {name: value}
            error = refused_by_http(house, 400, "not supported", path=path, **body)
            assert error["param"] == name


MESSAGES: list[Any] = [
    "hi",
    [1],
    [{"role": "king", "content": "hi"}],
    [{"role": "user"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
    [{"role": "user", "content": "hi"}] * 1025,
]


def test_messages_that_are_none(house: House) -> None:
    path = "/v1/chat/completions"
    for messages in MESSAGES:
        error = refused_by_http(house, 400, "messages", path=path, messages=messages)
        assert error["param"] == "messages", str(messages)[:40]


def test_chat_fields_that_disagree(house: House) -> None:
    hello = [{"role": "user", "content": "hi"}]
    path = "/v1/chat/completions"
    refused_by_http(house, 400, "logprobs: true", path=path, messages=hello, top_logprobs=2)
    refused_by_http(
        house,
        400,
        "differs from max_tokens",
        path=path,
        messages=hello,
        max_tokens=4,
        max_completion_tokens=5,
    )
    refused_by_http(
        house,
        400,
        "cannot be set",
        path=path,
        messages=hello,
        chat_template_kwargs={"messages": []},
    )


def test_detokenize_and_tokenize_refuse_nonsense(house: House) -> None:
    for body in ({}, {"tokens": [320]}, {"tokens": "x"}, {"tokens": [1] * 600}):
        answer = house.http.post("/detokenize", json=body)
        assert answer.status_code == 400
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": 5}):
        answer = house.http.post("/tokenize", json=body)
        assert answer.status_code == 400
