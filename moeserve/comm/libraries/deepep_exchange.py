"""Our own records and sums by DeepEP's normal dispatch, which carries rows without looking inside.

An ``Exchange`` between CUDA devices: a segment is cut into pages, and each page is a row of bf16
for DeepEP that goes to one rank (ranks are the experts that DeepEP is told of). A page begins with
who sent it, which page of the segment it is, and how long the segment is; so pages may come in any
order. DeepEP adds nothing here: the exact combine is as over any other exchange, and law 1 with it.

What DeepEP waits for is bounded by DeepEP (100 s); a rank that is lost is found by heartbeats.

::

    page    0  int32 sender, int32 page, int64 bytes of the segment     64  bytes of it    8192
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeserve.comm.exchange.backend import ExchangeBackend
from moeserve.comm.exchange.base import Lanes
from moeserve.comm.group import Group
from moeserve.errors import InternalError

PAGE, HEAD = 8192, 64
ROOM = PAGE - HEAD


def pages_of(size: int) -> int:
    return -(-size // ROOM)


class DeepEpExchange(ExchangeBackend):
    """``buffer`` is a ``deep_ep.Buffer`` of the group; areas and segments lie on ``device``, or in
    host memory where ``staged``, for tables that write there."""

    name = "deepep"

    def __init__(
        self, group: Group, lanes: Lanes, buffer: Any, device: torch.device, *, staged: bool = False
    ) -> None:
        super().__init__(group, lanes)
        self._buffer = buffer
        self._card = device
        self.device = torch.device("cpu") if staged else device
        self._areas: dict[int, list[Tensor]] = {}
        self._arriving: dict[int, tuple[Tensor, Any]] = {}

    def areas(self, lane: int, sizes_R: Sequence[int]) -> list[Tensor]:
        self._begin_round(lane, sizes_R)
        self._areas[lane] = [
            torch.empty(pages_of(size) * ROOM, dtype=torch.uint8, device=self.device)
            for size in sizes_R
        ]
        return self._areas[lane]

    def send(self, lane: int, sizes_R: Sequence[int]) -> None:
        self._count_sent(sizes_R)
        count_R = [pages_of(size) for size in sizes_R]
        pages_PX = torch.zeros(max(1, sum(count_R)), PAGE, dtype=torch.uint8, device=self.device)
        at = 0
        for area, count in zip(self._areas.pop(lane), count_R, strict=True):
            pages_PX[at : at + count, HEAD:] = area[: count * ROOM].view(count, ROOM)
            at += count
        heads_PX = self._heads(sizes_R, count_R)
        pages_PX[: len(heads_PX), : heads_PX.shape[1]] = heads_PX.to(self.device)
        pages_PX = pages_PX.to(self._card)
        # A rank with nothing to say sends one page to nobody.
        target_P = torch.tensor([-1]) if not at else ranks_of(count_R)
        later = {"async_finish": True, "allocate_on_comm_stream": True}
        per_rank, per_node, per_expert, is_in_rank, known = self._buffer.get_dispatch_layout(
            target_P[:, None].to(self._card),
            self.world,
            previous_event=self._buffer.capture(),
            **later,
        )
        came, _, _, _, _, arrived = self._buffer.dispatch(
            pages_PX.view(torch.bfloat16),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=known,
            **later,
        )
        self._arriving[lane] = came, arrived

    def receive(self, lane: int) -> list[Tensor]:
        came, arrived = self._arriving.pop(lane)
        arrived.current_stream_wait()
        pages_PX = came.contiguous().view(torch.uint8).to(self.device)
        heads = pages_PX[:, :16].contiguous().view(torch.int32).cpu()
        sender_P, page_P = heads[:, 0].long(), heads[:, 1].long()
        size_P = heads[:, 2:].contiguous().view(torch.int64)[:, 0]
        segments = []
        for r in range(self.world):
            mine_P = (sender_P == r).nonzero()[:, 0]
            mine_P = mine_P[page_P[mine_P].argsort()]
            size = int(size_P[mine_P[0]]) if len(mine_P) else 0
            if page_P[mine_P].tolist() != list(range(pages_of(size))):
                raise InternalError(f"{len(mine_P)} pages of rank {r} are not {size} bytes")
            rows = pages_PX.index_select(0, mine_P.to(self.device))[:, HEAD:]
            segments.append(rows.flatten()[:size])
        return segments

    def _heads(self, sizes_R: Sequence[int], count_R: Sequence[int]) -> Tensor:
        """uint8 [P, 16]."""
        pages = sum(count_R)
        heads_P4 = torch.zeros(pages, 4, dtype=torch.int32)
        heads_P4[:, 0] = self.rank
        number_R = [torch.arange(count, dtype=torch.int32) for count in count_R]
        heads_P4[:, 1] = torch.cat([torch.empty(0, dtype=torch.int32), *number_R])
        size_P = torch.tensor(sizes_R).repeat_interleave(torch.tensor(count_R))
        heads_P4[:, 2:] = size_P[:, None].view(torch.int32)
        return heads_P4.view(torch.uint8)

    def _release(self) -> None:
        self._buffer = None
        self._areas, self._arriving = {}, {}


def ranks_of(count_R: Sequence[int]) -> Tensor:
    """int64 [P]: of each page the rank that it goes to."""
    return torch.arange(len(count_R)).repeat_interleave(torch.tensor(count_R))
