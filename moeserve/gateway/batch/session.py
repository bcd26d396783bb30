"""The model, the service and the application of the HTTP door, for the length of a batch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from moeserve.config.options import BatchConfig
from moeserve.engine.build import LoadedModel, build_engine
from moeserve.forecast.step_costs import predicted_steps
from moeserve.gateway.batch.lines import read_lines
from moeserve.gateway.batch.outputs import Outputs
from moeserve.gateway.batch.progress import BatchProgress, Done, Tokens
from moeserve.gateway.batch.run import BatchRun
from moeserve.gateway.http.app import http_app
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.server import served_of
from moeserve.gateway.service import InferenceService
from moeserve.models.library import with_model_here
from moeserve.observe.loading import shown_progress
from moeserve.observe.metrics import Metrics

SHOW_S = 0.5


def run_batch(config: BatchConfig, path: Path, outputs: Outputs, progress: BatchProgress) -> Done:
    """Loads the model and answers all lines of ``path`` that ``outputs`` has no answer to. SIGINT
    and SIGTERM end it early, with what is answered by then."""
    # Long texts go to processes of their own: no threads beside the model's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    metrics = Metrics()
    with shown_progress() as loading:
        here = with_model_here(config)
        cost = predicted_steps(here)
        loaded = build_engine(here, observer=metrics, progress=loading, cost=cost)
    complete = asyncio.run(_serve(config, loaded, metrics, path, outputs, progress))
    counters = loaded.engine.counters
    return Done(complete, counters.steps, counters.preemptions)


async def _serve(
    config: BatchConfig,
    loaded: LoadedModel,
    metrics: Metrics,
    path: Path,
    outputs: Outputs,
    progress: BatchProgress,
) -> bool:
    """Whether all lines are answered."""
    service = InferenceService(Mailbox(asyncio.get_running_loop()), strict=config.strict)
    try:
        service.serve(served_of(loaded, config))
        service.texts.warm_up()
        progress.tokens = lambda: Tokens(*service.tokens)

        async def page() -> tuple[bytes, str]:
            return metrics.render()

        app = http_app(service, None, page)
        run = BatchRun(app, service, outputs, loaded.config.max_queue, progress)
        with progress, _stopped_by_signals():
            async with _shown(progress, outputs):
                with contextlib.closing(read_lines(path)) as lines:
                    await run.run(lines)
    except asyncio.CancelledError:
        return False
    finally:
        await service.texts.close()
        # While the loop still runs, for the engine's last events go through it.
        await asyncio.to_thread(loaded.close)
    return True


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Cancels this task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "in a task"
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def _shown(progress: BatchProgress, outputs: Outputs) -> AsyncIterator[None]:
    """Shows progress, and brings what was written to the disk, while the body runs."""

    async def keep_on() -> None:
        while True:
            await asyncio.sleep(SHOW_S)
            progress.show()
            await asyncio.to_thread(outputs.sync_if_due)

    showing = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.wait({showing})
