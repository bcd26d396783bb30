"""Many streams at once, through both doors, each as if it were alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import openai

from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from conftest import House

STREAMS = 64
TOKENS = 24


def prompt_of(i: int) -> list[int]:
    """Different lengths and beginnings."""
    return [(7 * i + 3 * j) % 256 for j in range(1 + i % 40)]


def sampling_of(i: int) -> dict[str, Any]:
    """Every other one greedy, the rest seeded."""
    return {"temperature": 1.0 if i % 2 else 0.0, "seed": i, "ignore_eos": True}


async def test_64_concurrent_streams_each_equal_their_solo_run(house: House) -> None:
    steps = house.engine.counters.steps
    solo = [house.tokens(prompt_of(i), TOKENS, **sampling_of(i)) for i in range(STREAMS)]
    solo_steps = house.engine.counters.steps - steps
    async with (
        grpc.aio.insecure_channel(house.grpc_address) as channel,
        openai.AsyncOpenAI(
            base_url=f"{house.url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client,
    ):
        stub: Any = InferenceStub(channel)

        async def by_grpc(i: int) -> list[int]:
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt_of(i)),
                sampling=pb.SamplingParams(max_tokens=TOKENS, **sampling_of(i)),
            )
            return [t async for c in stub.Generate(request, timeout=60) for t in c.token_ids]

        async def by_http(i: int) -> list[int]:
            sampling = sampling_of(i)
            stream = await client.completions.create(
                model="tiny",
                prompt=prompt_of(i),
                max_tokens=TOKENS,
                temperature=sampling["temperature"],
                seed=sampling["seed"],
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return [t async for part in stream for t in part.choices[0].token_ids]

        steps = house.engine.counters.steps
        together = await asyncio.gather(
            *((by_http if i % 4 == 3 else by_grpc)(i) for i in range(STREAMS))
        )
    assert together == solo
    assert house.engine.counters.steps - steps < solo_steps / 4, "they did not run together"
