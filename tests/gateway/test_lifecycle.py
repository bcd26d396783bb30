"""Loading, draining and refusing, seen from a server in this process."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve.config.options import ServeConfig
from moeserve.errors import CancelledError, CheckpointError, ConfigError, MoeserveError
from moeserve.gateway.server import OneProcess, Server
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from conftest import House

    OpenHouse = Callable[..., House]

HI = pb.TokenIds(ids=[72, 105])
LONG = pb.SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)
SHORT = pb.SamplingParams(max_tokens=2, ignore_eos=True)


class Loads(OneProcess):
    """Loads as it is told."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load = load

    def load(self, *given: Any) -> Any:
        return self._load(*given)


def health_of(house: House) -> int:
    stub = health_pb2_grpc.HealthStub(house.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status)


def test_while_draining_new_requests_are_refused_and_running_ones_finish(
    tiny: Path, open_house: OpenHouse
) -> None:
    with open_house(tiny, num_blocks=512) as house:
        stream = house.stub.Generate(
            pb.GenerateRequest(token_ids=HI, sampling=LONG, n=4), timeout=60
        )
        first = next(iter(stream))
        drained = asyncio.run_coroutine_threadsafe(house.server.drain(60), house.loop)
        house.eventually(
            lambda: health_of(house) == health_pb2.HealthCheckResponse.NOT_SERVING, "draining"
        )
        with pytest.raises(grpc.RpcError) as caught:
            house.stub.GenerateUnary(pb.GenerateRequest(token_ids=HI, sampling=SHORT), timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        refused = house.http.post("/v1/completions", json={"prompt": [72]})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert house.http.get("/ready").status_code == 503
        assert house.http.get("/health").status_code == 200
        assert not drained.done()
        rest = list(stream)
        assert len(first.token_ids) + sum(len(c.token_ids) for c in rest) == 4 * 480
        drained.result(60)
        house.eventually(house.all_free, "drained")


def test_a_server_that_stops_ends_its_streams_with_unavailable(
    tiny: Path, open_house: OpenHouse
) -> None:
    with open_house(tiny, num_blocks=512) as house:
        request = pb.GenerateRequest(token_ids=HI, sampling=LONG, n=16)
        by_grpc = iter(house.stub.Generate(request, timeout=60))
        next(by_grpc)
        body = {"prompt": [72], "max_tokens": 480, "n": 16, "stream": True, "ignore_eos": True}
        with house.http.stream("POST", "/v1/completions", json=body) as by_http:
            lines = by_http.iter_lines()
            next(lines)
            house.loop.call_soon_threadsafe(house._end.set)
            with pytest.raises(grpc.RpcError) as caught:
                list(by_grpc)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            last = [line for line in lines if line][-1]
        assert '"code": "unavailable"' in last


def test_while_loading_the_doors_answer_unavailable(tiny: Path) -> None:
    may_load = threading.Event()

    def slow(*given: Any) -> Any:
        assert may_load.wait(60)
        return OneProcess().load(*given)

    async def visit() -> None:
        config = ServeConfig(model=str(tiny), grpc_port=0, http_port=0, threads=1)
        async with (
            Server(config, Loads(slow)) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http,
        ):
            loading = asyncio.create_task(server.load())
            stub: Any = InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            health = health_pb2_grpc.HealthStub(channel)
            status = await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert status.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await http.get("/ready")).json() == {"status": "loading"}
            assert (await http.get("/v1/models")).status_code == 503
            assert (await http.get("/metrics")).status_code == 200
            may_load.set()
            await loading
            assert (await http.get("/ready")).status_code == 200

    asyncio.run(visit())


