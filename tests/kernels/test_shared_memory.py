"""Memory that processes share: parts in order, sealed, and its descriptor closed once."""

from __future__ import annotations

import os

import pytest
import torch

from moeserve.errors import InternalError
from moeserve.kernels.shared_memory import SharedMemory


def test_parts_are_the_same_bytes_for_both_and_outlive_descriptors() -> None:
    ours = SharedMemory.make("moeserve-test")
    first, second = ours.take(5), ours.take(9000)
    ours.seal()
    theirs = SharedMemory.of(os.dup(ours.fd))
    theirs.take(5)
    with pytest.raises(InternalError, match="are known"):
        theirs.require_all_taken()
    same = theirs.take(9000)
    theirs.require_all_taken()
    with pytest.raises(InternalError, match="are wanted"):
        theirs.take(1)
    with pytest.raises(PermissionError):
        os.ftruncate(ours.fd, 0)
    ours.close()
    theirs.close()
    second[8999] = 7
    assert same[8999] == 7
    assert torch.equal(first, torch.zeros(5, dtype=torch.uint8))


def test_a_descriptor_is_closed_once_also_where_nobody_closes_it() -> None:
    memory = SharedMemory.make("moeserve-test")
    fd = memory.fd
    memory.close()
    with open(os.devnull, "rb") as other:
        assert other.fileno() == fd
        memory.close()
        os.fstat(fd)
    memory = SharedMemory.make("moeserve-test")
    fd = memory.fd
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
