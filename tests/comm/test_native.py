"""A native half that is missing is an error where it is required, and only there."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from moeserve.comm.layout import LayerLayout
from moeserve.comm.native import native_half
from moeserve.comm.table import NumpyAssignmentTable, table_of
from moeserve.errors import ConfigError
from moeserve.kernels.reference.ops import ReferenceOps
from moeserve.kernels.select import choose_ops
from moeserve.native import find_native, required

LAYOUT = LayerLayout(np.arange(4, dtype=np.int32), 4, 2)


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)]
)
def test_what_the_variable_means(
    monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool
) -> None:
    if value is None:
        monkeypatch.delenv("MOESERVE_REQUIRE_NATIVE", raising=False)
    else:
        monkeypatch.setenv("MOESERVE_REQUIRE_NATIVE", value)
    assert required() is wanted


@pytest.mark.parametrize("value", ["0", ""])
def test_twins_take_over_where_it_is_not_required(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("MOESERVE_REQUIRE_NATIVE", value)
    for name in ("moeserve.comm._comm", "moeserve.kernels.cpu.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    assert native_half()[0] is None
    assert "moeserve.comm._comm is not built" in native_half()[1]
    assert isinstance(table_of(LAYOUT), NumpyAssignmentTable)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_ops(), ReferenceOps)


def test_without_it_neither_layers_nor_kernels_are_built_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOESERVE_REQUIRE_NATIVE", "1")
    for name in ("moeserve.comm._comm", "moeserve.kernels.cpu.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    says = "MOESERVE_REQUIRE_NATIVE is set, but moeserve.{} is not built .*pip install"
    with pytest.raises(ConfigError, match=says.format("comm._comm")):
        table_of(LAYOUT)
    with pytest.raises(ConfigError, match=says.format("kernels.cpu.ops")):
        choose_ops()
    assert find_native("moeserve.comm._comm")[0] is None, "whoever only looks is told"
