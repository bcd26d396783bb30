"""A whole server in this process, on its own thread and loop, reached through real sockets."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
import httpx
import openai
import pytest

from moeserve.config.options import ServeConfig
from moeserve.engine.loop import Engine
from moeserve.gateway.server import OneProcess, ServedProcess, Server
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

PATIENCE_S = 60.0
SERVE = [sys.executable, "-m", "moeserve.cli", "serve", "--grpc-port", "0", "--http-port", "0"]


class House:
    """A running server and the clients that visit it."""

    def __init__(self, config: ServeConfig, process: ServedProcess | None = None) -> None:
        self._config = config
        self._process = process or OneProcess()
        self._ready = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="house")

    def __enter__(self) -> House:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S), "the server is not ready in time"
        if self._problem is not None:
            self._thread.join(PATIENCE_S)
            raise self._problem
        self.grpc_address = f"127.0.0.1:{self.server.grpc_port}"
        self.url = f"http://127.0.0.1:{self.server.http_port}"
        self.channel = grpc.insecure_channel(self.grpc_address)
        self.stub = InferenceStub(self.channel)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.openai.close()
        self.http.close()
        self.channel.close()
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not stop in time"
        if self._problem is not None:
            raise self._problem

    @property
    def engine(self) -> Engine:
        assert self.server.loaded is not None
        return self.server.loaded.engine

    def on_loop(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives on the server's own thread."""

        async def call() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def eventually(self, holds: Callable[[], bool], what: str) -> None:
        """Polls, for no longer than patience lasts."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}"
            time.sleep(0.01)

    def all_free(self) -> bool:
        load = self.engine.load()
        return load.running == load.waiting == 0 and load.free_blocks == load.total_blocks

    def tokens(self, prompt: list[int], max_tokens: int, **sampling: Any) -> list[int]:
        """A unary call over gRPC."""
        answer = self.stub.GenerateUnary(
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt),
                sampling=pb.SamplingParams(max_tokens=max_tokens, **sampling),
            ),
            timeout=PATIENCE_S,
        )
        return list(answer.outputs[0].token_ids)

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as problem:  # noqa: BLE001 - told to whoever entered
            self._problem = problem
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        async with Server(self._config, self._process) as self.server:
            await self.server.load()
            self._ready.set()
            await self._end.wait()


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("deepseek_v3")


@pytest.fixture(scope="session")
def open_house() -> Callable[..., House]:
    """A house for a model folder and settings, to be entered."""

    def build(model: Path, **settings: Any) -> House:
        defaults = {"model": str(model), "grpc_port": 0, "http_port": 0, "threads": 1}
        return House(ServeConfig.model_validate(defaults | settings))

    return build


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """``moeserve serve`` as a process of its own; where its doors are."""

    process: subprocess.Popen[str]
    grpc: str
    http: str


Serving = Callable[..., AbstractContextManager[ServerProcess]]


@contextmanager
def server_process(
    model: Path,
    *flags: str,
    num_blocks: int = 512,
    errors: IO[str] | int | None = None,
    files: int | None = None,
) -> Iterator[ServerProcess]:
    """Ready; it is ended if it still runs at the end. It may have so many ``files`` open."""
    command = [*SERVE, "--model", str(model), "--threads", "1"]
    command += ["--num-blocks", str(num_blocks), *flags]
    if files is not None:
        command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "-", *command]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        found = re.fullmatch(r"ready: model=\S+ grpc=(\S+) http=(http://\S+)\n", ready)
        assert found is not None, ready
        yield ServerProcess(process, found[1], found[2])
        process.terminate()
        process.wait(PATIENCE_S)
        assert process.stdout.read() == "", "one line is all that goes to stdout"
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


@pytest.fixture
def serving() -> Serving:
    return server_process


@pytest.fixture(scope="module")
def house(tiny: Path, open_house: Callable[..., House]) -> Iterator[House]:
    """One that a module's tests share, and leave as they found it."""
    with open_house(tiny, served_model_name="tiny", num_blocks=512) as house:
        yield house
        house.eventually(house.all_free, "every block is free")
