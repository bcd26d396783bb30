"""The openai client, and plain HTTP, over a real socket."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

import moeserve
from moeserve.core import FinishReason

if TYPE_CHECKING:
    from conftest import House

PROMPT = [72, 101, 108, 108, 111]
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
ON = {"ignore_eos": True, "return_token_ids": True}
HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


def test_a_completion_equals_the_grpc_answer(house: House) -> None:
    answer = house.openai.completions.create(prompt=PROMPT, extra_body=ON, **GREEDY)
    choice = answer.choices[0]
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == house.tokens(
        PROMPT, 12, temperature=0, ignore_eos=True
    )
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    assert answer.usage.total_tokens == 17
    assert answer.model == "tiny"
    assert answer.object == "text_completion"


def test_a_streamed_completion_joins_to_the_whole(house: House) -> None:
    whole = house.openai.completions.create(prompt="Hello there", extra_body=ON, **GREEDY)
    stream = house.openai.completions.create(
        prompt="Hello there",
        stream=True,
        stream_options={"include_usage": True},
        extra_body=ON,
        **GREEDY,
    )
    *parts, last = stream
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert [p.choices[0].finish_reason for p in parts][-1] == "length"
    assert last.choices == []
    assert last.usage == whole.usage
    assert len({p.id for p in parts}) == 1


def test_a_chat_answers_like_the_rendered_prompt(house: House) -> None:
    chat = house.openai.chat.completions.create(messages=HELLO, extra_body=ON, **GREEDY)
    rendered = "<|user|>Hello there<|end|><|assistant|>"
    same = house.openai.completions.create(prompt=rendered, extra_body=ON, **GREEDY)
    assert chat.choices[0].message.content == same.choices[0].text
    assert chat.choices[0].message.role == "assistant"
    assert chat.object == "chat.completion"
    assert chat.usage == same.usage


def test_a_streamed_chat_opens_with_the_role_and_joins_to_the_whole(house: House) -> None:
    whole = house.openai.chat.completions.create(messages=HELLO, extra_body=ON, **GREEDY)
    parts = list(
        house.openai.chat.completions.create(messages=HELLO, stream=True, extra_body=ON, **GREEDY)
    )
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(p.choices[0].delta.content or "" for p in parts)
    assert text == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts if p.choices[0].finish_reason] == ["length"]
    assert parts[0].object == "chat.completion.chunk"


def test_a_chat_without_max_tokens_may_fill_the_context(house: House) -> None:
    answer = house.openai.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_completion_logprobs_have_their_four_lists(house: House) -> None:
    answer = house.openai.completions.create(
        prompt="Hello there", logprobs=2, extra_body=ON, **GREEDY
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens and found.token_logprobs and found.top_logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 12
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())


def test_chat_logprobs_have_bytes_that_join_to_the_text(house: House) -> None:
    answer = house.openai.chat.completions.create(
        messages=HELLO, logprobs=True, top_logprobs=2, extra_body=ON, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    raw = b"".join(bytes(entry.bytes or []) for entry in content)
    text = answer.choices[0].message.content
    assert text is not None
    # Special tokens have bytes, but are left out of the text.
    assert raw.replace(b"<|end|>", b"").decode(errors="replace").startswith(text[:3])


def test_several_prompts_times_n_are_numbered_in_order(house: House) -> None:
    settings = GREEDY | {"temperature": 1.5, "seed": 3}
    both = house.openai.completions.create(
        prompt=[PROMPT, [72, 105]], n=2, extra_body=ON, **settings
    )
    alone = house.openai.completions.create(prompt=[72, 105], n=2, extra_body=ON, **settings)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in both.choices[2:]] == [c.text for c in alone.choices]
    assert both.usage is not None
    assert both.usage.prompt_tokens == 7
    assert both.usage.completion_tokens == 48


def test_repeated_prompts_report_their_cached_tokens(house: House) -> None:
    prompt = list(range(100, 180))
    usages = [
        house.openai.completions.create(prompt=prompt, extra_body=ON, **GREEDY).usage
        for _ in range(2)
    ]
    cached = [
        u.prompt_tokens_details.cached_tokens for u in usages if u and u.prompt_tokens_details
    ]
    assert cached == [0, 64]  # the last token is always computed, and so its block


def test_another_salt_shares_no_cache(house: House) -> None:
    prompt = list(range(120, 200))
    for salt in ("a", "b"):
        usage = house.openai.completions.create(
            prompt=prompt, extra_body=ON | {"cache_salt": salt}, **GREEDY
        ).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 0


def test_hanging_up_a_stream_frees_its_blocks(house: House) -> None:
    made = house.engine.counters.generated_tokens
    stream = house.openai.completions.create(
        prompt=PROMPT,
        stream=True,
        extra_body={"ignore_eos": True},
        **GREEDY | {"max_tokens": 480},
    )
    next(iter(stream))
    assert house.engine.load().running == 1
    stream.close()
    house.eventually(house.all_free, "the abandoned request's blocks are free")
    assert house.engine.counters.generated_tokens - made < 480


def test_hanging_up_while_waiting_for_a_whole_answer_frees_its_blocks(house: House) -> None:
    aborted = house.engine.counters.finished.get(FinishReason.ABORT, 0)
    hasty = house.openai.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hasty.completions.create(
            prompt=PROMPT, n=16, extra_body={"ignore_eos": True}, **GREEDY | {"max_tokens": 480}
        )
    house.eventually(house.all_free, "the abandoned request's blocks are free")
    assert house.engine.counters.finished[FinishReason.ABORT] == aborted + 16


def test_the_raw_stream_is_events_and_a_final_done(house: House) -> None:
    body = {"prompt": PROMPT, "stream": True, "ignore_eos": True} | GREEDY
    with house.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["object"] == "text_completion"


def test_models_are_listed_and_found(house: House) -> None:
    assert [m.id for m in house.openai.models.list()] == ["tiny"]
    assert house.openai.models.retrieve("tiny").owned_by == "moeserve"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        house.openai.models.retrieve("other/model")


def test_tokenize_and_detokenize_are_inverse(house: House) -> None:
    text = "the näïve 🙂 string"
    found = house.http.post("/tokenize", json={"prompt": text}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512
    back = house.http.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    chat = house.http.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["count"] > len("Hello there") // 4


def test_small_routes_answer(house: House) -> None:
    assert house.http.get("/health").status_code == 200
    assert house.http.get("/ready").json() == {"status": "ready"}
    assert house.http.get("/version").json() == {"version": moeserve.__version__}


def test_metrics_count_what_the_engine_counts_under_both_names(house: House) -> None:
    house.tokens(PROMPT, 3, ignore_eos=True)
    page = house.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    made = house.engine.counters.generated_tokens
    lines = page.text.splitlines()
    assert f'moeserve_generated_tokens_total{{engine="0",model_name="tiny"}} {float(made)}' in lines
    assert f'vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {float(made)}' in lines


@pytest.mark.parametrize("streamed", [False, True])
async def test_concurrent_async_clients_each_get_their_own_answer(
    house: House, streamed: bool
) -> None:
    prompts = [[65 + i, 66, 67] for i in range(8)]
    solo = [house.tokens(p, 10, temperature=0, ignore_eos=True) for p in prompts]
    async with openai.AsyncOpenAI(
        base_url=f"{house.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:

        async def ask(prompt: list[int]) -> list[int]:
            settings = GREEDY | {"max_tokens": 10, "prompt": prompt, "extra_body": ON}
            if not streamed:
                answer = await client.completions.create(**settings)
                return answer.choices[0].token_ids
            stream = await client.completions.create(stream=True, **settings)
            return [t async for part in stream for t in part.choices[0].token_ids]

        assert await asyncio.gather(*map(ask, prompts)) == solo


def test_a_client_can_ask_what_it_needs_to_write_prompts_itself(house: House) -> None:
    info = house.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None)
    assert "<|assistant|>" in info["chat_template"]
    assert info["model_max_length"] == 512
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
