"""Processes of one instance reach one another, strangers do not, and whoever is refused is told
what to change."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from moeserve.comm.control.rpc import (
    MOST_BYTES,
    Tls,
    Trust,
    greet,
    open_channel,
    open_server,
    proof_metadata,
    require_trust,
)
from moeserve.errors import ConfigError, MoeserveError, UnavailableError

WAIT_S = 20.0
SECRET = Trust(secret=b"known to the group alone")
RUN = b"0123456789abcdef"

Certify = Callable[..., Tls]


class Echo:
    """A service that says what it is told, and counts what reaches it."""

    def __init__(self) -> None:
        self.calls = 0
        self.streams = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            "echo",
            {
                "Say": grpc.unary_unary_rpc_method_handler(self._say),
                "SayAll": grpc.stream_stream_rpc_method_handler(self._say_all),
            },
        )

    async def _say(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        self.calls += 1
        return request

    async def _say_all(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        self.streams += 1
        async for request in requests:
            yield request


@contextlib.asynccontextmanager
async def serving(trust: Trust, run: bytes = RUN) -> AsyncIterator[tuple[Echo, int]]:
    echo = Echo()
    server, port = open_server("127.0.0.1", trust, run, [echo.handlers()])
    await server.start()
    try:
        yield echo, port
    finally:
        await server.stop(None)


async def say(port: int, trust: Trust, run: bytes = RUN, text: bytes = b"hello") -> bytes:
    name = trust.tls.name if trust.tls else ""
    async with open_channel("127.0.0.1", port, trust, name) as channel:
        method: Any = channel.unary_unary("/echo/Say")
        reply: bytes = await method(text, timeout=WAIT_S, metadata=proof_metadata(trust, run))
        return reply


async def meet(port: int, trust: Trust, run: bytes = RUN, name: str = "rank") -> None:
    async with open_channel("127.0.0.1", port, trust, name) as channel:
        await greet(channel, proof_metadata(trust, run), 3)


async def refusal(port: int, trust: Trust, run: bytes = RUN) -> MoeserveError:
    with pytest.raises(MoeserveError) as caught:
        await meet(port, trust, run)
    with pytest.raises(grpc.aio.AioRpcError):
        await say(port, trust, run)
    return caught.value


async def test_who_knows_the_secret_or_the_run_is_let_in() -> None:
    for trust in (SECRET, Trust()):
        async with serving(trust) as (echo, port):
            await meet(port, trust)
            assert await say(port, trust) == b"hello"
            assert echo.calls == 1


@pytest.mark.parametrize(
    ("theirs", "run"),
    [
        (Trust(secret=b"guessed"), RUN),
        (Trust(), RUN),
        (SECRET, b"another run"),
    ],
    ids=["another secret", "no secret", "another run"],
)
async def test_another_secret_or_run_is_refused_with_what_to_change(
    theirs: Trust, run: bytes
) -> None:
    async with serving(SECRET) as (echo, port):
        error = await refusal(port, theirs, run)
        assert isinstance(error, ConfigError)
        assert error.message == (
            "rank 3: the caller is not of this run: give all ranks the same ep_secret"
        )
        assert await say(port, SECRET) == b"hello"
        assert echo.calls == 1, "only who may reaches the service"


async def test_without_a_secret_other_runs_of_the_host_are_kept_apart() -> None:
    async with serving(Trust()) as (echo, port):
        assert isinstance(await refusal(port, Trust(), b"another run"), ConfigError)
        assert echo.calls == 0


async def test_a_proof_is_of_one_run() -> None:
    assert SECRET.proof(b"a") != SECRET.proof(b"b")
    assert SECRET.proof(b"a") != Trust(secret=b"x").proof(b"a") != Trust().proof(b"a")


async def test_no_proof_is_refused_before_anything_is_read() -> None:
    async with serving(SECRET) as (echo, port):
        async with open_channel("127.0.0.1", port, SECRET, "") as channel:
            asked: Any = channel.stream_stream("/echo/SayAll")
            silent = asked(timeout=WAIT_S)  # nothing is ever sent
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await silent.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            unknown: Any = channel.unary_unary("/no/Such")
            for metadata, code in (
                ((), grpc.StatusCode.UNAUTHENTICATED),
                ((("moeserve-proof", ""),), grpc.StatusCode.UNAUTHENTICATED),
                (proof_metadata(SECRET, RUN), grpc.StatusCode.UNIMPLEMENTED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await unknown(b"", timeout=WAIT_S, metadata=metadata)
                assert caught.value.code() is code, "strangers do not learn what there is"
        assert (echo.calls, echo.streams) == (0, 0)


async def test_bytes_that_are_no_http_do_not_keep_others_out() -> None:
    async with serving(SECRET) as (_, port):
        for words in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 64, b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(words)
        assert await say(port, SECRET) == b"hello"


async def test_messages_are_bounded() -> None:
    async with serving(SECRET) as (echo, port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_unary("/echo/Say")
            proof = proof_metadata(SECRET, RUN)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(bytes(MOST_BYTES + 1), timeout=WAIT_S, metadata=proof)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert echo.calls == 0
        large = bytes(5 << 20)
        assert await say(port, SECRET, text=large) == large, "gRPC's own bound is 4 MiB"


async def test_mutual_tls_lets_in_whom_the_authority_has_signed(certify: Certify) -> None:
    one, other = certify("a", "ours"), certify("b", "ours", "/CN=another name")
    async with serving(Trust(tls=one)) as (_, port):
        await meet(port, Trust(tls=other), name=one.name)
        assert (one.name, other.name) == ("rank", "another name")
        await meet(port, Trust(tls=one), name=one.name)
    with_secret = Trust(b"known to the group alone", one)
    async with serving(with_secret) as (_, port):
        await meet(port, with_secret, name=one.name)
        error = await refusal(port, Trust(b"guessed", one))
        assert "same ep_secret" in error.message


async def test_another_authority_is_refused_with_what_to_change(certify: Certify) -> None:
    ours, theirs = certify("a", "ours"), certify("b", "theirs")
    async with serving(Trust(tls=ours)) as (echo, port):
        error = await refusal(port, Trust(tls=theirs))
        assert isinstance(error, ConfigError)
        assert "rank 3: it and this rank do not trust one another" in error.message
        assert "certificates that one authority has signed (ep_tls)" in error.message
        assert echo.calls == 0


async def test_a_client_without_certificate_is_refused(certify: Certify) -> None:
    ours = certify("a", "ours")
    async with serving(Trust(tls=ours)) as (echo, port):
        plain = await refusal(port, SECRET)
        assert isinstance(plain, UnavailableError)
        assert "set ep_tls on all ranks or on none" in plain.message
        credentials = grpc.ssl_channel_credentials(ours.authority)
        options = [("grpc.ssl_target_name_override", "rank")]
        target = f"127.0.0.1:{port}"
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            with pytest.raises(MoeserveError, match="rank 3"):
                await greet(channel, proof_metadata(Trust(tls=ours), RUN), 3)
        assert echo.calls == 0


async def test_tls_against_a_plain_server_is_refused(certify: Certify) -> None:
    async with serving(SECRET) as (echo, port):
        error = await refusal(port, Trust(tls=certify("a", "ours")))
        assert isinstance(error, ConfigError)
        assert "do not trust one another" in error.message
        assert echo.calls == 0


async def test_a_rank_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match=r"rank 3: .*Connection refused"):
        await meet(port, SECRET)


def test_beyond_loopback_a_secret_or_tls_is_required() -> None:
    for host in ("10.0.0.1", "0.0.0.0", "::", "fe80::1", "127.example.org", "node-7"):
        with pytest.raises(ConfigError, match=r"which others can reach: set ep_tls, or ep_secret"):
            require_trust(host, Trust())
        require_trust(host, SECRET)
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        require_trust(host, Trust())


async def test_a_server_is_not_opened_where_it_may_not_or_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0, which others can reach"):
        open_server("0.0.0.0", Trust(), RUN, [])
    with pytest.raises(ConfigError, match=r"no port of 192\.0\.2\.7 can be opened"):
        open_server("192.0.2.7", SECRET, RUN, [])


def test_certificates_that_cannot_be_used_are_refused(tmp_path: Path, certify: Certify) -> None:
    with pytest.raises(ConfigError, match=r"cert.pem, key.pem and ca.pem cannot be used"):
        Tls.load(tmp_path / "nowhere")
    certify("a", "ours")
    certify("b", "theirs")
    mixed = tmp_path / "mixed"
    for name, source in (("cert.pem", "a"), ("key.pem", "a"), ("ca.pem", "b")):
        mixed.mkdir(exist_ok=True)
        shutil.copy(tmp_path / source / name, mixed / name)
    with pytest.raises(ConfigError, match=r"mixed.*cannot be used: .*verify failed"):
        Tls.load(mixed)
    shutil.copy(tmp_path / "b" / "key.pem", mixed / "key.pem")
    with pytest.raises(ConfigError, match=r"mixed.*cannot be used"):
        Tls.load(mixed)
    with pytest.raises(ConfigError, match=r"cert.pem is for no name"):
        certify("nameless", "ours", "/O=nobody")
