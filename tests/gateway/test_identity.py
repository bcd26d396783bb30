"""Who may call, by which name, over what: keys, tenants, hosts, origins, certificates."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.cli import main
from moeserve.errors import ConfigError
from moeserve.gateway.http.guards import HostRules, host_rules
from moeserve.gateway.trust.certificates import ServerTls
from moeserve.gateway.trust.file_watch import FileWatch
from moeserve.gateway.trust.identity import Tenants, read_keys, tenant_salt
from moeserve.pb import inference_pb2 as pb
from moeserve.pb.inference_pb2_grpc import InferenceStub

House = Any
OpenHouse = Callable[..., House]
PATIENCE_S = 60.0
KEYS = "# who\nalice: key-of-alice\n\nbob:key:of:bob\n"
PROMPT = list(range(1, 65))
COMPLETION = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def sample(page: str, name: str) -> float:
    found = [line for line in page.splitlines() if line.startswith(name)]
    assert len(found) == 1, page
    return float(found[0].rsplit(" ", 1)[1])


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    return file


def test_each_key_is_a_tenant_with_a_cache_of_its_own(
    tiny: Path, open_house: OpenHouse, key_file: Path
) -> None:
    settings = {"api_key_file": str(key_file), "api_key": "key-of-all", "block_size": 16}
    with open_house(tiny, num_blocks=256, **settings) as house:
        cached = {}
        for key in ("key-of-alice", "key-of-alice", "key:of:bob", "key-of-all"):
            answer = house.http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
            assert answer.status_code == 200, answer.text
            details = answer.json()["usage"]["prompt_tokens_details"]
            cached.setdefault(key, []).append(details["cached_tokens"])
        assert cached == {"key-of-alice": [0, 48], "key:of:bob": [0], "key-of-all": [0]}
        # Through the other door alice is the same.
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=2)
        )
        metadata = (("authorization", "Bearer key-of-alice"),)
        made = house.stub.GenerateUnary(request, timeout=PATIENCE_S, metadata=metadata)
        assert made.outputs[0].usage.cached_tokens == 48
        # And bob does not come near her with a salt that he chooses.
        salts = (tenant_salt("alice", ""), "alice", "alice\0")
        for salt in salts:
            asked = {**COMPLETION, "cache_salt": salt}
            answer = house.http.post("/v1/completions", json=asked, headers=bearer("key:of:bob"))
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        page = house.http.get("/metrics", headers=bearer("key:of:bob")).text
        assert sample(page, 'moeserve_tenant_requests_total{tenant="alice"}') == 3
        assert sample(page, 'moeserve_tenant_requests_total{tenant="bob"}') == 4
        assert sample(page, 'moeserve_tenant_requests_total{tenant="default"}') == 1
        assert sample(page, 'moeserve_tenant_prompt_tokens_total{tenant="bob"}') == 4 * 64
        assert sample(page, 'moeserve_tenant_generated_tokens_total{tenant="alice"}') == 6


def test_a_tenant_cannot_end_what_another_runs(
    tiny: Path, open_house: OpenHouse, key_file: Path
) -> None:
    with open_house(tiny, num_blocks=256, api_key_file=str(key_file)) as house:
        alice, bob = ((("authorization", f"Bearer {key}"),) for key in KEYS_OF)
        request = pb.GenerateRequest(
            request_id="hers",
            token_ids=pb.TokenIds(ids=[72]),
            sampling=pb.SamplingParams(max_tokens=400, ignore_eos=True),
        )
        stream = iter(house.stub.Generate(request, timeout=PATIENCE_S, metadata=alice))
        next(stream)
        abort = pb.AbortRequest(request_id="hers")
        with pytest.raises(grpc.RpcError) as caught:
            house.stub.Abort(abort, timeout=PATIENCE_S, metadata=bob)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        house.stub.Abort(abort, timeout=PATIENCE_S, metadata=alice)
        with pytest.raises(grpc.RpcError):
            list(stream)


KEYS_OF = ("key-of-alice", "key:of:bob")


def test_keys_change_while_serving(
    tiny: Path, open_house: OpenHouse, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeserve.gateway.trust.file_watch.LOOK_S", 0.05)
    with open_house(tiny, num_blocks=64, api_key_file=str(key_file), grpc_port=None) as house:

        def status(key: str) -> int:
            return int(house.http.get("/v1/models", headers=bearer(key)).status_code)

        assert (status("key-of-alice"), status("key-of-carol")) == (200, 401)
        key_file.write_text("carol:key-of-carol\n")
        house.eventually(lambda: status("key-of-carol") == 200, "the new key is known")
        assert status("key-of-alice") == 401
        key_file.write_text("no key at all\n")
        os.utime(key_file, ns=(1, 1))
        assert status("key-of-carol") == 200  # what was read before stays in use


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 0 keys"),
        ("alice", "line 1"),
        ("alice:short", "8 to 512"),
        ("alice:with spaces in it", "8 to 512"),
        ("a:11111111\na:22222222", "line 2"),
        ("a:11111111\nb:11111111", "line 2"),
        ("a b:11111111", "expected NAME:KEY"),
        ("a:" + "1" * 600, "8 to 512"),
    ],
)
def test_a_file_of_keys_is_refused_by_line_and_shows_no_key(
    tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_keys(file)
    assert "1111" not in caught.value.message
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


@given(
    st.dictionaries(st.text(min_size=1), st.text(min_size=8), max_size=5), st.binary(max_size=30)
)
def test_a_key_is_its_tenants_and_nobody_elses(keys: dict[str, str], other: bytes) -> None:
    unique = {key: name for name, key in keys.items()}
    tenants = Tenants({name: key for key, name in unique.items()})
    for key, name in unique.items():
        assert tenants.of(f"Bearer {key}".encode()) == name
    if other not in {f"Bearer {key}".encode() for key in unique}:
        assert tenants.of(other) is None


def test_another_hosts_name_is_refused_on_loopback(tiny: Path, open_house: OpenHouse) -> None:
    with open_house(tiny, num_blocks=64, grpc_port=None) as house:
        port = house.server.http_port
        for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}", "a.localhost", "127.9.9.9"):
            assert house.http.get("/health", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "10.0.0.1",
            "localhost.evil",
            "[",
            "@",
        ):
            refused = house.http.get("/v1/models", headers={"host": host})
            assert refused.status_code == 403, host
            assert refused.json()["error"]["code"] == "permission_denied"
        headers = {"origin": f"http://localhost:{port}"}
        assert house.http.get("/v1/models", headers=headers).status_code == 200
        for origin in ("http://evil.example", "null", "file://", "http://127.0.0.1.evil.example"):
            for path in ("/v1/models", "/v1/completions"):
                refused = house.http.post(path, headers={"origin": origin}, json=COMPLETION)
                assert refused.status_code == 403, origin
                assert "access-control-allow-origin" not in refused.headers


def test_pages_that_were_named_may_call_and_read(tiny: Path, open_house: OpenHouse) -> None:
    page = "https://chat.example"
    settings = {"allowed_origins": f"{page}, https://b.example", "api_key": "key-of-all"}
    with open_house(tiny, num_blocks=64, grpc_port=None, **settings) as house:
        preflight = house.http.options(
            "/v1/chat/completions",
            headers={
                "origin": page,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization, content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        answer = house.http.get("/v1/models", headers={"origin": page, **bearer("key-of-all")})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == page
        unknown = house.http.get("/v1/models", headers={"origin": page})
        assert unknown.status_code == 401
        assert unknown.headers["access-control-allow-origin"] == page
        other = house.http.get("/v1/models", headers={"origin": "https://c.example"})
        assert other.status_code == 403


def test_hosts_of_addresses_that_others_reach() -> None:
    anybody = host_rules("0.0.0.0", False, (), ())
    assert anybody.takes_host("whatever.example")
    assert anybody.takes_origin("http://a.example:8000", "a.example:8000")
    assert not anybody.takes_origin("http://b.example", "a.example")
    named = host_rules("0.0.0.0", False, ("api.example",), ())
    assert named.takes_host("API.example.:8000")
    assert not named.takes_host("other.example")
    assert host_rules("127.0.0.1", True, ("*",), ()).takes_host("evil.example")
    assert HostRules(None, frozenset({"*"})).takes_origin("null", "x")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    assert main(["certs", "--out", str(folder)]) == 0
    return folder


def visit(house: House, ca: Path, client: Path | None = None) -> tuple[str, int]:
    """A generation over each door, with a certificate where ``client`` has one."""
    context = ssl.create_default_context(cafile=ca)
    pair = (None, None)
    if client is not None:
        context.load_cert_chain(client / "client-cert.pem", client / "client-key.pem")
        pair = (
            (client / "client-key.pem").read_bytes(),
            (client / "client-cert.pem").read_bytes(),
        )
    url = house.url.replace("http:", "https:")
    answer = httpx.post(
        f"{url}/v1/completions", json=COMPLETION, verify=context, timeout=PATIENCE_S
    )
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
    with grpc.secure_channel(house.grpc_address, credentials) as channel:
        made = InferenceStub(channel).GenerateUnary(
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=2)
            ),
            timeout=10,
        )
    return answer.json()["choices"][0]["text"], len(made.outputs[0].token_ids)


def test_both_doors_speak_tls_and_take_new_certificates(
    tiny: Path,
    open_house: OpenHouse,
    certs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeserve.gateway.trust.file_watch.LOOK_S", 0.05)
    used = tmp_path / "used"
    shutil.copytree(certs, used)
    settings = {"tls_cert": str(used / "cert.pem"), "tls_key": str(used / "key.pem")}
    with open_house(tiny, num_blocks=64, **settings) as house:
        assert str(house.server).count("https://") == 1
        assert visit(house, certs / "ca.pem")[1] == 2
        with pytest.raises(httpx.HTTPError):
            house.http.get("/health")  # in clear
        url = house.url.replace("http:", "https:")
        context = ssl.create_default_context(cafile=certs / "ca.pem")
        with httpx.Client(base_url=url, verify=context, timeout=PATIENCE_S) as running:
            assert running.get("/health").status_code == 200
            other = tmp_path / "other"
            assert main(["certs", "--out", str(other)]) == 0
            for name in ("cert.pem", "key.pem"):
                shutil.copy(other / name, used / name)

            def changed() -> bool:
                try:
                    return visit(house, other / "ca.pem")[1] == 2
                except (httpx.HTTPError, grpc.RpcError):
                    return False

            house.eventually(changed, "new connections get the new certificate")
            with pytest.raises(httpx.ConnectError):
                visit(house, certs / "ca.pem")
            assert running.get("/health").status_code == 200  # the connection goes on


def test_with_an_authority_for_clients_strangers_get_no_connection(
    tiny: Path, open_house: OpenHouse, certs: Path, tmp_path: Path
) -> None:
    settings = {
        "tls_cert": str(certs / "cert.pem"),
        "tls_key": str(certs / "key.pem"),
        "tls_client_ca": str(certs / "ca.pem"),
    }
    foreign = tmp_path / "foreign"
    assert main(["certs", "--out", str(foreign)]) == 0
    with open_house(tiny, num_blocks=64, **settings) as house:
        assert visit(house, certs / "ca.pem", certs)[1] == 2
        for client in (None, foreign):
            with pytest.raises((httpx.HTTPError, grpc.RpcError)):
                visit(house, certs / "ca.pem", client)


def test_certificates_that_are_none_are_refused_with_their_name(
    certs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    with pytest.raises(ConfigError, match=r"tls_cert=.*broken"):
        ServerTls(broken, certs / "key.pem")
    with pytest.raises(ConfigError, match=r"tls_client_ca=.*broken"):
        ServerTls(certs / "cert.pem", certs / "key.pem", broken)
    with pytest.raises(ConfigError, match=r"tls_key=.*cannot be read"):
        ServerTls(certs / "cert.pem", tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="chain and its key"):
        ServerTls(certs / "cert.pem", certs / "client-key.pem")
    assert main(["certs", "--out", str(certs)]) == 2
    assert main(["certs", "--out", str(tmp_path / "a"), "--days", "0"]) == 2
    assert main(["certs", "--out", str(tmp_path / "b"), "--host", "a b"]) == 2
    assert (certs / "key.pem").stat().st_mode & 0o077 == 0


def test_a_file_that_changed_is_read_once_and_a_bad_one_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("a")
    read: list[str] = []

    def reread() -> None:
        read.append(file.read_text())
        if read[-1] == "bad":
            raise ConfigError("bad")

    watch = FileWatch([file], reread)
    watch.look()
    assert read == []
    for text in ("bad", "better"):
        file.write_text(text)
        watch.look()
        watch.look()
    assert read == ["bad", "better"]
    assert caplog.text.count("stays in use") == 1
