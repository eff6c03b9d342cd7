"""Attention of a level in one kernel: its reference against the three kernels it replaces, the kernel against that."""

import pytest
import torch

from subspec.kernels import attend, launch

CASES = [  # head_dim, heads, kv heads, slices, bias, norms, rows, nodes of other levels, prefix
    (128, 14, 2, 3, True, False, 6, 36, 300),
    (64, 4, 2, 1, False, True, 3, 0, 5),
    (128, 8, 1, 2, True, True, 8, 40, 1300),
    (64, 8, 1, 4, True, False, 1, 0, 0),
    (128, 7, 1, 2, False, True, 2, 2, 63),
]


def level(case, device="cpu"):
    dim, heads, kv, slices, bias, norm, rows, used, length = case
    g = torch.Generator().manual_seed(sum(case))
    drafted, draft_rows, capacity = used + rows, 100, 128
    start, end = draft_rows - drafted, draft_rows + length
    cache = torch.randn(2, kv, end + 20, dim, generator=g).bfloat16()
    for unused in (slice(0, start + rows), slice(end, None)):  # nothing there may be read
        cache[:, :, unused] = torch.nan
    width = (heads + 2 * kv) * dim
    nodes = torch.randperm(100, generator=g)[:rows]
    node_of_row = torch.randint(0, capacity, (draft_rows,), generator=g)
    node_of_row[start : start + rows] = nodes
    ancestors = (torch.rand(capacity, capacity, generator=g) < 0.3).to(torch.int8)
    ancestors[nodes, nodes] = 1
    parts = {
        "partial": torch.randn(slices, rows, width + 32, generator=g),
        "k_rows": cache[0],
        "v_rows": cache[1],
        "bias": torch.randn(width, generator=g).bfloat16() if bias else None,
        "q_norm": (torch.rand(dim, generator=g) + 0.5).bfloat16() if norm else None,
        "k_norm": (torch.rand(dim, generator=g) + 0.5).bfloat16() if norm else None,
        "inverse_frequency": 10000 ** (-torch.arange(0, dim, 2).float() / dim),
        "depths": torch.randint(1, 20, (rows,), generator=g),
        "length": torch.tensor([length]),
        "ancestors": ancestors,
        "nodes": nodes,
        "node_of_row": node_of_row,
    }
    numbers = {"start_row": start, "drafted": drafted, "attention_scaling": 1.1, "eps": 1e-6, "heads": heads}
    return {name: None if t is None else t.to(device) for name, t in parts.items()} | numbers


def cache_of(parts):
    """The level's own rows, and all others."""
    cache, start = torch.stack([parts["k_rows"], parts["v_rows"]]), parts["start_row"]
    end = start + parts["nodes"].numel()
    return cache[:, :, start:end], torch.cat([cache[:, :, :start], cache[:, :, end:]], dim=2).nan_to_num(7.0)


def check(got, want, ours, theirs, tolerance):
    assert error(got, want) < tolerance
    (own, others), (expected, expected_others) = cache_of(ours), cache_of(theirs)
    assert error(own, expected) < tolerance
    assert torch.equal(others, expected_others)


def by_three_kernels(parts):
    pytest.importorskip("triton")
    from subspec.kernels import level as kernels

    partial, k_rows, heads, drafted = (parts[name] for name in ("partial", "k_rows", "heads", "drafted"))
    (slices, rows, stride), (kv, _, dim) = partial.shape, k_rows.shape
    query = torch.empty(rows, heads, dim, dtype=torch.bfloat16)
    strides = (k_rows.stride(1), k_rows.stride(0))
    bias, q_norm, k_norm = (
        partial if parts[name] is None else parts[name] for name in ("bias", "q_norm", "k_norm")
    )
    kernels.rope_store[(rows, heads + 2 * kv)](
        partial, bias, q_norm, k_norm, parts["inverse_frequency"], parts["depths"], parts["length"], query,
        k_rows, parts["v_rows"], rows, parts["start_row"], *strides, parts["attention_scaling"], parts["eps"],
        heads, kv, stride, SPLITS=slices, HAS_BIAS=parts["bias"] is not None,
        HAS_NORM=parts["q_norm"] is not None, HALF=dim // 2,
    )  # fmt: skip
    splits = 4
    sums, outs = torch.empty(2, splits, rows, heads), torch.empty(splits, rows, heads, dim)
    kernels.tree_attention[(kv, splits)](
        query, k_rows, parts["v_rows"], parts["ancestors"], parts["nodes"], parts["node_of_row"],
        parts["length"], outs, sums[0], sums[1], rows, parts["start_row"], drafted, 128, *strides, dim**-0.5,
        heads, kv, SPLITS=splits, M=64, BLOCK=64, D=dim, OPERAND=kernels.tl.float32,
    )  # fmt: skip
    out = torch.empty(rows, heads * dim, dtype=torch.bfloat16)
    kernels.merge_attention[(rows, heads)](outs, sums[0], sums[1], out, rows, heads, SPLITS=splits, D=dim)
    return out


def error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is only chosen without a GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_reference_computes_what_the_three_kernels_do(case):
    ours, theirs = level(case), level(case)
    # The interpreter cuts off where a device rounds to bfloat16.
    check(attend.attend(**ours), by_three_kernels(theirs), ours, theirs, 5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_the_reference(case, overlap):
    if reason := attend.problem(torch.device("cuda")):
        pytest.skip(reason)
    ours, expected = level(case, "cuda"), level(case, "cuda")
    want = attend.reference(**expected)
    with launch.overlapping(overlap):
        got = attend.attend(**ours)
    check(got, want, ours, expected, 8e-3)


def test_levels_it_does_not_take():
    assert attend.unfit(6, 28, 4, 128, torch.float32) is None
    assert "heads of (64, 128)" in attend.unfit(6, 28, 4, 96, torch.float32)
    assert "too many" in attend.unfit(9, 28, 4, 128, torch.float32)
    assert "too many" in attend.unfit(8, 36, 4, 128, torch.float32)
    assert "float32" in attend.unfit(6, 28, 4, 128, torch.bfloat16)
