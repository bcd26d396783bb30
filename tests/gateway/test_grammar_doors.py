"""Answers in a given form, over real sockets; hostile forms are refused while others stream on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import jsonschema
import openai
import pytest

from moeserve.core import Grammar, GrammarKind, Request, RequestId, SamplingParams
from moeserve.models.library import resolve_model
from moeserve.pb import inference_pb2 as pb

if TYPE_CHECKING:
    from conftest import House

pytestmark = pytest.mark.long

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
ASK: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 120}
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("more than 65536 values", {"json": {"enum": [f"value number {i}" for i in range(200_000)]}}),
    ("recursion limit", {"json": '{"type":"array","items":' * 900 + "{}" + "}" * 900}),
    ("regex", {"regex": "(" * 3000 + "a" + ")" * 3000}),
    ("more time or memory", {"grammar": "start: " + '"a"? ' * 20_000}),
    ("uniqueItems", {"json": {"type": "array", "uniqueItems": True}}),
]


@pytest.fixture(scope="module")
def demo(open_house: Callable[..., House]) -> Iterator[House]:
    with open_house(resolve_model("demo"), served_model_name="demo", num_blocks=256) as house:
        yield house
        house.eventually(house.all_free, "every block is free")


def answer(house: House, **more: Any) -> dict[str, Any]:
    reply = house.http.post("/v1/completions", json=ASK | more)
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_holds_for_every_answer_that_is_finished(demo: House, temperature: float) -> None:
    reply = demo.openai.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Who?"}],
        response_format=FORM,
        temperature=temperature,
        max_tokens=200,
        n=4,
        seed=1,
    )
    finished = [c for c in reply.choices if c.finish_reason == "stop"]
    assert finished
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_streamed_or_not_beside_others_or_not_it_is_the_same_answer(demo: House) -> None:
    alone = answer(demo, temperature=0, response_format=FORM, return_token_ids=True)
    jsonschema.validate(json.loads(alone["text"]), SCHEMA)
    assert alone["finish_reason"] == "stop"
    beside = demo.http.post(
        "/v1/completions",
        json=ASK | {"prompt": [ASK["prompt"]] * 12, "temperature": 0, "response_format": FORM},
    )
    assert [c["text"] for c in beside.json()["choices"]] == [alone["text"]] * 12
    stream = demo.openai.completions.create(
        **ASK, temperature=0, stream=True, extra_body={"response_format": FORM}
    )
    assert "".join(part.choices[0].text for part in stream) == alone["text"]


def test_a_request_that_others_push_out_goes_on_with_the_same_tokens(
    open_house: Callable[..., House],
) -> None:
    body = {"prompt": [ASK["prompt"]] * 8, "temperature": 0, "response_format": FORM}
    with open_house(resolve_model("demo"), num_blocks=12, served_model_name="demo") as small:
        reply = small.http.post("/v1/completions", json=ASK | body).json()
        assert small.engine.counters.preemptions > 0
    with open_house(resolve_model("demo"), num_blocks=256, served_model_name="demo") as large:
        alone = answer(large, temperature=0, response_format=FORM)
    assert [c["text"] for c in reply["choices"]] == [alone["text"]] * 8


def test_every_kind_of_grammar_is_followed_over_http_and_grpc(demo: House) -> None:
    said = answer(demo, structured_outputs={"choice": ["yes, indeed", "no"]}, temperature=1)
    assert said["text"] in ("yes, indeed", "no")
    said = answer(demo, guided_regex="[0-9]{3}-[a-f]{2}", temperature=1)
    assert len(said["text"]) == 6
    assert said["finish_reason"] == "stop"
    grammars = {
        "json_schema": pb.Grammar(json_schema='{"type":"integer"}', whitespace=""),
        "regex": pb.Grammar(regex="x{3}"),
        "choice": pb.Grammar(choice=pb.Choice(texts=['say "x"', "\n"])),
        "lark": pb.Grammar(lark='root ::= "(" root ")" | "x"'),
        "structural_tag": pb.Grammar(
            structural_tag=json.dumps(
                {"structures": [{"begin": "e", "schema": {}, "end": "!"}], "triggers": ["e"]}
            )
        ),
    }
    texts = {}
    for kind, grammar in grammars.items():
        sampling = pb.SamplingParams(max_tokens=40, temperature=0, grammar=grammar)
        request = pb.GenerateRequest(text="Once", sampling=sampling)
        texts[kind] = demo.stub.GenerateUnary(request, timeout=60).outputs[0].text
    assert isinstance(json.loads(texts["json_schema"]), int)
    assert texts["regex"] == "xxx"
    assert texts["choice"] in ('say "x"', "\n")
    assert set(texts["lark"]) <= set("(x)")
    sampling = pb.SamplingParams(grammar=pb.Grammar(regex="("))
    with pytest.raises(grpc.RpcError) as refused:
        demo.stub.GenerateUnary(pb.GenerateRequest(text="a", sampling=sampling), timeout=60)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the grammar cannot be used" in refused.value.details()


def test_log_probabilities_are_those_of_the_model_without_the_grammar(demo: House) -> None:
    free = answer(demo, temperature=0, max_tokens=1, logprobs=3)
    bound = answer(demo, temperature=0, max_tokens=1, logprobs=3, guided_regex="[0-9]+")
    (best,), (also,) = free["logprobs"]["top_logprobs"], bound["logprobs"]["top_logprobs"]
    assert len(best) == 3
    assert best.items() < also.items()  # which has the chosen one beside
    assert bound["text"].isdigit()


def test_the_end_of_a_grammar_comes_before_min_tokens(demo: House) -> None:
    said = answer(demo, temperature=0, min_tokens=20, max_tokens=30, guided_choice=["ab"])
    assert (said["text"], said["finish_reason"]) == ("ab", "stop")


def test_a_grammar_that_fails_on_its_way_is_the_clients_and_its_cause_is_told(demo: House) -> None:
    """The second character is forbidden: a token is on its way when that is found out."""
    said = (
        "no token is allowed: its grammar, allowed_token_ids, bad_words and logit_bias leave none"
    )
    body = ASK | {"temperature": 0, "guided_regex": "xyx", "bad_words": ["y", "yx"]}
    whole = demo.http.post("/v1/completions", json=body)
    assert whole.status_code == 400
    assert said in whole.json()["error"]["message"]
    assert whole.json()["error"]["type"] == "invalid_request_error"
    streamed = demo.http.post("/v1/completions", json=body | {"stream": True})
    parts = [json.loads(line[6:]) for line in streamed.text.splitlines() if line[6:7] == "{"]
    assert parts[0]["choices"][0]["text"] == "x"
    assert parts[-1]["error"] | {"message": ""} == whole.json()["error"] | {"message": ""}
    assert said in parts[-1]["error"]["message"]
    words = pb.SamplingParams(
        max_tokens=9, temperature=0, grammar=pb.Grammar(regex="xyx"), bad_words=["y", "yx"]
    )
    request = pb.GenerateRequest(text="Once", sampling=words)
    chunks: list[Any] = []
    with pytest.raises(grpc.RpcError) as on_its_way:
        chunks.extend(demo.stub.Generate(request, timeout=60))
    with pytest.raises(grpc.RpcError) as at_once:
        demo.stub.GenerateUnary(request, timeout=60)
    for refused in (on_its_way, at_once):
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert said in refused.value.details()
    assert answer(demo, temperature=0, guided_regex="xyx")["text"] == "xyx"


@pytest.mark.parametrize(("why", "form"), HOSTILE, ids=lambda x: str(x)[:20])
def test_hostile_forms_are_refused_while_others_stream_on(
    demo: House, why: str, form: dict[str, Any]
) -> None:
    steps = demo.engine.counters.steps
    stream = demo.openai.completions.create(
        **ASK | {"max_tokens": 400}, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    refused = demo.http.post("/v1/completions", json=ASK | {"structured_outputs": form})
    assert refused.status_code == 400, refused.text
    assert why in refused.json()["error"]["message"]
    assert len(refused.text) < 1000
    rest = "".join(part.choices[0].text for part in stream)
    assert first.choices[0].text or rest
    assert demo.engine.counters.steps >= steps + 400


def test_a_form_that_ends_the_ranks_worker_fails_alone(demo: House) -> None:
    """What no door would let pass, as if one had: others with and without a form go on."""
    masks = demo.server.loaded.own.executor.masks
    answer(demo, temperature=0, max_tokens=2, guided_regex="a+")
    workers = masks.counts.workers
    events: list[Any] = []

    class Sink:
        def deliver(self, news: Any) -> None:
            events.extend(news)

    hostile = Grammar(GrammarKind.LARK, "start: " + '"a"? ' * 20_000)
    stream = demo.openai.completions.create(
        **ASK, temperature=0, stream=True, extra_body={"response_format": FORM}
    )
    parts = [next(iter(stream))]
    params = SamplingParams(max_tokens=8, grammar=hostile)
    demo.engine.submit(Request(RequestId("hostile"), (1, 2), params), Sink())
    parts += stream
    demo.eventually(lambda: bool(events), "the hostile request ends")
    (last,) = events
    assert last.finish == "invalid"
    assert "more time or memory" in last.error
    assert masks.counts.workers == workers + 1
    text = "".join(part.choices[0].text for part in parts)
    assert text == answer(demo, temperature=0, response_format=FORM)["text"]


def test_a_model_without_a_tokenizer_follows_no_grammar(
    open_house: Callable[..., House], tiny_checkpoint: Callable[[str], Any], tmp_path: Any
) -> None:
    folder = tmp_path / "model"
    source = tiny_checkpoint("qwen3_moe")
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    with (
        open_house(folder, served_model_name="bare", num_blocks=64) as house,
        pytest.raises(openai.BadRequestError, match="grammars need both"),
    ):
        house.openai.completions.create(
            model="bare", prompt=[1, 2], extra_body={"guided_regex": "a"}
        )
