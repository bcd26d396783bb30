"""Triton's kernels run here on the CPU, in Triton's interpreter.

It has to be asked for before Triton is imported: here, and in ``tests/conftest.py`` for the case
that something else imports it first. Two of its operations are done here as hardware does them: its
fused multiply-add is not fused (3.7), and its product of floats adds in an order that depends on a
row's place in the tile, as numpy's does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the extra `cuda` is not installed")


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    from moeserve.kernels.reference.products import fused as rounded_once

    a, b, c = (torch.from_numpy(v.data.copy()) for v in (x, y, z))
    return TensorHandle(rounded_once(a, b, c).numpy(), z.dtype.scalar)


def ascending(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    """d + a @ b, the sums in order of k."""
    from triton.runtime.interpreter import TensorHandle

    if d.data.dtype == np.float32:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            if a.data[:, k].any():
                total += a.data[:, k, None] * b.data[None, k]
    else:  # in fp64, where sums of codes are exact
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        total = total.astype(np.int32) + d.data
    return TensorHandle(total, d.dtype.scalar)


class Kept:
    def restore(self) -> None: ...


@contextmanager
def patched_once(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter makes Triton's language its own for every call of every function; here once,
    which halves the time of these tests."""
    import triton.language as tl
    from triton.runtime import interpreter

    def both() -> None: ...

    seen = FunctionType(both.__code__, {"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(seen)
    patch.setattr(interpreter, "_patch_lang", lambda fn: Kept())
    yield
    scope.restore()


@pytest.fixture(scope="session", autouse=True)
def _as_hardware() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    with pytest.MonkeyPatch.context() as patch, patched_once(patch):
        patch.setattr(InterpreterBuilder, "create_fma", fused)
        patch.setattr(InterpreterBuilder, "create_dot", ascending)
        yield


@pytest.fixture(scope="session")
def ops() -> Any:
    """The op table of Triton, for what tests share by this name."""
    from moeserve.kernels.triton.ops import TritonOps

    return TritonOps(torch.device("cpu"))
