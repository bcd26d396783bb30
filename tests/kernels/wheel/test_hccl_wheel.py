"""The wheel's process groups are made and called as ``comm.exchange.media`` does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.long

MADE = """
from datetime import timedelta
from torch.distributed import HashStore
from moeserve.comm.exchange.media import lacking, process_groups
assert lacking("npu") == "", lacking("npu")
made = process_groups("npu")
options = made.Options()
options._timeout = timedelta(seconds=5)
print(made.__init__.__doc__)
print(all(callable(getattr(made, name)) for name in ("alltoall_base", "abort", "shutdown")))
"""


def test_groups_of_hccl_are_made_of_a_store_a_rank_a_size_and_options(
    run: Callable[[str], str],
) -> None:
    said = run(MADE)
    (by_options,) = [line for line in said.splitlines() if "Options)" in line]
    kinds = [part.split(": ")[1] for part in by_options.split(", ")[1:]]
    assert kinds[0].endswith("Store") and "SupportsInt" in kinds[1] and "SupportsInt" in kinds[2]
    assert kinds[3].startswith("c10d_npu::ProcessGroupHCCL::Options")
    assert said.splitlines()[-1] == "True"
