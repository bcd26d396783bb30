"""``deep_ep.Buffer`` in plain torch, by DeepEP's README and signatures; ranks are threads.

For machines without GPUs: the adapters run over it as over the library. It looks at numbers in host
memory, and gives tensors of the device that it was given some of. What is not stated is
noise: the order in which rows come, rows that a slot did not get, and whatever a call has given
until its event was waited for. What is not allowed is an InternalError. Combines add in fp32 and
round once: the normal one rows of ranks, in their order; that of low latency rows of choices, in
theirs. Letters: T tokens, K choices, N rows that came, H hidden, M rows that a slot can get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeserve.comm.libraries.deepep import BLOCK
from moeserve.comm.libraries.open import LANE_BYTES, LOW_LATENCY_HIDDEN
from moeserve.errors import InternalError
from moeserve.kernels.thread_meeting import ThreadMeeting

# What ``dispatch`` takes beside what the twin looks at.
OTHERS = frozenset(
    "handle num_tokens_per_rank num_tokens_per_rdma_rank expert_alignment config previous_event "
    "allocate_on_comm_stream".split()
)
WORLDS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


class Layout(NamedTuple):
    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor
    event: Any


@dataclass(frozen=True, slots=True)
class ThreadGroup:
    """Stands for a group of torch.distributed."""

    meeting: ThreadMeeting
    number: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.meeting.world


class TwinEvent:
    """What was given is filled in when it is waited for."""

    def __init__(self, fill: Callable[[], None] = lambda: None) -> None:
        self._fill = fill

    def current_stream_wait(self) -> None:
        self._fill()


class Config:
    """Sizes that follow from the row alone."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 256 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= 8 else 128 * hidden_bytes * num_ranks


