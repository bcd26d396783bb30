"""Addresses, keys and certificates of servers: what is wrong is said before a request is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.bench.serving.targets import ClientTls, TargetAddress, parse_address, read_key
from moeserve.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", TargetAddress("http", "localhost", 8000)),
        ("http://h/v1/", TargetAddress("http", "h", 80)),
        ("https://h/api/v1", TargetAddress("https", "h", 443, "/api")),
        ("grpcs://[::1]:9", TargetAddress("grpcs", "::1", 9)),
    ],
)
def test_addresses(url: str, address: TargetAddress) -> None:
    assert parse_address(url) == address
    assert address.tls == (address.scheme in ("https", "grpcs"))


def test_an_address_of_ipv6_has_brackets() -> None:
    assert parse_address("grpc://[::1]:9").place == "[::1]:9"


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://h", "http://", "http://h:99999", "http://u:p@h", "http://h?a=1",
     "grpc://h", "grpc://h:1/path", "http://h/a b", "http://h/ä", ""],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--target="):
        parse_address(url)


@given(url=st.text(max_size=40) | st.text(max_size=30).map(lambda rest: "http://" + rest))
def test_any_text_is_an_address_or_refused(url: str) -> None:
    try:
        found = parse_address(url)
    except ConfigError:
        return
    assert found.host
    assert 0 <= found.port < 1 << 16


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert read_key(file) == "secret"
    for wrong in ("", "two words\n", "ä\n"):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="--api-key-file="):
            read_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "nowhere")


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="expected files in PEM"):
        ClientTls(file).context()
    with pytest.raises(ConfigError, match="given together"):
        ClientTls(cert=file)
    with pytest.raises(ConfigError, match="cannot be read"):
        ClientTls(tmp_path / "nowhere").pem()
