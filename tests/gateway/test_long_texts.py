"""Whatever is sent, the loop goes on: health answers while a long text is worked on, other streams
get the right tokens, and one request has one error.

Workers are stopped by a signal where a test needs to know that their work has not ended.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from moeserve.gateway.limits import MAX_IDS, MAX_LISTED_IDS
from moeserve.models.tokenizer import Tokenizer
from moeserve.pb import inference_pb2 as pb
from moeserve.process.pool import WorkerPool

if TYPE_CHECKING:
    from conftest import House

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

BAD = grpc.StatusCode.INVALID_ARGUMENT
WORDS = "the thing that others hear is either this or that. "
TEMPLATE = """
{%- set said = messages[-1].content -%}
{%- if said == 'long' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}
{%- endfor %}{% elif said == 'large' %}{{ 'a' * 3000000000 }}
{%- else %}<|user|>{{ said }}<|end|>{% endif %}
"""


@pytest.fixture(scope="module")
def house(
    tiny: Path, open_house: Callable[..., House], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with open_house(
        tiny, served_model_name="tiny", num_blocks=512, chat_template=template
    ) as house:
        yield house
        house.eventually(house.all_free, "every block is free")
        pids = [pid for pool in pools(house).values() for pid in pool.pids]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "a process is left"


@pytest.fixture(autouse=True)
def _goes_on(house: House) -> Iterator[None]:
    """Whatever was sent, the next requests are served, by the same tokens."""
    yield
    assert house.tokens([72, 105], 4, temperature=0, ignore_eos=True) == house.tokens(
        [72, 105], 4, temperature=0, ignore_eos=True
    )
    assert all(pool.jobs == 0 for pool in pools(house).values())


def pools(house: House) -> dict[str, WorkerPool]:
    return dict(house.server.service.texts.pools)


def tokenised(house: House) -> int:
    """Jobs so far of those who tokenise and render."""
    return sum(pool.counts.done for kind, pool in pools(house).items() if kind != "json")


def post(house: House, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    return httpx.post(house.url + path, content=content, headers=kind, timeout=60)


def message(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return str(error["message"])


@contextmanager
def stopped(house: House, kind: str) -> Iterator[None]:
    """A worker of this pool is there, and does nothing until the end; then it goes on."""
    text = WORDS * (200 if kind == "quick" else 5200)
    assert post(house, "/tokenize", {"prompt": text}).status_code == 200
    pids = pools(house)[kind].pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_a_text_that_cannot_fit_is_refused_unseen(house: House) -> None:
    before = tokenised(house)
    said = message(post(house, "/v1/completions", {"prompt": "a" * (4 << 20)}), 400)
    assert "4194304 characters, which are at least 322639 tokens, but the model holds 512" in said
    with pytest.raises(grpc.RpcError) as refused:
        house.stub.GenerateUnary(pb.GenerateRequest(text="a" * (4 << 20)), timeout=60)
    assert (refused.value.code(), refused.value.details()) == (BAD, said)
    assert tokenised(house) == before == 0


@pytest.mark.parametrize("kind", ["quick", "long"])
def test_all_goes_on_while_a_text_is_tokenised(house: House, tiny: Path, kind: str) -> None:
    text = WORDS * (200 if kind == "quick" else 5200)
    quiet = house.tokens([72, 105], 40, temperature=0, ignore_eos=True)
    tokenizer = Tokenizer.load(tiny)
    with ThreadPoolExecutor(1) as thread:
        with stopped(house, kind):
            tokenizing = thread.submit(post, house, "/tokenize", {"prompt": text})
            house.eventually(lambda: pools(house)[kind].jobs == 1, "the text is there")
            assert post(house, "/tokenize", {"prompt": "Hi"}).json()["tokens"] == tokenizer.encode(
                "Hi"
            )
            assert house.http.get("/health").status_code == 200
            assert house.tokens([72, 105], 40, temperature=0, ignore_eos=True) == quiet
            assert pools(house)[kind].jobs == 1, "all this while the text was not tokenised"
        found = tokenizing.result(60).json()["tokens"]
    assert found == tokenizer.encode(text)


def test_a_long_text_does_not_hold_up_conversations(house: House) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
    alone = post(house, "/v1/chat/completions", chat).json()["choices"]
    with ThreadPoolExecutor(1) as thread:
        with stopped(house, "long"):
            tokenizing = thread.submit(post, house, "/tokenize", {"prompt": WORDS * 5200})
            house.eventually(lambda: pools(house)["long"].jobs == 1, "the text is there")
            assert post(house, "/v1/chat/completions", chat).json()["choices"] == alone
            assert pools(house)["long"].jobs == 1
        assert tokenizing.result(60).status_code == 200


def test_a_worker_that_dies_fails_one_request(house: House) -> None:
    with ThreadPoolExecutor(1) as thread, stopped(house, "long"):
        tokenizing = thread.submit(post, house, "/tokenize", {"prompt": WORDS * 5200})
        pool = pools(house)["long"]
        house.eventually(lambda: pool.jobs == 1, "the text is there")
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        said = message(tokenizing.result(60), 429)
        assert "its process ended, status -9: try again" in said
        house.eventually(lambda: pid not in pool.pids, "it is taken away")
        assert post(house, "/tokenize", {"prompt": WORDS * 5200}).status_code == 200


def test_more_tokens_than_an_answer_lists_are_refused(house: House) -> None:
    said = message(post(house, "/tokenize", {"prompt": "a" * (MAX_LISTED_IDS + 1)}), 400)
    assert f"the text has {MAX_LISTED_IDS + 1} tokens, at most {MAX_LISTED_IDS}" in said


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "Hi", "metadata": [' + b"[]," * 1_000_000 + b"[]]}", "65536 values"),
        (b'{"prompt": "Hi", "metadata": ' + b'{"a":' * 100_000 + b"}", "not JSON"),
        (b'{"prompt": [' + b"1," * 3_000_000 + b"1]}", "integers in lists"),
        (b'{"prompt": [' + b"1," * 60_000 + b"1]}", "the prompt has 60001 tokens"),
        (b'{"prompt": "' + b"\\n" * 2_000_000 + b'"}', "2000000 characters"),
    ],
    ids=["lists", "depth", "ids", "fewer ids", "escapes"],
)
def test_bodies_of_many_values_are_parsed_elsewhere(house: House, body: bytes, says: str) -> None:
    done = threading.Event()

    def healthy() -> int:
        answers = 0
        while not done.is_set():
            assert house.http.get("/health").status_code == 200
            answers += 1
        return answers

    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(healthy)
        try:
            said = message(post(house, "/v1/completions", body), 400)
        finally:
            done.set()
        assert answers.result(60) > 0
    assert says in said
    pool = pools(house)["json"]
    assert pool.counts.killed == 0
    assert all(resident_mib(pid) < 100 for pid in pool.pids), "memory is given back"


def resident_mib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def test_a_large_body_asks_for_the_same_as_a_small_one(house: House) -> None:
    wanted = {"prompt": [72, 105], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    small = post(house, "/v1/completions", wanted).json()["choices"]
    large = post(house, "/v1/completions", wanted | {"metadata": {"a": "[" * 200_000}})
    assert large.json()["choices"] == small
    assert pools(house)["json"].counts.done > 0


def test_messages_of_many_values_are_refused(house: House) -> None:
    def refused(request: pb.GenerateRequest | bytes) -> str:
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        call = house.channel.unary_unary("/moeserve.v1.Inference/GenerateUnary")
        with pytest.raises(grpc.RpcError) as caught:
            call(raw, timeout=60)
        assert caught.value.code() is BAD
        return str(caught.value.details())

    many = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (MAX_IDS + 1)))
    assert refused(many) == f"prompt: {MAX_IDS + 1} ids, at most {MAX_IDS}"
    stops = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(stop=[""] * 500_000))
    assert refused(stops) == "stop: 500000 strings, at most 16"
    unknown = pb.GenerateRequest(text="a").SerializeToString() + b"\xf8\x3f\x00" * 1_000_000
    assert "has fields that this server does not know" in refused(unknown)


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        ("long", 504, "took too long and was ended"),
        ("large", 429, "took too much memory and was ended"),
    ],
)
def test_a_template_that_takes_too_much_fails_one_request(
    house: House, said: str, status: int, says: str
) -> None:
    quiet = house.tokens([72, 105], 40, temperature=0, ignore_eos=True)
    body = {"messages": [{"role": "user", "content": said}]}
    with ThreadPoolExecutor(1) as thread:
        rendering = thread.submit(post, house, "/v1/chat/completions", body)
        assert house.tokens([72, 105], 40, temperature=0, ignore_eos=True) == quiet
        assert says in message(rendering.result(60), status)
    ok = body | {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert post(house, "/v1/chat/completions", ok).status_code == 200


def test_texts_and_templates_work_while_others_load(
    tiny: Path, open_house: Callable[..., House], tmp_path: Path
) -> None:
    """A template that takes for ever is found out before the model is served: chat is refused, in
    our shape, and all else works."""
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with open_house(tmp_path, num_blocks=64) as house:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        said = message(post(house, "/v1/chat/completions", body), 400)
        assert "no tokenizer" in said
        assert len(house.tokens([72, 105], 2, ignore_eos=True)) == 2