async def test_a_signal_while_loading_interrupts_it(tiny: Path) -> None:
    stop = asyncio.Event()

    def interrupted(config: ServeConfig, metrics: Any, tell: Any, loop: Any) -> Any:
        loop.call_soon_threadsafe(stop.set)
        for done in range(10**9):
            tell(done, 10**9)
        raise AssertionError("never interrupted")

    config = ServeConfig(model=str(tiny), grpc_port=0, http_port=0)
    async with Server(config, Loads(interrupted)) as server:
        with pytest.raises(CancelledError, match="stopped while loading"):
            await server.load(stop)


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_a_taken_port_is_named_before_anything_is_loaded(door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = ServeConfig.model_validate(
            {"model": "nowhere", "grpc_port": 0, "http_port": 0} | {f"{door}_port": port}
        )
        with pytest.raises(
            ConfigError, match=f"{door}_port={port}: .*choose another --{door}-port"
        ):
            async with Server(config):
                raise AssertionError("it started")


def test_a_body_that_never_ends_is_answered_when_the_server_stops(
    tiny: Path,
    open_house: OpenHouse,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("moeserve.gateway.server.FAREWELL_S", 1.0)
    with open_house(tiny, num_blocks=64) as house:
        address = ("127.0.0.1", house.server.http_port)
        client = socket.create_connection(address, timeout=60)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        )
        client.sendall(f'{head}content-length: 99\r\n\r\n{{"prompt"'.encode())
        house.http.get("/health")
    with client:
        assert client.recv(4096).startswith(b"HTTP/1.1 503")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_an_address_of_another_machine_is_named(door: str) -> None:
    ports: dict[str, Any] = {"grpc_port": None, "http_port": None, f"{door}_port": 0}
    # Of a net that is set aside for documents, so no machine has it.
    config = ServeConfig.model_validate({"host": "192.0.2.1", "api_key": "sesame-sesame"} | ports)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.*(--host|address of this machine)"):
        async with Server(config):
            raise AssertionError("it started")


def test_a_server_does_not_outlive_its_engine(
    tiny: Path, open_house: OpenHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_house(tiny, num_blocks=64) as house:
        ended = asyncio.run_coroutine_threadsafe(
            house.server.outlived_by(asyncio.Event()), house.loop
        )
        monkeypatch.setattr(house.engine, "_step", lambda: 1 // 0)
        with pytest.raises(grpc.RpcError):
            house.stub.GenerateUnary(pb.GenerateRequest(token_ids=HI, sampling=SHORT), timeout=60)
        assert not ended.result(60)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_architecture(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("DeepseekV3ForCausalLM", "NovelForCausalLM"))


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (break_config, "config.json"),
        (break_architecture, "NovelForCausalLM"),
        (truncate_weights, "model.safetensors"),
        (remove_weights, "safetensors"),
        (shutil.rmtree, "no such folder"),
    ],
)
async def test_broken_checkpoints_are_explained(
    tiny: Path, tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    harm(folder)
    config = ServeConfig(model=str(folder), grpc_port=0, http_port=0)
    async with Server(config) as server:
        with pytest.raises(CheckpointError, match=says):
            await server.load()


def test_without_a_tokenizer_token_ids_are_served_and_text_is_refused(
    tiny: Path, tmp_path: Path, open_house: OpenHouse
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").unlink()
    with open_house(folder, num_blocks=64) as house:
        assert len(house.tokens([72, 105], 5, ignore_eos=True)) == 5
        assert not house.stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=60).has_tokenizer
        for request in (
            pb.GenerateRequest(text="hi"),
            pb.GenerateRequest(token_ids=HI, sampling=pb.SamplingParams(stop=["x"])),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                house.stub.GenerateUnary(request, timeout=60)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no tokenizer" in caught.value.details()
        for path, body in (
            ("/v1/completions", {"prompt": "hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/tokenize", {"prompt": "hi"}),
            ("/detokenize", {"tokens": [72]}),
        ):
            answer = house.http.post(path, json=body)
            assert answer.status_code == 400
            assert "no tokenizer" in answer.json()["error"]["message"]
        body = {"prompt": [72], "logprobs": 1, "max_tokens": 2, "ignore_eos": True}
        logprobs = house.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        assert all(token.startswith("token_id:") for token in logprobs["tokens"])


def test_another_chat_template_may_be_given(
    tiny: Path, tmp_path: Path, open_house: OpenHouse
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with open_house(tiny, num_blocks=64, chat_template=str(template)) as house:
        messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        found = house.http.post("/tokenize", json={"messages": messages}).json()
        assert bytes(found["tokens"]) != b""
        back = house.http.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back["prompt"] == "[a][b]"


def test_a_full_queue_exhausts_and_keeps_nothing(tiny: Path, open_house: OpenHouse) -> None:
    with open_house(tiny, num_blocks=64, max_num_seqs=1, max_queue=2) as house:
        running = house.stub.Generate(pb.GenerateRequest(token_ids=HI, sampling=LONG), timeout=60)
        next(iter(running))
        with pytest.raises(grpc.RpcError) as caught:
            house.stub.GenerateUnary(
                pb.GenerateRequest(token_ids=HI, sampling=LONG, n=4), timeout=60
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        full = house.http.post("/v1/completions", json={"prompt": [72], "n": 4})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert full.json()["error"]["type"] == "rate_limit_error"
        running.cancel()
        house.eventually(house.all_free, "the queue is empty again")
        assert len(house.tokens([72], 2, ignore_eos=True)) == 2


def test_out_of_kv_memory_is_an_error_of_its_own_and_serving_goes_on(
    tiny: Path, open_house: OpenHouse
) -> None:
    with open_house(tiny, num_blocks=4) as house:  # 64 tokens
        with pytest.raises(grpc.RpcError) as caught:
            house.tokens([1] * 100, 5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "out of KV memory: the prompt has 100 tokens" in caught.value.details()
        assert "--kv-memory (the model itself allows 512 tokens)" in caught.value.details()
        body = {"prompt": [1] * 60, "max_tokens": 10}
        full = httpx.post(f"{house.url}/v1/completions", json=body, timeout=60)
        assert full.status_code == 429, full.text
        assert "out of KV memory: the prompt has 60 tokens" in full.json()["error"]["message"]
        with pytest.raises(grpc.RpcError) as caught:
            house.tokens([1] * 600, 5)  # more than the model takes, whatever the memory
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        many = [pb.GenerateRequest(token_ids=pb.TokenIds(ids=[i] * 40), n=3) for i in range(3)]
        for future in [house.stub.GenerateUnary.future(r, timeout=60) for r in many]:
            assert len(future.result(60).outputs) == 3  # by turns, however little memory
        house.eventually(house.all_free, "nothing is left")


def test_with_an_api_key_only_health_is_open(tiny: Path, open_house: OpenHouse) -> None:
    with open_house(tiny, num_blocks=64, api_key="open sesame") as house:
        right, wrong = "Bearer open sesame", "Bearer close sesame"
        request = pb.GenerateRequest(token_ids=HI, sampling=SHORT)
        for metadata in ((), (("authorization", wrong),)):
            for call in (
                lambda m: house.stub.GenerateUnary(request, timeout=60, metadata=m),
                lambda m: list(house.stub.Generate(request, timeout=60, metadata=m)),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call(metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = house.stub.GenerateUnary(request, timeout=60, metadata=(("authorization", right),))
        assert len(answer.outputs[0].token_ids) == 2
        assert health_of(house) == health_pb2.HealthCheckResponse.SERVING

        for path in ("/v1/models", "/metrics", "/version", "/tokenize", "/nowhere"):
            for headers in ({}, {"authorization": wrong}, {"authorization": "open sesame"}):
                refused = house.http.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "unauthenticated"
        assert house.http.get("/v1/models", headers={"authorization": right}).status_code == 200
        assert house.http.get("/health").status_code == 200
        assert house.http.get("/ready").status_code == 200


def test_a_bug_is_internal_and_tells_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(house.server.service, "open", broken)
    with pytest.raises(grpc.RpcError) as caught:
        house.stub.GenerateUnary(pb.GenerateRequest(token_ids=HI), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    answer = house.http.post("/v1/completions", json={"prompt": [72]})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text + caught.value.details()
    assert caplog.text.count("a secret detail") >= 2


def test_routing_is_recorded_while_serving(
    tiny: Path, tmp_path: Path, open_house: OpenHouse
) -> None:
    from safetensors.numpy import load_file

    trace = tmp_path / "trace.safetensors"
    with open_house(tiny, num_blocks=64, record_routing=str(trace)) as house:
        for domain in ("story", "sums"):
            house.stub.GenerateUnary(
                pb.GenerateRequest(token_ids=HI, sampling=SHORT, domain=domain), timeout=60
            )
    assert len(load_file(trace)["seq_lens"]) == 2


def test_errors_of_ours_map_to_statuses_that_exist() -> None:
    kinds = [MoeserveError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        assert grpc.StatusCode[kind.code]
        assert 400 <= kind.http_status < 600
