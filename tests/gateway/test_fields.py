"""What HTTP bodies may hold beside the plainest fields, and what happens to all others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from moeserve.gateway.openai import chat, completions, fields, tokens

if TYPE_CHECKING:
    from conftest import House

DOCS = Path(__file__).resolve().parents[2] / "docs" / "fields.md"
PROMPT = [72, 101, 108, 108, 111]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}
HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def strict_house(tiny: Path, open_house: Callable[..., House]) -> Iterator[House]:
    with open_house(tiny, num_blocks=64, strict=True) as house:
        yield house


def complete(house: House, **body: Any) -> Any:
    answer = house.http.post("/v1/completions", json=GREEDY | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(house: House, says: str, param: str, path: str = "completions", **body: Any) -> Any:
    answer = house.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], says in error["message"]) == (param, True), error
    return error


def streamed(house: House, path: str = "/v1/completions", **body: Any) -> list[Any]:
    answer = house.http.post(path, json=GREEDY | body | {"stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_an_echo_stands_before_the_answer(house: House) -> None:
    alone = complete(house, prompt="Hello there")
    echoed = complete(house, prompt="Hello there", echo=True)
    assert echoed["choices"][0]["text"] == "Hello there" + alone["choices"][0]["text"]
    assert echoed["usage"] == alone["usage"] | {"prompt_tokens_details": {"cached_tokens": 0}}
    by_ids = complete(house, prompt=PROMPT, echo=True)["choices"][0]["text"]
    text = house.http.post("/detokenize", json={"tokens": PROMPT}).json()["prompt"]
    assert by_ids == text + complete(house, prompt=PROMPT)["choices"][0]["text"]


def test_an_echo_has_the_log_probabilities_of_the_prompt(house: House) -> None:
    answer = complete(house, prompt=[PROMPT, PROMPT[:1]], echo=True, logprobs=2)
    for choice, prompt in zip(answer["choices"], (PROMPT, PROMPT[:1]), strict=True):
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(prompt) + 6}
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert all(value < 0 for value in found["token_logprobs"][1:])
        assert found["text_offset"][:2] == [0, 1]
        assert found["text_offset"] == sorted(found["text_offset"])
        for token, value, top in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
        ):
            assert top[token] == value <= max(top.values())
    longer = complete(house, prompt=PROMPT, echo=True, logprobs=1, prompt_logprobs=4)["choices"][0]
    assert all(len(top) <= 2 for top in longer["logprobs"]["top_logprobs"][1:])
    assert all(len(entry) >= 4 for entry in longer["prompt_logprobs"][1:])


def test_what_a_prompt_scores_is_what_its_answer_scored(house: House) -> None:
    """An answer's log-probabilities are those that its tokens have as a prompt, bit for bit."""
    whole = complete(house, prompt=PROMPT, logprobs=0, return_token_ids=True)["choices"][0]
    prompt = PROMPT + whole["token_ids"]
    again = complete(house, prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert again["logprobs"]["token_logprobs"][-6:] == whole["logprobs"]["token_logprobs"]


def test_no_answer_is_made_where_none_is_wanted(house: House) -> None:
    answer = complete(house, prompt="Hello there", echo=True, max_tokens=0, logprobs=1)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hello there", "length")
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0
    bare = complete(house, prompt="Hello there", echo=True, max_tokens=0)["choices"][0]
    assert (bare["text"], bare["logprobs"]) == ("Hello there", None)
    refused(house, "max_tokens=0", "max_tokens", prompt="Hello there", max_tokens=0)
    refused(house, "max_tokens=0", "max_tokens", prompt="x", max_tokens=0, logprobs=1)
    # False is no number, and 0 not the same.
    refused(house, "max_tokens=False", "max_tokens", prompt="x", max_tokens=False, echo=True)


def test_a_streamed_echo_joins_to_the_whole(house: House) -> None:
    body = {"prompt": ["Hello", "there"], "echo": True, "logprobs": 1, "n": 2, "seed": 3}
    whole = complete(house, **body)["choices"]
    texts, scores = [""] * 4, [list[Any]() for _ in range(4)]
    for part in streamed(house, **body):
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["text"]
        scores[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == [choice["text"] for choice in whole]
    assert scores == [choice["logprobs"]["token_logprobs"] for choice in whole]
    (only,) = streamed(house, prompt="Hello", echo=True, max_tokens=0)
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == ("Hello", "length")


def test_prompt_logprobs_are_written_as_vllm_writes_them(house: House) -> None:
    choice = complete(house, prompt=PROMPT, prompt_logprobs=2)["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == 4
    for token, entry in zip(PROMPT[1:], others, strict=True):
        assert 2 <= len(entry) <= 3
        assert set(entry[str(token)]) == {"logprob", "rank", "decoded_token"}
        ranks = sorted(found["rank"] for found in entry.values() if found["rank"] is not None)
        assert ranks == [1, 2]
    body = {"messages": HELLO, "prompt_logprobs": 0, "max_tokens": 1}
    answer = house.http.post("/v1/chat/completions", json=body).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    refused(house, "is not streamed", "prompt_logprobs", prompt="x", stream=True, prompt_logprobs=1)
    large = {"prompt": [PROMPT * 100] * 64, "prompt_logprobs": 20}
    refused(house, "at most 131072", "prompt_logprobs", max_tokens=1, **large)


def test_the_best_of_several_are_those_of_the_greatest_log_probability(house: House) -> None:
    body = {"prompt": [PROMPT, [72]], "temperature": 1.5, "seed": 3}
    made = complete(house, n=5, logprobs=0, **body)
    best = complete(house, n=2, best_of=5, **body)
    for prompt, first in ((0, 0), (1, 5)):
        ranked = sorted(
            made["choices"][first : first + 5],
            key=lambda choice: -math.fsum(choice["logprobs"]["token_logprobs"]),
        )
        shown = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [choice["text"] for choice in shown] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"]["completion_tokens"] == made["usage"]["completion_tokens"] == 60
    same = complete(house, n=2, best_of=2, **body)["choices"]
    assert same == complete(house, n=2, **body)["choices"]
    refused(house, "best_of is at least n", "best_of", prompt="x", n=3, best_of=2)
    refused(house, "leave stream out", "best_of", prompt="x", best_of=2, stream=True)
    for wrong in (0, 17, "2", True):
        refused(house, "best_of=", "best_of", prompt="x", best_of=wrong)


def test_usage_can_come_with_every_chunk(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [PROMPT, [72]], "return_token_ids": True, "stream_options": options}
    *parts, last = streamed(house, **body)
    made = [0, 0]
    for part in parts:
        (choice,) = part["choices"]
        i = choice["index"]
        made[i] += len(choice["token_ids"])
        prompt = (5, 1)[i]
        assert part["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": made[i],
            "total_tokens": prompt + made[i],
        }
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6 + 12)
    rare = streamed(house, prompt="x", stream_options={"continuous_usage_stats": True})
    assert all("usage" not in part for part in rare)
    talk = streamed(house, "/v1/chat/completions", messages=HELLO, stream_options=options)
    assert talk[0]["usage"]["completion_tokens"] <= talk[-1]["usage"]["completion_tokens"] == 6


def test_tokens_can_be_spelled_as_their_ids(house: House) -> None:
    body = {"prompt": PROMPT, "logprobs": 0, "echo": True, "return_tokens_as_token_ids": True}
    found = complete(house, **body)["choices"][0]["logprobs"]["tokens"]
    assert found[:5] == [f"token_id:{i}" for i in PROMPT]


def test_bad_words_are_no_part_of_an_answer(house: House) -> None:
    said = complete(house, prompt="Hello there", max_tokens=40)["choices"][0]["text"]
    words = sorted({said[i : i + 2] for i in range(len(said) - 1) if said[i : i + 2].isalpha()})[:5]
    other = complete(house, prompt="Hello there", max_tokens=40, bad_words=words)["choices"][0]
    assert words
    assert other["text"] != said
    answers = [house.http.post("/tokenize", json={"prompt": word}).json() for word in words]
    made = complete(
        house, prompt="Hello there", max_tokens=40, bad_words=words, return_token_ids=True
    )["choices"][0]["token_ids"]
    for ids in (answer["tokens"] for answer in answers):
        assert not any(made[i : i + len(ids)] == ids for i in range(len(made)))


def test_a_prompt_that_is_cut_keeps_its_end(house: House) -> None:
    body = {"prompt": "Hello there", "truncate_prompt_tokens": 4}
    cut = complete(house, echo=True, **body)
    ids = house.http.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"][-4:]
    assert cut["choices"][0]["text"] == complete(house, prompt=ids, echo=True)["choices"][0]["text"]
    assert cut["usage"]["prompt_tokens"] == 4
    long = {"messages": [{"role": "user", "content": "x" * 2000}], "truncate_prompt_tokens": -1}
    talk = house.http.post("/v1/chat/completions", json=GREEDY | long).json()
    assert talk["usage"]["prompt_tokens"] == 512 - 6


def test_too_long_a_prompt_has_the_code_that_clients_look_for(house: House) -> None:
    for body in ({"prompt": [1] * 600}, {"prompt": [1] * 500, "max_tokens": 100}):
        assert refused(house, "512", list(body)[-1], **body)["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        house.openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 2000}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert refused(house, "top_p", "top_p", prompt="x", top_p=2)["code"] == "invalid_argument"


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", GREEDY | {"prompt": PROMPT}),
    ("/v1/chat/completions", GREEDY | {"messages": HELLO}),
    ("/tokenize", {"prompt": "x"}),
    ("/detokenize", {"tokens": [1]}),
]


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
def test_what_is_ignored_is_said_or_refused(
    house: House, strict_house: House, path: str, body: dict[str, Any]
) -> None:
    plain = house.http.post(path, json=body)
    assert "warning" not in plain.headers
    for extra, says in (
        ({"temprature": 0.5}, "temprature: unknown field"),
        ({'é"\\\r\nx': 1}, "?????x: unknown field"),
        ({"store": True}, "store: ignored, answers are not kept"),
    ):
        warned = house.http.post(path, json=body | extra)
        assert warned.status_code == 200, warned.text
        assert warned.headers["warning"].startswith('299 moeserve "'), warned.headers
        assert says in warned.headers["warning"]
        strict = strict_house.http.post(path, json=body | extra)
        assert strict.status_code == 400, strict.text
        error = strict.json()["error"]
        assert "this server is strict" in error["message"]
    assert strict_house.http.post(path, json=body | {"store": False}).status_code == 200
    many = house.http.post(path, json=body | {f"x{i:03}": i for i in range(50)})
    assert many.headers["warning"].endswith('x007: unknown field; and 42 more"')


def test_streams_and_their_options_warn_too(house: House, strict_house: House) -> None:
    body = {"prompt": PROMPT, "stream": True, "stream_options": {"include_usages": True}}
    answer = house.http.post("/v1/completions", json=GREEDY | body)
    assert answer.status_code == 200
    assert "stream_options: unknown field 'include_usages'" in answer.headers["warning"]
    refused(strict_house, "include_usages", "stream_options", **body)
    refused(house, "priority=2.5", "priority", prompt="x", priority=2.5)


def test_a_requests_name_comes_back(house: House) -> None:
    for path, status in (("/health", 200), ("/nowhere", 404), ("/v1/completions", 405)):
        answer = house.http.get(path, headers={"x-request-id": "abc/1"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "abc/1")
    raw = house.openai.completions.with_raw_response.create(
        model="tiny", prompt="x", max_tokens=1, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"
    drawn = set()
    for given in ("", "x" * 129, "a b", "é"):
        headers = {"x-request-id": given.encode()} if given else {}
        drawn.add(house.http.get("/health", headers=headers).headers["x-request-id"])
    assert len(drawn) == 4
    assert all(re.fullmatch(r"req-[0-9a-f]{24}", name) for name in drawn)


def documented() -> dict[str, dict[str, str]]:
    """By field, what the document says of it on each route."""
    rows = re.findall(r"^\| `(\w+)` +\| (.*?) +\| (.*?) +\|", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows}), "a field stands there twice"
    return {name: {"completions": one, "chat": two} for name, one, two in rows}


def test_the_document_lists_every_field_and_what_happens_to_it() -> None:
    routes = {"completions": completions.FIELDS, "chat": chat.FIELDS}
    names = fields.known_fields().union(*routes.values())
    expected = {
        name: {route: fields.what_happens(name, used) for route, used in routes.items()}
        for name in names
    }
    assert documented() == expected


def test_routes_for_tokens_use_few_fields() -> None:
    assert tokens.TOKENIZE_FIELDS < chat.FIELDS | completions.FIELDS
    assert {"model", "tokens", "skip_special_tokens"} == tokens.DETOKENIZE_FIELDS
