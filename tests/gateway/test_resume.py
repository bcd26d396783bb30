"""An answer that broke off is resumed behind the tokens that the client has: the rest is the same,
and only the rest is sent and charged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

MADE = 24
SAMPLED = {"temperature": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def house(open_house: Callable[..., House]) -> Iterator[House]:
    with open_house(Path("demo"), num_blocks=256) as opened:
        yield opened


def completion(house: House, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice and the usage."""
    body = {"prompt": "One day, Lily", "max_tokens": MADE, "return_token_ids": True} | fields
    answer = house.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0], answer.json()["usage"]


@pytest.mark.parametrize("drawn", [{"temperature": 0}, SAMPLED])
@pytest.mark.parametrize("made", [1, 5, MADE - 1])
def test_over_http_the_rest_is_the_same(house: House, drawn: dict[str, Any], made: int) -> None:
    whole, _ = completion(house, logprobs=1, **drawn)
    rest, usage = completion(house, logprobs=1, resume_from_token=made, **drawn)
    assert rest["token_ids"] == whole["token_ids"][made:]
    assert rest["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][made:]
    assert whole["text"].endswith(rest["text"])
    assert rest["finish_reason"] == whole["finish_reason"]
    assert usage["completion_tokens"] == MADE - made


def test_a_stream_and_what_resumes_it_make_the_whole_text(house: House) -> None:
    whole, _ = completion(house, **SAMPLED)
    for made in range(1, MADE):
        rest, _ = completion(house, resume_from_token=made, **SAMPLED)
        first, _ = completion(house, **{**SAMPLED, "max_tokens": made})
        assert first["token_ids"] + rest["token_ids"] == whole["token_ids"]


def test_over_grpc_the_rest_is_the_same(house: House) -> None:
    def ask(**fields: Any) -> list[int]:
        request = pb.GenerateRequest(
            text="One day, Lily",
            sampling=pb.SamplingParams(max_tokens=MADE, seed=3, temperature=1.0),
            **fields,
        )
        return list(house.stub.GenerateUnary(request, timeout=60).outputs[0].token_ids)

    assert ask(resume_from_token=10) == ask()[10:]


def test_a_stop_string_counts_from_the_beginning(house: House) -> None:
    whole, _ = completion(house, temperature=0)
    word = whole["text"].split()[2]
    stopped, _ = completion(house, temperature=0, stop=[word])
    rest, usage = completion(house, temperature=0, stop=[word], resume_from_token=MADE - 1)
    assert (rest["text"], rest["finish_reason"]) == ("", "stop")
    assert usage["completion_tokens"] == 0
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": 1, "resume_from_token": 3}, "give the seed, or temperature 0"),
        ({"seed": 1, "n": 2, "resume_from_token": 3}, "resume them one by one"),
        ({"seed": 1, "resume_from_token": MADE}, "nothing would follow"),
        ({"seed": 1, "resume_from_token": 3, "prompt_logprobs": 1}, "leave them out"),
        ({"seed": 1, "resume_from_token": -1}, "expected an integer from 0"),
        ({"seed": 1, "resume_from_token": "3"}, "expected an integer from 0"),
    ],
)
def test_what_cannot_be_resumed_is_refused(house: House, fields: dict[str, Any], says: str) -> None:
    body = {"prompt": "One day", "max_tokens": MADE} | fields
    answer = house.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "resume_from_token"


def test_chats_are_not_resumed(house: House) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "seed": 1, "resume_from_token": 3}
    answer = house.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "resume_from_token")


def test_over_grpc_a_missing_seed_is_named(house: House) -> None:
    request = pb.GenerateRequest(text="One day", resume_from_token=2)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.GenerateUnary(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
