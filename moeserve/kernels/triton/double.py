"""A device in name, for tests: its tensors lie in host memory, and are the device's all the same.

Within ``device_double`` whatever is made on ``DEVICE`` is an ``OnDevice``, and every operation of
torch, and every kernel in Triton's interpreter, is checked as CUDA would check it: tensors of the
host and of the device do not mix, but where ``to`` or ``copy_`` says so. What is copied, what makes
the host wait, and what memory the device's tensors take is counted in ``Crossings``. Its kernels
run in the interpreter.

Ranks that are threads each enter ``device_thread`` within it, and have counts of their own.

Stricter than CUDA in one point: indices must be on the device too, for where they are not they are
copied, and the host waits.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from moeserve.errors import InternalError

DEVICE = torch.device("meta")
# Whose results the host looks at, or whose sizes follow from numbers on the device.
WAITS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::unique_consecutive", "aten::_unique2", "aten::bincount",
    "aten::repeat_interleave.Tensor", "aten::is_nonzero",
}  # fmt: skip


@dataclass(slots=True)
class Crossings:
    """Copies from the device, copies to it, and operations that wait for it without a copy. Tensors
    take ``nbytes`` now, and took ``most_bytes`` at most, which make no two of these different;
    views take none of their own."""

    to_host: int = 0
    to_device: int = 0
    waits: int = 0
    nbytes: int = field(default=0, repr=False, compare=False)
    most_bytes: int = field(default=0, repr=False, compare=False)
    # Of each memory, by its address.
    _holders: Counter[int] = field(default_factory=Counter, repr=False, compare=False)

    def hold(self, tensor: OnDevice) -> None:
        """It counts as long as it lives."""
        memory = tensor.held.untyped_storage()
        address, nbytes = memory.data_ptr(), memory.nbytes()
        if not self._holders[address]:
            self.nbytes += nbytes
            self.most_bytes = max(self.most_bytes, self.nbytes)
        self._holders[address] += 1
        weakref.finalize(tensor, self._let_go, address, nbytes)

    def _let_go(self, address: int, nbytes: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.nbytes -= nbytes


class OnDevice(Tensor):
    """``held`` has the numbers, in host memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatched(func, args, kwargs or {}, Crossings())


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.crossings = Crossings()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatched(func, args, kwargs or {}, self.crossings)


def dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Crossings) -> Any:
    """One operation, by what holds the numbers."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, OnDevice)]
    here = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
    name, asked = func.name(), kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    crosses = name in ("aten::_to_copy", "aten::copy_")
    if there and here and not crosses:
        raise InternalError(f"{name}: tensors of the host among those of the device")
    if name in WAITS and there:
        seen.waits += 1
    on_device = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if crosses:
        source = args[1] if name == "aten::copy_" else args[0]
        on_device = isinstance(args[0], OnDevice) if name == "aten::copy_" else on_device
        seen.to_host += isinstance(source, OnDevice) and not on_device
        seen.to_device += not isinstance(source, OnDevice) and on_device
    elif any(is_mask(t) for t in tree_leaves(args[1:2])) and name.startswith("aten::index"):
        seen.waits += bool(there)
    bare = tree_map(lambda t: t.held if isinstance(t, OnDevice) else t, (args, kwargs))
    found = func(*bare[0], **bare[1])
    if not on_device or name in ("aten::_local_scalar_dense", "aten::equal"):
        return found
    own = {id(t.held): t for t in there}

    def marked(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in own:
            return own[id(value)]
        made = OnDevice(value)
        seen.hold(made)
        return made

    return tree_map(marked, found)


def is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool


def bare(tensor: Tensor) -> Tensor:
    """What holds its numbers, in host memory, for a library that carries bytes between devices."""
    return tensor.held if isinstance(tensor, OnDevice) else tensor


@contextmanager
def device_thread() -> Iterator[Crossings]:
    """For one more thread, while another is in ``device_double``."""
    mode = _Mode()
    with mode:
        yield mode.crossings


@contextmanager
def device_double() -> Iterator[Crossings]:
    """For the calling thread. InternalError where tensors of host and device meet."""
    from triton.runtime.interpreter import GridExecutor

    run: Callable[..., Any] = GridExecutor.__call__
    one_at_a_time = threading.Lock()  # the interpreter is made for one thread

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        strangers = [t for t in args if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
        if strangers:
            raise InternalError(f"a kernel is given {len(strangers)} tensors of the host")
        with one_at_a_time, _disable_current_modes():
            run(self, *(a.held if isinstance(a, OnDevice) else a for a in args), **kwargs)

    GridExecutor.__call__ = launched
    try:
        with device_thread() as crossings:
            yield crossings
    finally:
        GridExecutor.__call__ = run
