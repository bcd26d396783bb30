"""Many streams at once against one OpenAI server, whoever made it: TTFT, TPOT, tokens/s.

Every stream asks for the same number of tokens and ignores the end of text, so a server's answers
are as long as any other's. TPOT is a stream's time from its first token to its last, per token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class Stream:
    """Seconds since the start of all; ``tokens`` as the server counted them."""

    first_s: float
    last_s: float
    tokens: int


async def ask(
    client: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int], tokens: int
) -> Stream:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    first = last = 0.0
    counted = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            said = (await response.aread()).decode(errors="replace")
            raise httpx.HTTPError(f"{url}: {response.status_code} {said[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("choices"):
                last = time.perf_counter() - begin
                first = first or last
            if chunk.get("usage"):
                counted = chunk["usage"]["completion_tokens"]
    return Stream(first, last, counted)


async def ask_all(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, deadline: float
) -> list[Stream]:
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(timeout=deadline, limits=limits, trust_env=False) as client:
        listed = await client.get(f"{url}/v1/models")
        listed.raise_for_status()
        model = str(listed.json()["data"][0]["id"])
        async with asyncio.timeout(deadline):
            return await asyncio.gather(*(ask(client, url, model, p, tokens) for p in prompts))


def measure(
    url: str, prompts: Sequence[Sequence[int]], tokens: int, deadline: float
) -> dict[str, float]:
    """tok/s of all streams together, and quantiles of what a single one felt, in ms."""
    begin = time.perf_counter()
    streams = asyncio.run(ask_all(url, prompts, tokens, deadline))
    took = time.perf_counter() - begin
    short = [s.tokens for s in streams if s.tokens != tokens]
    if short:
        raise httpx.HTTPError(f"{url}: a stream had {short[0]} tokens, {tokens} were asked for")
    ttft = sorted(1e3 * s.first_s for s in streams)
    tpot = sorted(1e3 * (s.last_s - s.first_s) / (tokens - 1) for s in streams)
    return {
        "tok/s": sum(s.tokens for s in streams) / took,
        "ttft p50": quantile(ttft, 0.5),
        "ttft p99": quantile(ttft, 0.99),
        "tpot p50": quantile(tpot, 0.5),
        "tpot p99": quantile(tpot, 0.99),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that is not below ``share`` of them."""
    rank = -(-share * len(ordered) // 1)
    return ordered[max(0, int(rank) - 1)]


async def answers(url: str) -> bool:
    try:
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False
