"""The one way from a tensor, on whatever device, to an array that Python code looks at."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import Tensor


def to_host(tensor: Tensor) -> NDArray[Any]:
    """The values as a numpy array. From a device it waits and copies; in host memory it is a view,
    so whoever keeps it beyond the step must copy."""
    # Where nothing has to be copied or detached, as in every step here, that is not asked for.
    plain = tensor.is_cpu and not tensor.requires_grad
    array: NDArray[Any] = (tensor if plain else tensor.detach().cpu()).numpy()
    return array
