"""A certificate authority for tests, with a server's and a client's certificate of it.

``cert.pem``, ``key.pem`` and ``ca.pem`` are what ``--tls-cert``, ``--tls-key``, ``--tls-client-ca``
and ``--ep-tls`` take; ``client-cert.pem`` and ``client-key.pem`` are for a client. The authority's
own key is thrown away: nobody can make further certificates of it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moeserve.errors import ConfigError

MAX_DAYS = 3650
# Clocks of other machines may be behind.
EARLIER = datetime.timedelta(hours=1)


def write_authority(folder: Path, hosts: Sequence[str], days: int) -> tuple[Path, ...]:
    """The files written, in a folder that has none of them yet. ConfigError otherwise."""
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"--days={days}: expected 1 to {MAX_DAYS}")
    names = [_general_name(host) for host in hosts]
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("moeserve test authority")
    ca = (
        _builder(ca_name, ca_name, ca_key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False)
        .sign(ca_key, hashes.SHA256())
    )
    files: dict[str, bytes] = {"ca.pem": ca.public_bytes(serialization.Encoding.PEM)}
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    for prefix, subject, alternatives, usages in (
        ("", hosts[0], names, both),
        ("client-", "client", [x509.DNSName("client")], both[1:]),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        cert = (
            _builder(_name(subject), ca_name, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False
            )
            .sign(ca_key, hashes.SHA256())
        )
        files[f"{prefix}cert.pem"] = cert.public_bytes(serialization.Encoding.PEM)
        files[f"{prefix}key.pem"] = _pem(key)
    return tuple(_written(folder, name, data) for name, data in files.items())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c.isspace() for c in host):
        raise ConfigError(f"--host={host!r}: expected a name or an address")
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _written(folder: Path, name: str, data: bytes) -> Path:
    """Never over another file; keys are for their owner alone."""
    file = folder / name
    mode = 0o600 if name.endswith("key.pem") else 0o644
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise ConfigError(f"{str(file)!r}: cannot be written: {error.strerror}") from error
    with os.fdopen(opened, "wb") as out:
        out.write(data)
    return file
