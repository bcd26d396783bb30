"""The part of the op table that lays packed weights over memory: there is none here.

Packed copies are bytes of the CPU's table or of a CUDA device's, which map them or read them as
steps need them; an NPU is given the folder that was packed. Everything here is a ConfigError that
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from moeserve.errors import ConfigError
from moeserve.kernels.ops import Experts, Linear, RecordLayout
from moeserve.kernels.records import MatrixForm


def refuse(what: str) -> NoReturn:
    raise ConfigError(
        f"{what}: packed weights are read by the kernels of CPUs and CUDA devices alone: serve "
        "the folder that was packed"
    )


class WithoutRecords:
    def matrix_form(self, linear: Linear) -> MatrixForm:
        refuse("matrix_form")

    def matrix_bytes(self, form: MatrixForm) -> int:
        refuse("matrix_bytes")

    def write_matrix(self, linear: Linear, into: Tensor) -> None:
        refuse("write_matrix")

    def linear_over(self, memory: Tensor, form: MatrixForm) -> Linear:
        refuse("linear_over")

    def record_layout(self, experts: Experts) -> RecordLayout:
        refuse("record_layout")

    def write_record(self, experts: Experts, e: int, into: Tensor) -> None:
        refuse("write_record")

    def experts_over(
        self, memory: Tensor, layout: RecordLayout, slots: int, order: Sequence[int] | None = None
    ) -> Experts:
        refuse("experts_over")
