"""Attention of a draft level in one kernel (``attend.cu``): its launch, and its torch reference.

It does the work of three kernels of :mod:`subspec.kernels.level`: ``rope_store``, ``tree_attention`` and
``merge_attention``. Compiled once per process by the run-time compiler that ships with PyTorch.
"""

import functools
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import launch

ATTEND = False
"""Whether levels use this kernel where it fits, unless they are told."""

MAX_ROWS = 8
MAX_QUERIES = 64
"""Rows times heads per kv head."""

PARTS = 8
THREADS = 256
HEAD_DIMS = (64, 128)


def unfit(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not take such a level, in a few words; None when it does.

    Args:
        dtype: of the q/k/v projection's sums.
    """
    if head_dim not in HEAD_DIMS:
        return f"it has heads of {HEAD_DIMS}, not {head_dim}"
    if rows > MAX_ROWS or rows * (heads // kv_heads) > MAX_QUERIES:
        return f"{rows} rows of {heads // kv_heads} heads per kv head are too many"
    if dtype != torch.float32:
        return f"it reads sums in float32, not {dtype}"
    return None


def problem(device: torch.device) -> str | None:
    """Why the kernel cannot run on ``device``, in a few words; None when it can (on a CPU its reference does)."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0 (Hopper) or later"
    return None


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a block: struct Shared of the source."""
    line = (head_dim + 8) * 2
    tiles, queries = 2 * 2 * 64 * line, MAX_QUERIES * line
    tables, results = 2 * MAX_ROWS * head_dim // 2 * 4, 2 * 2 * MAX_QUERIES * 4
    return -(-(tiles + queries + tables + results + 2 * 64) // 16) * 16


@functools.cache
def _kernel(
    head_dim: int, group: int, slices: int, bias: bool, norm: bool, overlap: bool, device: int
) -> Any:
    source = resources.files("subspec.kernels").joinpath("attend.cu").read_text(encoding="utf-8")
    settings = {
        "D": head_dim,
        "GROUP": group,
        "SLICES": slices,
        "HAS_BIAS": int(bias),
        "HAS_NORM": int(norm),
        "OVERLAP": int(overlap),
    }
    header = "".join(f"#define {name} {value}\n" for name, value in settings.items())
    with torch.cuda.device(device):
        kernel = torch.cuda._compile_kernel(header + source, "attend")
        kernel.set_shared_memory_config(shared_bytes(head_dim))
        return kernel


def attend(
    partial: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    *,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    inverse_frequency: Tensor,
    depths: Tensor,
    length: Tensor,
    ancestors: Tensor,
    nodes: Tensor,
    node_of_row: Tensor,
    start_row: int,
    drafted: int,
    attention_scaling: float,
    eps: float,
    heads: int,
) -> Tensor:
    """Finish a level's q/k/v projection, write its rows into the cache, and attend.

    Args:
        partial: float32 [slices, rows, stride], to be added up: queries, keys and values, head by head.
        k_rows, v_rows: one layer's cache, bfloat16 [kv heads, rows, head_dim]; rows ``start_row`` on are the level's
            own, which are written, then those of the tree's other levels (``drafted`` in all), then the prefix.
        bias: bfloat16 [(heads + 2 kv heads) * head_dim]; q_norm, k_norm: bfloat16 [head_dim].
        inverse_frequency: float32 [head_dim / 2].
        depths, nodes: int64 [rows]: of the level's nodes, their depth and number.
        length: int64 [1], of the prefix, on the device.
        ancestors: int8 [capacity, capacity]; node_of_row: int64 [draft rows].

    Returns:
        bfloat16 [rows, heads * head_dim].
    """
    if not partial.is_cuda:
        return reference(
            partial, k_rows, v_rows, bias=bias, q_norm=q_norm, k_norm=k_norm, inverse_frequency=inverse_frequency,
            depths=depths, length=length, ancestors=ancestors, nodes=nodes, node_of_row=node_of_row,
            start_row=start_row, drafted=drafted, attention_scaling=attention_scaling, eps=eps, heads=heads,
        )  # fmt: skip
    slices, rows, stride = partial.shape
    kv_heads, head_dim = k_rows.shape[0], k_rows.shape[-1]
    out = torch.empty(rows, heads * head_dim, dtype=torch.bfloat16, device=partial.device)
    kernel = _kernel(
        head_dim,
        heads // kv_heads,
        slices,
        bias is not None,
        q_norm is not None,
        launch.is_overlapping(),
        partial.device.index or 0,
    )
    arguments = [
        *(partial, partial if bias is None else bias),
        *(partial if q_norm is None else q_norm, partial if k_norm is None else k_norm),
        *(inverse_frequency, depths, length, k_rows, v_rows, ancestors, nodes, node_of_row, out),
        *(rows, stride, start_row, drafted, ancestors.shape[-1], k_rows.stride(1), k_rows.stride(0)),
        *(float(attention_scaling), float(eps), head_dim**-0.5),
    ]
    launch.launch(kernel, (PARTS, kv_heads, 1), THREADS, arguments, shared_bytes(head_dim))
    return out


def reference(
    partial: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    *,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    inverse_frequency: Tensor,
    depths: Tensor,
    length: Tensor,
    ancestors: Tensor,
    nodes: Tensor,
    node_of_row: Tensor,
    start_row: int,
    drafted: int,
    attention_scaling: float,
    eps: float,
    heads: int,
) -> Tensor:
    """What :func:`attend` computes, in torch; products in float32 of factors rounded to bfloat16."""
    rows, (kv_heads, _, dim) = partial.shape[1], k_rows.shape
    sums = partial.float().sum(0)[:, : (heads + 2 * kv_heads) * dim]
    if bias is not None:
        sums = sums + bias.float()
    q, k, v = sums.view(rows, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    angle = (length + depths).float()[:, None] * inverse_frequency
    cosine, sine = (
        (f(angle) * attention_scaling).bfloat16().float()[:, None] for f in (torch.cos, torch.sin)
    )

    def finished(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).bfloat16()

    k_rows[:, start_row : start_row + rows] = finished(k, k_norm).transpose(0, 1)
    v_rows[:, start_row : start_row + rows] = v.bfloat16().transpose(0, 1)
    end = start_row + drafted + int(length)
    keys, values = k_rows[:, start_row:end].float(), v_rows[:, start_row:end].float()
    query = finished(q, q_norm).float().view(rows, kv_heads, -1, dim)
    score = torch.einsum("rhgd,hnd->rhgn", query, keys) * dim**-0.5
    seen = ancestors[nodes][:, node_of_row[start_row : start_row + drafted]] != 0
    seen = torch.nn.functional.pad(seen, (0, int(length)), value=True)
    score = score.masked_fill(~seen[:, None, None], float("-inf"))
    weight = torch.exp(score - score.amax(-1, keepdim=True))
    total = torch.einsum("rhgn,hnd->rhgd", weight.bfloat16().float(), values)
    return (total / weight.sum(-1, keepdim=True)).bfloat16().flatten(1)
