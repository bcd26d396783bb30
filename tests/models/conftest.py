"""The decoder is tested on every backend that is built: the reference, and the native one."""

from __future__ import annotations

import importlib.util

import pytest

from moeserve.kernels.ops import Ops
from moeserve.kernels.reference import ReferenceOps
from moeserve.kernels.select import choose_ops

BUILT = importlib.util.find_spec("moeserve.kernels._cpu") is not None


@pytest.fixture(scope="session", params=["reference", "native"] if BUILT else ["reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else choose_ops()
