"""A plain grpcio client over a real socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

PROMPT = pb.TokenIds(ids=[72, 101, 108, 108, 111])
GREEDY = pb.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def test_a_stream_joins_to_the_unary_answer(house: House) -> None:
    request = pb.GenerateRequest(token_ids=PROMPT, sampling=GREEDY)
    chunks = list(house.stub.Generate(request, timeout=60))
    answer = house.stub.GenerateUnary(request, timeout=60)
    assert len(answer.outputs) == 1
    assert [t for c in chunks for t in c.token_ids] == list(answer.outputs[0].token_ids)
    assert "".join(c.text_delta for c in chunks) == answer.outputs[0].text


def test_the_text_is_that_of_prompt_and_tokens_together(house: House) -> None:
    prompt = house.stub.Tokenize(pb.TokenizeRequest(text="Hello there"), timeout=60).token_ids
    request = pb.GenerateRequest(text="Hello there", sampling=GREEDY)
    chunks = list(house.stub.Generate(request, timeout=60))
    ids = [*prompt, *(t for c in chunks for t in c.token_ids)]
    whole = house.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=60).text
    assert whole == "Hello there" + "".join(c.text_delta for c in chunks)


def test_the_last_chunk_tells_why_how_much_and_how_long(house: House) -> None:
    request = pb.GenerateRequest(token_ids=PROMPT, sampling=GREEDY)
    *before, last = house.stub.Generate(request, timeout=60)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 12)
    assert 0 < last.timing.ttft_s <= last.timing.total_s
    assert not any(c.finish_reason or c.HasField("usage") for c in before)


def test_text_and_its_token_ids_ask_the_same(house: House) -> None:
    ids = house.stub.Tokenize(pb.TokenizeRequest(text="Hello there"), timeout=60).token_ids
    by_text = pb.GenerateRequest(text="Hello there", sampling=GREEDY)
    by_ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=GREEDY)
    answers = [house.stub.GenerateUnary(r, timeout=60).outputs[0] for r in (by_text, by_ids)]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].usage.prompt_tokens == len(ids)


def test_n_sequences_share_the_prompt_and_differ_by_seed(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=12, temperature=2, seed=7, ignore_eos=True)
    three = house.stub.GenerateUnary(
        pb.GenerateRequest(token_ids=PROMPT, sampling=sampling, n=3), timeout=60
    )
    one = house.stub.GenerateUnary(
        pb.GenerateRequest(token_ids=PROMPT, sampling=sampling), timeout=60
    )
    texts = [tuple(o.token_ids) for o in three.outputs]
    assert [o.index for o in three.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == tuple(one.outputs[0].token_ids)


def test_unseeded_requests_are_not_all_the_same(house: House) -> None:
    found = {tuple(house.tokens([72, 105], 16, temperature=2, ignore_eos=True)) for _ in range(4)}
    assert len(found) > 1


def test_logprobs_come_one_per_token_and_best_first(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=6, temperature=0, logprobs=3, ignore_eos=True)
    answer = house.stub.GenerateUnary(
        pb.GenerateRequest(token_ids=PROMPT, sampling=sampling), timeout=60
    ).outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids) == 6
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        best = [entry.logprob for entry in found.top]
        assert best == sorted(best, reverse=True)
        assert found.chosen == found.top[0]  # greedy
        assert found.chosen.token_id == token
        assert found.chosen.logprob <= 0


def test_a_stop_string_ends_the_text_before_it(house: House) -> None:
    free = house.stub.GenerateUnary(
        pb.GenerateRequest(token_ids=PROMPT, sampling=GREEDY), timeout=60
    ).outputs[0]
    stop = free.text[3:5]
    sampling = pb.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=[stop])
    held = house.stub.GenerateUnary(
        pb.GenerateRequest(token_ids=PROMPT, sampling=sampling), timeout=60
    ).outputs[0]
    assert held.finish_reason == pb.FINISH_REASON_STOP
    assert held.text == free.text[: free.text.index(stop)]


def test_tokenize_and_detokenize_are_inverse(house: House) -> None:
    text = "the näïve 🙂 string"
    tokens = house.stub.Tokenize(pb.TokenizeRequest(text=text), timeout=60)
    back = house.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids), timeout=60)
    assert back.text == text
    assert tokens.max_model_len == 512


def test_the_model_and_the_load_are_told(house: House) -> None:
    info = house.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
    assert (info.model, info.architecture) == ("tiny", "DeepseekV3ForCausalLM")
    assert (info.vocab_size, info.max_model_len, info.has_tokenizer) == (320, 512, True)
    assert list(info.eos_token_ids) == [256]
    load = house.stub.GetLoad(pb.GetLoadRequest(), timeout=60)
    assert (load.total_blocks, load.block_size, load.ready) == (512, 16, True)


def test_health_answers_for_the_server_and_for_the_service(house: House) -> None:
    stub = health_pb2_grpc.HealthStub(house.channel)
    for service in ("", "moeserve.v1.Inference"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_describes_every_method(house: House) -> None:
    database = ProtoReflectionDescriptorDatabase(house.channel)
    assert "moeserve.v1.Inference" in database.get_services()
    described = database.FindFileContainingSymbol("moeserve.v1.Inference")
    names = [method.name for method in described.service[0].method]
    assert names == [method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods]


def test_cancelling_a_stream_frees_its_blocks(house: House) -> None:
    made = house.engine.counters.generated_tokens
    sampling = pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
    stream = house.stub.Generate(
        pb.GenerateRequest(token_ids=PROMPT, sampling=sampling, n=2), timeout=60
    )
    next(iter(stream))
    assert house.engine.load().running == 2
    stream.cancel()
    house.eventually(house.all_free, "the cancelled request's blocks are free")
    assert house.engine.counters.generated_tokens - made < 2 * 480


def test_a_deadline_ends_the_call_and_frees_its_blocks(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=PROMPT, sampling=sampling, n=16)
    with pytest.raises(grpc.RpcError) as caught:
        list(house.stub.Generate(request, timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    house.eventually(house.all_free, "the late request's blocks are free")


def test_abort_ends_a_running_request_with_cancelled(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
    stream = iter(
        house.stub.Generate(
            pb.GenerateRequest(token_ids=PROMPT, sampling=sampling, request_id="doomed"),
            timeout=60,
        )
    )
    next(stream)
    house.stub.Abort(pb.AbortRequest(request_id="doomed"), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    house.eventually(house.all_free, "the aborted request's blocks are free")


def test_abort_of_nothing_is_not_found(house: House) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.Abort(pb.AbortRequest(request_id="nobody"), timeout=60)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_request_id_is_taken_while_its_request_runs(house: House) -> None:
    sampling = pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=PROMPT, sampling=sampling, request_id="mine")
    stream = house.stub.Generate(request, timeout=60)
    assert next(iter(stream)).request_id == "mine"
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.GenerateUnary(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stream.cancel()
    house.eventually(house.all_free, "the cancelled request's blocks are free")


def test_errors_carry_their_reason_and_field_as_error_info(house: House) -> None:
    bad = pb.SamplingParams(temperature=-1)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.GenerateUnary(pb.GenerateRequest(token_ids=PROMPT, sampling=bad), timeout=60)
    trailers = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INVALID_ARGUMENT", "moeserve")
    assert dict(info.metadata) == {"param": "temperature"}
    assert status.message == caught.value.details()


def test_a_field_from_the_future_is_refused_and_not_dropped(house: House) -> None:
    raw = house.channel.unary_unary("/moeserve.v1.Inference/GenerateUnary")
    request = pb.GenerateRequest(token_ids=PROMPT, sampling=GREEDY).SerializeToString()
    unknown = bytes([0xA0, 0x06, 0x01])  # field 100, varint 1
    with pytest.raises(grpc.RpcError) as caught:
        raw(request + unknown, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no field 100" in caught.value.details()


def test_unknown_methods_are_unimplemented(house: House) -> None:
    raw = house.channel.unary_unary("/moeserve.v1.Inference/Nonsense")
    with pytest.raises(grpc.RpcError) as caught:
        raw(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
