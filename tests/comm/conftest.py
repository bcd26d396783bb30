"""What tests of ranks share: certificates of a group's own authority."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moeserve.comm.control.rpc import Tls


@pytest.fixture
def certify(tmp_path: Path) -> Callable[..., Tls]:
    """A rank's certificates: by the name of its folder, and that of the authority, which is made
    on the way."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates can be made")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def run(words: list[str], folder: Path) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=30)

    def make(name: str, authority: str, subject: str = "/CN=rank") -> Tls:
        folder = tmp_path / name
        folder.mkdir()
        ca, key = f"../{authority}.pem", f"../{authority}.key"
        if not (folder / ca).exists():
            asked = ["req", "-x509", *curve, "-subj", f"/CN={authority}", "-days", "2"]
            run([*asked, "-keyout", key, "-out", ca], folder)
        run(["req", *curve, "-subj", subject, "-keyout", "key.pem", "-out", "csr"], folder)
        signed = ["x509", "-req", "-in", "csr", "-CA", ca, "-CAkey", key, "-CAcreateserial"]
        run([*signed, "-days", "2", "-out", "cert.pem"], folder)
        shutil.copy(folder / ca, folder / "ca.pem")
        return Tls.load(folder)

    return make
