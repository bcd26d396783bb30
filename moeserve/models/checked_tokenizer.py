"""A tokenizer of a folder that nobody has vouched for: loaded by a process that may be ended, and
only then here."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moeserve.errors import DeadlineError, MoeserveError, TokenizerError
from moeserve.models.text_worker import PREPARING, text_program
from moeserve.models.tokenizer import Tokenizer
from moeserve.models.tokenizer_parts import REMEDY
from moeserve.process.job_worker import JobWorker, raise_failed
from moeserve.process.serve_jobs import JobLimits

# On a busy host; the process itself is bounded in processor time.
START_S = 120.0
# To compile the template, and to tokenise and render something short.
TRYING = JobLimits(memory_bytes=512 << 20, cpu_s=1)


def load_checked(path: str | Path, chat_template: Path | None = None) -> Tokenizer:
    """As ``Tokenizer.load``; TokenizerError too where that would take too long or too much."""
    folder = Path(path)
    try:
        # On a thread: callers may have a running loop.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _check(folder, chat_template)).result()
    except TokenizerError:
        raise
    except MoeserveError as error:
        reason = error.message.partition(": ")[0]
        raise TokenizerError(
            f"{folder}: tokenizer.json cannot be loaded within {PREPARING.cpu_s} s and "
            f"{PREPARING.memory_bytes >> 20} MiB, or it and the chat template not be used for a "
            f"short text within {TRYING.cpu_s} s and {TRYING.memory_bytes >> 20} MiB "
            f"({reason}); download them again, from whom you trust; {REMEDY}"
        ) from error
    return Tokenizer.load(folder, chat_template, compiled=False)


async def _check(folder: Path, chat_template: Path | None) -> None:
    program = text_program("loading the tokenizer", folder, chat_template, TRYING)
    worker = JobWorker(*program.start())
    try:
        async with asyncio.timeout(START_S):
            said, _ = await worker.receive()
            raise_failed(program.name, said)
            said, _ = await worker.ask({"do": "try"}, b"")
            raise_failed(program.name, said)
    except TimeoutError as late:
        raise DeadlineError(f"no answer within {START_S:g} s") from late
    finally:
        worker.end()
