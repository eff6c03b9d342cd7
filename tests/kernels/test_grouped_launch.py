"""Several Linears in one launch: whose blocks are whose."""

import torch

from subspec.kernels.grouped_launch import GroupedLaunch, float_bits


def test_blocks_follow_each_other_and_the_table_says_where_each_part_begins():
    calls, flat, parts = [], torch.zeros(3), [([7, -1], 3), ([8, 1 << 40], 2)]
    launch = GroupedLaunch(lambda **call: calls.append(call), parts, 128, flat.device)
    launch(flat)
    launch()
    (first, second) = calls
    assert first["grid"] == (5, 1, 1)
    assert first["block"] == (128, 1, 1)
    table, argument, count = first["args"]
    assert table.dtype is torch.int64
    assert table.tolist() == [[7, -1, 0], [8, 1 << 40, 3]]
    assert argument is flat
    assert count == 2
    assert [type(argument) for argument in second["args"]] == [torch.Tensor, int]


def test_a_floats_bits_come_back():
    for value in (0.0, -0.5, 0.50390625, 2.0**-60):
        bits = torch.tensor(float_bits(value), dtype=torch.int64).to(torch.int32)
        assert bits.view(torch.float32).item() == value
