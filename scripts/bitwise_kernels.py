"""Time of the batch-invariant kernels of a target's pass beside the device library's, on this card.

    python scripts/bitwise_kernels.py [--shape qwen2_5_7b] [--rows 1,64,320,512] [--contexts 2048,12000] [--json FILE]

Every Linear of a layer with every tile shape, at every number of rows, against cuBLAS; attention of a random tree and
of a run of text against scaled-dot-product attention with a mask. Weights and inputs are random. Microseconds, the
fastest of three rounds of 20 replays of a captured graph. Prints a table for people and one JSON line last.
"""

import argparse
import functools
import itertools
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from subspec.decoding.bitwise import PassShapes
from subspec.kernels.choose_tiling import PARTIAL_ROLES
from subspec.kernels.invariant_attention import attend, path_table
from subspec.kernels.invariant_linear import CANDIDATES, multiply, split_k
from subspec.kernels.timing import graph_time
from subspec.targets.planted import SHAPES

DTYPE = torch.bfloat16


def linears(shapes: PassShapes, vocab: int, rows: list[int]) -> list[dict[str, Any]]:
    """A row per matrix and number of rows: microseconds of the library and of every tile shape."""
    device, found = torch.device("cuda"), []
    for role, (n, k) in shapes.matrices(vocab).items():
        weight = torch.randn(n, k, dtype=DTYPE, device=device)
        for count in rows:
            x = torch.randn(count, k, dtype=DTYPE, device=device)
            entry: dict[str, Any] = {"role": role, "n": n, "k": k, "rows": count}
            out = torch.empty(count, n, dtype=DTYPE, device=device)
            entry["cublas"] = 1e6 * graph_time(functools.partial(torch.mm, x, weight.t(), out=out))
            if role in PARTIAL_ROLES:
                out = torch.empty(split_k(n, k).parts, count, n, dtype=torch.float32, device=device)
            for tiling in CANDIDATES:
                try:
                    call = functools.partial(multiply, x, (weight,), (None,), out, tiling)
                    entry[str(tiling)] = 1e6 * graph_time(call)
                except Exception as error:
                    entry[str(tiling)] = str(error).splitlines()[0]
            found.append(entry)
    return found


def random_tree(nodes: int, width: int) -> tuple[Tensor, Tensor]:
    """Ancestors and depths of a tree of ``width`` nodes a level with random parents."""
    generator = torch.Generator().manual_seed(0)
    ancestors, depths = torch.eye(nodes, dtype=torch.bool), torch.zeros(nodes, dtype=torch.int64)
    for node in range(1, nodes):
        level = (node - 1) // width
        first = 0 if level == 0 else 1 + (level - 1) * width
        parent = first + int(torch.randint(1 if level == 0 else width, (1,), generator=generator))
        ancestors[node] |= ancestors[parent]
        depths[node] = depths[parent] + 1
    return ancestors.cuda(), depths.cuda()


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What transformers' modules compute: keys and values repeated for every head, and a mask."""
    group = query.shape[1] // keys.shape[0]
    repeated = [part.repeat_interleave(group, 0)[None] for part in (keys, values)]
    own = query.transpose(0, 1)[None]
    return torch.nn.functional.scaled_dot_product_attention(own, *repeated, attn_mask=mask)


def attention(shapes: PassShapes, contexts: list[int]) -> list[dict[str, Any]]:
    """A row per context and kind of batch."""
    device, heads, found = torch.device("cuda"), shapes.heads, []
    for past, (kind, rows) in itertools.product(
        contexts, (("one row", 1), ("tree", 289), ("run of text", 512))
    ):
        is_tree = kind == "tree"
        depths = torch.arange(rows, device=device)
        behind = torch.ones(rows, rows, dtype=torch.bool, device=device).tril_()
        paths = depths.to(torch.int32)
        if is_tree:
            behind, depths = random_tree(rows, 6)
            paths = path_table(behind, depths, int(depths.max()))
        length = past + int(depths.max()) + 1
        query = torch.randn(rows, heads.query, heads.dim, dtype=DTYPE, device=device)
        keys, values = torch.randn(2, heads.kv, past + rows, heads.dim, dtype=DTYPE, device=device)
        partial = torch.empty(heads.partial_floats(rows, length), dtype=torch.float32, device=device)
        out = torch.empty(rows, heads.query * heads.dim, dtype=DTYPE, device=device)
        ours = functools.partial(
            attend, query, keys, values, past + depths, torch.tensor([past], device=device), paths,
            is_tree=is_tree, length=length, heads=heads, scale=heads.dim**-0.5, partial=partial, out=out,
        )  # fmt: skip
        visible = torch.cat([torch.ones(rows, past, dtype=torch.bool, device=device), behind], 1)
        mask = torch.zeros(visible.shape, dtype=DTYPE, device=device).masked_fill_(~visible, -1e30)[
            None, None
        ]
        theirs = functools.partial(masked_attention, query, keys, values, mask)
        found.append(
            {
                "past": past,
                "kind": kind,
                "rows": rows,
                "ours": 1e6 * graph_time(ours),
                "sdpa with mask": 1e6 * graph_time(theirs),
            }
        )
    return found


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2_5_7b")
    parser.add_argument("--rows", default="1,64,320,512")
    parser.add_argument("--contexts", default="500,2048,12000")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = SHAPES[options.shape]()
    shapes = PassShapes.of(model, DTYPE.itemsize)
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": options.shape,
        "linears": linears(shapes, model.vocab_size, [int(n) for n in options.rows.split(",")]),
        "attention": attention(shapes, [int(n) for n in options.contexts.split(",")]),
    }
    console = Console(width=200)
    show(console, f"Linears of {options.shape}, microseconds", results["linears"])
    show(console, "attention of a layer, microseconds", results["attention"])
    print(json.dumps(results))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