class Buffer:
    def __init__(
        self,
        group: ThreadGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        allow_nvlink_for_low_latency_mode: bool = True,
    ) -> None:
        self.rank, self.group_size = group.rank(), group.size()
        self._meeting = group.meeting
        self._nvl, self._rdma = num_nvl_bytes, num_rdma_bytes
        self._low_latency, self._qps = low_latency_mode, num_qps_per_rank

    @staticmethod
    def capture() -> TwinEvent:
        return TwinEvent()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in WORLDS, f"Unsupported number of EP ranks: {num_ranks}"
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return 2 * num_max_dispatch_tokens_per_rank * num_experts * (2 * hidden + 16)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: TwinEvent | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Layout:
        demand(topk_idx.dtype is torch.int64 and topk_idx.dim() == 2, "topk_idx is int64 [T, K]")
        demand(num_experts % self.group_size == 0, "experts divide over ranks")
        demand(bool((topk_idx.cpu() < num_experts).all()), "an expert is out of range")
        demand(not async_finish or previous_event is not None, "what must be done before it?")
        device, topk_idx = topk_idx.device, topk_idx.cpu()
        local, chosen = num_experts // self.group_size, topk_idx[topk_idx >= 0]
        rank_TK = torch.where(topk_idx >= 0, topk_idx // local, -1)
        is_in = (rank_TK[:, :, None] == torch.arange(self.group_size)).any(1)
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        own = [t.to(device) for t in (is_in.sum(0).int(), per_expert, is_in)]
        return Layout(own[0], None, own[1], own[2], TwinEvent())

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
        **others: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None, list[int], Any, TwinEvent]:
        demand(others.keys() <= OTHERS, f"unknown: {sorted(others.keys() - OTHERS)}")
        demand("handle" not in others and not self._low_latency, "the twin caches no layouts")
        demand(others.get("num_tokens_per_rank") is not None, "no layout")
        device, parts = is_token_in_rank.device, self._checked_rows(x)
        demand((topk_idx is None) == (topk_weights is None), "choices and weights go together")
        demand(len(is_token_in_rank) == len(parts[0]) > 0, "a layout of other rows")
        choices = [t.cpu() for t in (topk_idx, topk_weights) if t is not None]
        layout = is_token_in_rank.cpu(), num_tokens_per_expert.cpu()
        came = self._meeting.meet(self.rank, (parts, choices, *layout))
        local = len(num_tokens_per_expert) // self.group_size
        mine = slice(self.rank * local, (self.rank + 1) * local)
        counts = [int(n) for n in sum(per[mine] for *_, per in came)]
        origin = [
            (r, t)
            for r, (_, _, is_in, _) in enumerate(came)
            for t in is_in[:, self.rank].nonzero()[:, 0].tolist()
        ]
        origin = [origin[i] for i in torch.randperm(len(origin)).tolist()]
        found = [taken([sent[i] for sent, *_ in came], origin, parts[i]) for i in range(len(parts))]
        picked = [
            taken([chosen[i] for _, chosen, *_ in came], origin, choices[i])
            for i in range(len(choices))
        ]
        if picked:
            picked[0] = torch.where(picked[0] // local == self.rank, picked[0] % local, -1)
        out, event = later([*found, *picked], device, async_finish)
        rows: Any = out[0] if len(parts) == 1 else (out[0].view(torch.float8_e4m3fn), out[1])
        slots, weights = out[len(parts) :] if picked else (None, None)
        return rows, slots, weights, counts, (origin, len(parts[0])), event

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        config: Config | None = None,
        previous_event: TwinEvent | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, TwinEvent]:
        origin, tokens = handle
        demand(x.dtype is torch.bfloat16 and len(x) == len(origin), "rows are those dispatched")
        demand(not async_finish or previous_event is not None, "what must be done before it?")
        total = torch.zeros(tokens, x.shape[1])
        for rows, whose in self._meeting.meet(self.rank, (x.cpu(), origin)):
            for i, (r, t) in enumerate(whose):
                if r == self.rank:
                    total[t] += rows[i].float()
        (out,), event = later([total.bfloat16()], x.device, async_finish)
        return out, None, event

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor, Tensor, Any, TwinEvent, None]:
        most, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        demand(not (use_fp8 or async_finish or return_recv_hook), "modes of the twin")
        demand(self._low_latency, "the buffer was not opened for low latency")
        least = self.get_low_latency_rdma_size_hint(most, hidden, self.group_size, num_experts)
        demand(self._rdma >= least, "the buffer is too small")
        demand(x.dtype is torch.bfloat16 and hidden in LOW_LATENCY_HIDDEN, f"{hidden} features")
        demand(len(x) <= most and topk_idx.dtype is torch.int64, "too many tokens, or a dtype")
        local = num_experts // self.group_size
        demand(self._qps == local, "as many queues as experts of a rank")
        came = self._meeting.meet(self.rank, (x.cpu(), topk_idx.cpu(), most, num_experts))
        demand(all(post[2:] == came[0][2:] for post in came), "ranks disagree")
        rows = torch.full((local, most * self.group_size, hidden), torch.nan).bfloat16()
        counts, origin = torch.zeros(local, dtype=torch.int32), dict[tuple[int, int], Any]()
        for e in range(local):
            whose = [
                (r, t, k)
                for r, (_, ids, *_) in enumerate(came)
                for t, k in (ids == self.rank * local + e).nonzero().tolist()
            ]
            counts[e] = len(whose)
            for m, i in enumerate(torch.randperm(len(whose)).tolist()):
                origin[e, m] = whose[i]
                rows[e, m] = came[whose[i][0]][0][whose[i][1]]
        return rows.to(x.device), counts.to(x.device), origin, TwinEvent(), None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, TwinEvent, None]:
        demand(x.dtype is torch.bfloat16 and topk_weights.dtype is torch.float32, "dtypes")
        rows, weights = x.cpu().float(), topk_weights.cpu()
        back = {whose: rows[place] for place, whose in handle.items()}
        found: dict[Any, Tensor] = {}
        for some in self._meeting.meet(self.rank, back):
            found |= some
        total = torch.zeros(len(topk_idx), x.shape[2])
        for t, choices in enumerate(topk_idx.tolist()):
            for k, expert in enumerate(choices):
                if expert >= 0:
                    total[t] += weights[t, k] * found[self.rank, t, k]
        return total.bfloat16().to(x.device), TwinEvent(), None

    def _checked_rows(self, x: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
        if isinstance(x, Tensor):
            demand(x.dtype is torch.bfloat16 and x.is_contiguous(), "rows are bf16")
            demand(2 * x.shape[1] % LANE_BYTES == 0, "rows are of whole 16 bytes")
            parts = [x]
        else:
            codes, scales = x
            demand(codes.dtype is torch.float8_e4m3fn and scales.dtype is torch.float32, "dtypes")
            demand(scales.shape == (len(codes), codes.shape[1] // BLOCK), "scales of 128 each")
            parts = [codes.view(torch.uint8), scales]
        least = Config().get_nvl_buffer_size_hint(parts[0].shape[1] * 2, self.group_size)
        demand(self._nvl >= least, "the buffer is too small")
        return [part.cpu() for part in parts]


def demand(holds: object, what: str) -> None:
    if not holds:
        raise InternalError(f"deep_ep: {what}")


def taken(sent_R: Sequence[Tensor], origin: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Row t of rank r, for each of ``origin``."""
    if not origin:
        return like[:0].clone()
    return torch.stack([sent_R[r][t] for r, t in origin])


def later(
    results: Sequence[Tensor], device: torch.device, is_async: bool
) -> tuple[list[Tensor], TwinEvent]:
    """The results on the device; noise until the event is waited for, where the call is
    asynchronous."""
    out = [x.clone().to(device) for x in results]
    if not is_async:
        return out, TwinEvent()
    for x in out:
        x.fill_(77)

    def fill() -> None:
        for into, x in zip(out, results, strict=True):
            into.copy_(x)

    return out, TwinEvent(fill)


def module() -> SimpleNamespace:
    """What stands for ``import deep_ep``."""
    return SimpleNamespace(Buffer=Buffer)
