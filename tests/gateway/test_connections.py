"""What a stranger can do with sockets at the HTTP door: real ones, that are slow or never end."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from moeserve.gateway.http import acceptor, protocol, server
from moeserve.gateway.http.log_rate import BURST, LogRate
from moeserve.gateway.http.phases import FRESH_S, ConnectionPhase
from moeserve.pb import inference_pb2 as pb

House = Any
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
PATIENCE_S = 60.0


@contextmanager
def client(house: House) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", house.server.http_port), timeout=PATIENCE_S) as s:
        yield s


def ended(connection: socket.socket, trickle: bytes = b"") -> bytes:
    """What was answered until the server closed, while a byte of ``trickle`` goes out at a time."""
    said = b""
    connection.settimeout(0.05)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline, "the server closes"
        try:
            connection.sendall(trickle)
            if not (data := connection.recv(65536)):
                return said
            said += data
        except TimeoutError:
            continue
        except OSError:
            return said


def http_of(house: House) -> Any:
    return house.server._entrance.http


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_S", "BODY_LIMIT_S", "STALLED_S", "LEAVING_S", "SWEEP_S"):
        monkeypatch.setattr(server, name, 0.3)


@pytest.mark.parametrize(
    ("begun", "trickle", "answer"),
    [
        (b"", b"", b""),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"a", b""),
        (HEAD + b"content-length: 100000\r\n\r\n", b" ", b"HTTP/1.1 504"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", b"HTTP/1.1 504"),
        # Answered at once, for there is no such route; what still comes is not waited for.
        (HEAD.replace(b"completions", b"none") + b"content-length: 99999\r\n\r\n", b" ", b"HTTP/1"),
    ],
    ids=["silent", "head", "body", "chunks", "after the answer"],
)
def test_what_trickles_in_is_closed(
    tiny: Path,
    open_house: Callable[..., House],
    quick: None,
    begun: bytes,
    trickle: bytes,
    answer: bytes,
) -> None:
    with open_house(tiny, num_blocks=64, idle_timeout_s=1, grpc_port=None) as house:
        with client(house) as stranger:
            stranger.sendall(begun)
            assert ended(stranger, trickle).startswith(answer)
        assert house.http.get("/health").status_code == 200


def test_who_does_not_read_is_closed(
    tiny: Path, open_house: Callable[..., House], quick: None
) -> None:
    with open_house(tiny, num_blocks=64, grpc_port=None) as house, client(house) as stranger:
        phases = http_of(house).phases
        stranger.setblocking(False)
        asked = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100

        def stalled() -> bool:
            with suppress(BlockingIOError):
                stranger.send(asked)
            return bool(phases.count(ConnectionPhase.STALLED))

        house.eventually(stalled, "its answers are not read")
        assert phases.held_bytes > 0
        house.eventually(lambda: not len(phases), "it was closed")
        assert phases.held_bytes == 0


def test_bodies_of_all_are_bounded_together(
    tiny: Path, open_house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_HELD_BYTES", 2**20)
    monkeypatch.setattr(server, "LEAVING_S", 0.3)
    with open_house(tiny, num_blocks=64, grpc_port=None) as house:
        phases = http_of(house).phases
        begun = HEAD + b"content-length: 600000\r\n\r\n" + b" " * 590_000
        with client(house) as first, client(house) as second:
            first.sendall(begun)
            house.eventually(lambda: phases.held_bytes > 580_000, "half is held")
            second.sendall(begun)
            refused = ended(second)
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1" in refused
            assert b'"code": "unavailable"' in refused
            assert phases.held_bytes <= 2**20
            # A small one still comes in beside it.
            tokens = house.http.post("/detokenize", json={"tokens": [72]})
            assert tokens.status_code == 200
            first.sendall(b" " * 10_000)
            assert first.recv(65536).startswith(b"HTTP/1.1 400")
        house.eventually(lambda: phases.held_bytes == 0, "nothing is held")


def test_the_longest_idle_gives_way(tiny: Path, open_house: Callable[..., House]) -> None:
    with (
        open_house(tiny, num_blocks=64, max_connections=8, grpc_port=None) as house,
        ExitStack() as stack,
    ):
        opened = [stack.enter_context(client(house)) for _ in range(8)]
        house.eventually(lambda: len(http_of(house).phases) == 8, "all are in")
        time.sleep(FRESH_S)
        assert httpx.get(f"{house.url}/health", timeout=PATIENCE_S).status_code == 200
        assert ended(opened[0]) == b""
        opened[7].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert opened[7].recv(4096).startswith(b"HTTP/1.1 200")
        assert http_of(house).evicted == 1
        page = house.http.get("/metrics").text
        assert 'moeserve_connections_evicted_total{door="http"}' in page


def test_those_being_served_never_give_way(tiny: Path, open_house: Callable[..., House]) -> None:
    """More connections than there may be, all of which ask: every one is answered."""
    with open_house(tiny, num_blocks=512, max_connections=8, grpc_port=None) as house:
        ask = {"prompt": [72], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        texts = set()
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=0)
        with (
            httpx.Client(base_url=house.url, timeout=PATIENCE_S, limits=limits) as http,
            ThreadPoolExecutor(32) as pool,
        ):
            for answer in pool.map(lambda _: http.post("/v1/completions", json=ask), range(32)):
                assert answer.status_code == 200
                texts.add(answer.json()["choices"][0]["text"])
        assert len(texts) == 1


def test_descriptors_that_run_out_are_a_line_and_not_the_end(
    tiny: Path,
    open_house: Callable[..., House],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_house(tiny, num_blocks=64, grpc_port=None) as house:
        listening = http_of(house)._acceptor._listening
        failures = iter([OSError(24, "Too many open files")] * 40)

        class Failing:
            def accept(self) -> Any:
                for error in failures:
                    raise error
                return listening.accept()

            def fileno(self) -> int:
                return int(listening.fileno())

        monkeypatch.setattr(acceptor, "RETRY_S", 0.01)
        house.on_loop(lambda: setattr(http_of(house)._acceptor, "_listening", Failing()))
        assert httpx.get(f"{house.url}/health", timeout=PATIENCE_S).status_code == 200
    said = [r for r in caplog.records if "cannot accept" in r.message]
    assert 1 <= len(said) <= BURST
    assert "Traceback" not in caplog.text


def test_what_was_left_out_of_the_log_is_counted() -> None:
    now = [0.0]
    rate = LogRate((), clock=lambda: now[0])

    def passes(text: str) -> bool:
        record = logging.LogRecord("a", logging.WARNING, "", 0, text, (), None)
        let = rate.filter(record)
        said.append(record.getMessage() if let else "")
        return let

    said: list[str] = []
    assert [passes("x") for _ in range(25)].count(True) == BURST
    assert passes("another")
    now[0] += 61
    assert passes("x")
    assert said[-1] == "x (and 15 times before, not logged)"


def test_every_refusal_of_a_crowd_on_one_channel_has_its_detail(
    tiny: Path, open_house: Callable[..., House]
) -> None:
    """gRPC's own queue of calls ends some as CANCELLED where it is left as it is."""
    from google.rpc import error_details_pb2, status_pb2

    with open_house(tiny, num_blocks=64, max_queue=8, max_num_seqs=2) as house:
        ask = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[72]), sampling=pb.SamplingParams(max_tokens=64)
        )
        calls = [house.stub.GenerateUnary.future(ask, timeout=PATIENCE_S) for _ in range(2000)]
        refused = 0
        for call in calls:
            if call.exception(PATIENCE_S) is None:
                continue
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "requests are waiting" in call.details()
            trailers = dict(call.trailing_metadata())
            status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == ("RESOURCE_EXHAUSTED", "moeserve")
            assert status.details[1].Unpack(retry)
            assert retry.retry_delay.seconds == 1
            refused += 1
        assert refused > 1000
        house.eventually(house.all_free, "every block is free")


@pytest.mark.long
def test_pings_without_calls_are_taken(tiny: Path, open_house: Callable[..., House]) -> None:
    """As clients send them every few seconds; too many would end the connection (GOAWAY)."""
    with open_house(tiny, num_blocks=64) as house:
        options = (
            ("grpc.keepalive_time_ms", 2500),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        )
        states = []
        with grpc.insecure_channel(house.grpc_address, options) as channel:
            grpc.channel_ready_future(channel).result(PATIENCE_S)
            channel.subscribe(states.append)
            time.sleep(11)  # a fourth ping would be the last of those that come too soon
            assert set(states) == {grpc.ChannelConnectivity.READY}
