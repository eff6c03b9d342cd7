"""Several Linears in one launch: whose blocks are whose."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from subspec.kernels import launch
from subspec.kernels.grouped_launch import GroupedLaunch, float_bits

KINDS = {2: (ctypes.c_void_p, ctypes.c_int), 3: (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)}
"""Types of a launch's arguments."""


def test_blocks_follow_each_other_and_the_table_says_where_each_part_begins(monkeypatch):
    """What the driver gets: the table's address, the tensor's of each call, and the number of rows."""
    calls = []

    def launch_kernel(function, *arguments):
        *shape, shared, stream, pointers, extra = arguments
        read = [ctypes.cast(pointers[i], ctypes.POINTER(kind))[0] for i, kind in enumerate(KINDS[len(pointers)])]
        table = (ctypes.c_int64 * 6).from_address(read[0])
        calls.append((function, shape, shared, stream, list(table), read[1:], extra))
        return 0

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(cuLaunchKernel=launch_kernel))
    monkeypatch.setattr(launch, "_stream", lambda: 4711)
    kernel, parts = SimpleNamespace(func="function"), [([7, -1], 3), ([8, 1 << 40], 2)]
    first, second = torch.zeros(3), torch.zeros(5)
    grouped = GroupedLaunch(kernel, parts, 128, first.device, inputs=1)
    grouped(first)
    grouped(second)
    GroupedLaunch(kernel, parts, 64, first.device)()
    rows = [7, -1, 0, 8, 1 << 40, 3]
    assert calls == [
        ("function", [5, 1, 1, 128, 1, 1], 0, 4711, rows, [first.data_ptr(), 2], None),
        ("function", [5, 1, 1, 128, 1, 1], 0, 4711, rows, [second.data_ptr(), 2], None),
        ("function", [5, 1, 1, 64, 1, 1], 0, 4711, rows, [2], None),
    ]
    with pytest.raises(ValueError, match="argument"):
        grouped()


def test_a_floats_bits_come_back():
    for value in (0.0, -0.5, 0.50390625, 2.0**-60):
        bits = torch.tensor(float_bits(value), dtype=torch.int64).to(torch.int32)
        assert bits.view(torch.float32).item() == value
