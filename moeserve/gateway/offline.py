"""One answer without a server: the service and engine of the doors, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeserve.config.options import EngineOptions, RankModelOptions
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.server import served_of
from moeserve.gateway.service import ClientRequest, InferenceService
from moeserve.observe.loading import shown_progress
from moeserve.observe.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Completion:
    """Seconds: submission to first token, and the mean between tokens after it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    prompt_tokens: int
    ttft_s: float
    tpot_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    options: RankModelOptions,
    prompt: str | tuple[int, ...],
    params: Mapping[str, object],
    show: Callable[[str], None] | None = None,
) -> Completion:
    """Loads the model, answers, and ends; ``show`` gets the text as it comes.

    Raises what the doors would answer with: InvalidRequestError, TokenizerError and so on.
    """
    chosen = {name: getattr(options, name) for name in RankModelOptions.model_fields}
    with shown_progress() as progress:
        loaded = build_engine(EngineOptions(**chosen), observer=Metrics(), progress=progress)
    return asyncio.run(_run(loaded, ClientRequest((prompt,), params), show or (lambda text: None)))


async def _run(loaded: LoadedModel, ask: ClientRequest, show: Callable[[str], None]) -> Completion:
    service = InferenceService(Mailbox(asyncio.get_running_loop()))
    try:
        return await _answer(service, loaded, ask, show)
    finally:
        await service.texts.close()
        # While the loop still runs, for the engine's last events go through it.
        await asyncio.to_thread(loaded.close)


async def _answer(
    service: InferenceService,
    loaded: LoadedModel,
    ask: ClientRequest,
    show: Callable[[str], None],
) -> Completion:
    service.serve(served_of(loaded))
    text: list[str] = []
    ids: list[int] = []
    async with await service.open(ask) as stream:
        async for delta in stream:
            text.append(delta.text)
            ids += delta.token_ids
            show(delta.text)
            if delta.finish is not None:
                assert delta.usage is not None and delta.timing is not None
                return Completion(
                    token_ids=tuple(ids),
                    text="".join(text),
                    finish_reason=str(delta.finish),
                    prompt_tokens=delta.usage.prompt_tokens,
                    ttft_s=delta.timing.ttft_s,
                    tpot_s=delta.timing.tpot_s,
                )
    raise AssertionError("a stream ended without a finish")
