"""Time of the look-up kernel of ``quant=higgs`` on this card, every setting checked against its reference first.

    python scripts/higgs_benchmark.py [--shape qwen2_5_7b] [--bits 4] [--rows 1 6 8] [--json FILE]

Prints microseconds per call for every setting and number of rows, with the rotation of the inputs (whose
own time comes first), beside the time the weights' bytes alone would take, and, for comparison, the HQQ kernels that
are here. Calls are timed inside a CUDA graph that takes turns over enough weights to defeat the L2 cache. A setting
that fails or is wrong is reported and skipped. The last line is JSON.
"""

import argparse
import json

import torch

from subspec.kernels.timing import graph_time
from subspec.quant.codebook_linear import CodebookLinear, HiggsFormat, ReferenceCodebook, unavailable
from subspec.quant.hadamard import Rotation, library_problem, rotate_library, rotate_triton
from subspec.quant.hqq import HqqFormat
from subspec.quant.kernel_times import rotated_time, rotation
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.pairs import QuantizedPairs

SHAPES = {
    "qwen2_5_7b": {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "llama3_1_8b": {
        "qkv": (6144, 4096),
        "out": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "issue": {"out": (3584, 3584), "up": (18944, 3584), "down": (3584, 18944)},
}
"""Outputs and inputs by role; ``gate_up`` ends with its activation. ``issue``: the shapes of the design's table."""

DEVICE = torch.device("cuda")


def memory_bandwidth() -> float:
    """Bytes per second of a large device copy, read + written."""
    buffer = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(buffer)
    return 2 * buffer.numel() / graph_time(lambda: other.copy_(buffer))


def wrong(linear: LevelLinear, codes: QuantizedPairs, swiglu: bool) -> str | None:
    """The error of a result; None if it is right."""
    x = torch.randn(5, codes.rotation.in_features, device=DEVICE, dtype=torch.bfloat16)
    found, exact = (call(x).float() for call in (linear, ReferenceCodebook(codes, swiglu=swiglu)))
    if not swiglu:
        found, exact = found.sum(0), exact.sum(0)
    error = float((found[:, : exact.shape[1]] - exact).norm() / exact.norm())
    return None if error < 0.02 else f"relative error {error:.3g}"


def measure(format_: HiggsFormat, role: str, n: int, k: int, rows: list[int]) -> list[dict]:
    """Times of all settings for one shape."""
    swiglu, results = role == "gate_up", []
    weight, small = (format_.random_weight(count, k, DEVICE) for count in (n, 512))
    for variant in format_.variants(CodebookLinear.kind, role, n, k):
        try:
            problem = wrong(format_.linear(variant, small, swiglu=swiglu), small, swiglu)
            if problem is None:
                linears = rotation(format_.linear(variant, weight, swiglu=swiglu), DEVICE)
                times = {count: rotated_time(linears, inputs(count, k)) * 1e6 for count in rows}
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem is not None:
            print(f"{role:8} {variant!s:48} {problem}", flush=True)
            continue
        results.append({"role": role, "setting": str(variant), "shape": [n, k], "us": times})
        show(role, str(variant), times)
        del linears
    return results


def compare(role: str, n: int, k: int, rows: list[int]) -> list[dict]:
    """Times of the 4-bit HQQ kernels with their usual settings."""
    results = []
    for kernel in HqqFormat().kernels:
        if HqqFormat().unavailable(kernel, DEVICE):
            continue
        variant = Variant(kernel, 4 if role == "gate_up" else 2, 0)
        linears = rotation(HqqFormat().random_linear(variant, n, k, DEVICE, swiglu=role == "gate_up"), DEVICE)
        times = {count: rotated_time(linears, inputs(count, k)) * 1e6 for count in rows}
        results.append({"role": role, "setting": f"hqq {variant}", "shape": [n, k], "us": times})
        show(role, f"hqq {variant}", times)
        del linears
    return results


def rotations(k: int, rows: list[int]) -> list[dict]:
    """Times of the rotation alone."""
    rotated, results = Rotation.of(k, 512), []
    ways = {"rotate triton": rotate_triton}
    if library_problem() is None:
        ways["rotate library"] = rotate_library
    for name, rotate in ways.items():
        times = {}
        for count in rows:
            x = inputs(count, k)
            times[count] = graph_time(lambda x=x, f=rotate: [f(x, rotated) for _ in range(20)]) / 20 * 1e6
        results.append({"role": "rotation", "setting": name, "shape": [k], "us": times})
        show(f"{k}", name, times)
    return results


def inputs(rows: int, k: int) -> torch.Tensor:
    """bfloat16 [rows, k]."""
    return torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)


def show(role: str, name: str, times: dict[int, float]) -> None:
    """One line."""
    print(f"{role:8} {name:48} " + "  ".join(f"{rows}:{t:6.1f}" for rows, t in times.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_7b")
    parser.add_argument("--bits", type=int, nargs="*", default=[4])
    parser.add_argument("--dim", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 6, 8])
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = memory_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, memory {bandwidth / 1e12:.2f} TB/s")
    print("lut_mma:", unavailable(CodebookLinear.kind, DEVICE) or "available", flush=True)
    results = []
    with torch.inference_mode():
        for k in sorted({k for _, k in SHAPES[options.shape].values()}):
            results += rotations(k, options.rows)
        for bits in options.bits:
            for role, (n, k) in SHAPES[options.shape].items():
                print(
                    f"{bits} bits, {n} x {k}: {n * k * (bits + 1 / 16) / 8 / bandwidth * 1e6:.1f} us for the bytes"
                )
                found = measure(HiggsFormat(bits, options.dim), role, n, k, options.rows)
                for count in options.rows:
                    best = min(found, key=lambda result: result["us"][count], default=None)
                    if best is not None:
                        print(f"{role:8} best at {count} rows: {best['setting']}, {best['us'][count]:.1f} us")
                results += [{"bits": bits, **result} for result in found]
                if bits == 4:
                    results += compare(role, n, k, options.rows)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bandwidth": bandwidth}
    print(json.dumps({**facts, "results": results}))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**facts, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
