"""Compile every GPU kernel for every card, without a GPU, and tabulate what it takes of a multiprocessor.

    python scripts/kernel_table.py --out experiments/cards/README.md

CUDA sources go through nvcc in every setting that runs with the default group sizes compile. Triton kernels are
compiled ahead of time in every form in which the planner's traces launch them, for the shapes of :data:`TARGETS`.
Registers and spills are ptxas's. A kernel that takes more shared memory than a block of the card may have is marked;
the script ends with 1 if a kernel has no setting that fits.
"""

import argparse
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.backends.compiler import GPUTarget

import subspec
from subspec.codec.format import CHUNK
from subspec.config.schema import PlantedTargetConfig
from subspec.decoding.bitwise import ROLES
from subspec.decoding.sampling import Sampling
from subspec.kernels import int4_wide, modules
from subspec.kernels.invariant_linear import CANDIDATES
from subspec.levels.build import role_shapes
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.trace import TargetTrace
from subspec.quant.hadamard import Rotation, rotate_triton
from subspec.targets.model_spec import ModelSpec
from subspec.targets.planted import planted_config

CARDS = {
    80: ("A100", 163),
    86: ("RTX 30", 99),
    89: ("RTX 40", 99),
    90: ("H100, H200", 227),
    100: ("B200", 227),
    120: ("RTX 50", 99),
}
"""Cards by compute capability, and the KiB of shared memory that one block may have (CUDA C++ programming guide,
"Technical Specifications per Compute Capability")."""

OVERLAPS = 90
"""Least compute capability whose launches overlap."""

TARGETS = ("qwen2_5_7b", "llama3_1_8b", "tiny")
"""Planted shapes whose launches are compiled: groups of 7 and 4 heads of 128 numbers, and small heads."""

CSRC = Path(subspec.__file__).parent / "kernels" / "csrc"


@dataclass(frozen=True)
class Use:
    """What a compiled kernel takes: registers of a thread, bytes it spills, bytes of shared memory of a block."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class CudaKernel:
    """A CUDA kernel in one setting, as :func:`subspec.kernels.compile.compile_cuda` takes it."""

    name: str
    files: tuple[str, ...]
    macros: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        # HALF_OUT has one value here: all kernels that read activations are 4-bit and read float16.
        return ", ".join(f"{key} {value}" for key, value in self.macros if key != "HALF_OUT") or "one setting"

    def runs_on(self, capability: int) -> bool:
        """Launches overlap from compute capability 9.0 on (:mod:`subspec.kernels.launch`); it alone has warp groups."""
        if self.name == WIDE and capability != OVERLAPS:
            return False
        return capability >= OVERLAPS or not dict(self.macros).get("OVERLAP")


def settings(name: str, files: Iterable[str], **macros: Iterable[int]) -> list[CudaKernel]:
    """A kernel in every combination of the macros' values."""
    return [
        CudaKernel(name, tuple(files), tuple(zip(macros, values, strict=True)))
        for values in itertools.product(*macros.values())
    ]


WIDE = "int4_wide_linear"
FEW_ROWS, RESTORE = "few_rows.cu", "restore.cu"
TILES, WARPS, EIGHTS, BITS, BOTH = (2, 4), (4, 8), (1, 4), (4, 3, 2), (0, 1)

CUDA = [
    *settings(
        "int4_linear", [FEW_ROWS, "int4.cu"], TILES=(*TILES, 8), WARPS=WARPS, EIGHTS=EIGHTS, PLANES=(1, 2),
        SWIGLU=BOTH, HALF_OUT=(1,), OVERLAP=BOTH,
    ),
    *(
        kernel
        for groups in range(1, int4_wide.MOST_WARP_GROUPS + 1)
        for eights in int4_wide.EIGHTS
        for kernel in settings(
            WIDE, [FEW_ROWS, "int4_wide.cu"], TILES=(4,), SWIGLU=BOTH, HALF_OUT=(1,), TILED=(1,), OVERLAP=(1,),
            **{key: (value,) for key, value in int4_wide.WideGrid(8 * eights, 1, groups, 1).macros.items()},
        )
    ),
    *settings(
        "codebook_linear", [FEW_ROWS, "codebook.cu"], BITS=BITS, GROUP_STEPS=(4,), TILES=TILES, WARPS=(8,),
        EIGHTS=EIGHTS, SWIGLU=BOTH,
    ),
    *settings("restore_integers", [RESTORE, "restore_integers.cu"], CHUNK=(CHUNK,), WIDTH=(8, *BITS)),
    *settings("restore_codebook", [RESTORE, "restore_codebook.cu"], CHUNK=(CHUNK,)),
    *settings("codebook_dequantize", [RESTORE, "codebook_dequantize.cu"], BITS=BITS, STEPS=(1, 2, 4, 8)),
]  # fmt: skip


def compile_cuda(kernel: CudaKernel, capability: int) -> Use:
    """Compile with nvcc.

    Raises:
        SystemExit: nvcc refuses.
    """
    header = "".join(f"#define {key} {value}\n" for key, value in kernel.macros)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(header + "".join((CSRC / file).read_text() for file in kernel.files))
        arch = f"-arch=sm_{capability}{'a' if kernel.name == WIDE else ''}"
        command = ["nvcc", arch, "-cubin", "-std=c++17", "-Xptxas", "-v", "-o", f"{folder}/kernel.cubin", source]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{kernel.name} ({kernel}) does not compile for {arch}:\n{ran.stderr}")
    return ptxas_use(ran.stderr)


def ptxas_use(said: str, dynamic: int = 0) -> Use:
    """Read ``ptxas -v``; ``dynamic``: bytes of shared memory that the launch adds."""

    def number(pattern: str) -> int:
        return max(map(int, re.findall(pattern, said)), default=0)

    static = number(r"(\d+) bytes smem")
    return Use(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores"), static + dynamic)


# ---------------------------------------------------------------------------------------------- Triton


@dataclass(frozen=True)
class Launch:
    """A launch that a trace made. Pointers stand for tensors by their dtype."""

    kernel: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return ", ".join(f"{key} {getattr(value, 'name', value)}" for key, value in self.options)


class Recorder:
    """Stands for a module of Triton kernels on the meta device, and keeps what is launched."""

    def __init__(self) -> None:
        self.launches: dict[Launch, None] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "tl":
            return tl
        return RecordedKernel(name, self.launches)


@dataclass(frozen=True)
class RecordedKernel:
    """``kernel[grid](...)`` of a recorder."""

    name: str
    launches: dict[Launch, None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            kept = tuple(value.dtype if isinstance(value, Tensor) else value for value in arguments)
            if "OPERAND" in options:
                options["OPERAND"] = tl.bfloat16  # what a GPU multiplies; traces leave it open
            self.launches[Launch(self.name, kept, tuple(options.items()))] = None

        return launch


def recorded() -> list[Launch]:
    """The launches of passes, levels and rotations of :data:`TARGETS`, each once."""
    recorder = Recorder()
    modules._NO_LAUNCH = recorder  # type: ignore[assignment]
    for shape in TARGETS:
        config = planted_config(PlantedTargetConfig(name=shape, shape=shape))
        spec = ModelSpec.of(config)
        target = TargetTrace(config, 2, bitwise=True, sliced=True)
        assert target.model.bitwise is not None
        for tiling in CANDIDATES:
            target.model.bitwise.tilings = dict.fromkeys(ROLES, tiling)
            target._peaks.clear()
            target.prefill_bytes(512, 2048)
            target.tree_pass_bytes(289, 48, 2048)
            target.tree_pass_bytes(289, 48, 2048, texts=3, piece=256)
            target.verify_bytes(289, 48, Sampling())
        for own_head, width in ((False, 6), (True, 4)):
            linears = fused_linears(role_shapes(spec.layer), exact=False)
            for texts in (1, 4, 8):
                level = LevelShape.of(spec, linears, own_head=own_head)
                captured_level_bytes(level, width, Sampling(), texts)
        for inputs in (spec.hidden, spec.intermediate):
            rotate_triton(torch.empty(6, inputs, dtype=torch.bfloat16, device="meta"), Rotation.of(inputs, 512))
    return list(recorder.launches)


class Compiler:
    """Compiles launches for one card: what Triton asks of a driver, without a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        triton.runtime.driver.set_active(self)  # type: ignore[arg-type]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def compile(self, launch: Launch, *, overlap: bool) -> Use:
        """Compile a launch as it would be on this card."""
        kernel = next(
            found
            for name in ("invariant", "level", "rotate")
            if (found := getattr(import_module(f"subspec.kernels.{name}"), launch.kernel, None)) is not None
        )
        options = dict(launch.options)
        if overlap and "OVERLAP" in kernel.arg_names:
            options |= {"OVERLAP": True, "launch_pdl": True}
        compiled = kernel.warmup(*launch.arguments, grid=(1,), **options)
        return assemble(compiled.asm["ptx"], compiled.metadata.shared, self.capability)


@functools.cache
def ptxas() -> str:
    """The assembler that comes with Triton; nvcc's own may be older than Triton's PTX."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


@functools.cache
def assemble(ptx: str, shared: int, capability: int) -> Use:
    """Assemble PTX and read what the kernel takes."""
    suffix = "a" if capability >= 90 else ""
    program = f"{ptxas()}-blackwell" if capability >= 100 else ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [program, "-v", f"--gpu-name=sm_{capability}{suffix}", source, "-o", f"{folder}/kernel.cubin"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"ptxas refuses a kernel for sm_{capability}{suffix}:\n{ran.stderr}")
    return ptxas_use(ran.stderr, shared)


# ---------------------------------------------------------------------------------------------- tables

Found = dict[str, dict[str, dict[int, Use]]]
"""By kernel, setting and capability."""


def cuda_uses() -> Found:
    """All CUDA kernels on all cards."""
    jobs = [(kernel, capability) for kernel in CUDA for capability in CARDS if kernel.runs_on(capability)]
    found: Found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        uses = pool.map(lambda job: compile_cuda(*job), jobs)
        for (kernel, capability), use in zip(jobs, progress(uses, len(jobs), "CUDA"), strict=True):
            found.setdefault(kernel.name, {}).setdefault(str(kernel), {})[capability] = use
    return found


def triton_uses() -> Found:
    """All recorded launches on all cards; of launches in one setting the largest."""
    launches, found = recorded(), Found()
    for capability in CARDS:
        compiler = Compiler(capability)
        for launch in progress(launches, len(launches), f"Triton, {capability}"):
            use = compiler.compile(launch, overlap=capability >= OVERLAPS)
            uses = found.setdefault(launch.kernel, {}).setdefault(str(launch), {})
            before = uses.get(capability, use)
            uses[capability] = Use(*map(max, astuple(use), astuple(before)))
    return found


def progress(items: Iterable[Any], count: int, what: str) -> Iterator[Any]:
    """``items``, with a line about every tenth part on standard error."""
    for number, item in enumerate(items):
        if number % max(1, count // 10) == 0:
            print(f"{what}: {number} of {count}", file=sys.stderr, flush=True)
        yield item


def fits(use: Use, capability: int) -> bool:
    """Whether a block of the card may have so much shared memory."""
    return use.shared <= CARDS[capability][1] * 1024


def table(uses: dict[str, dict[int, Use]]) -> str:
    """Settings by card: registers, spilled bytes where there are any, KiB of shared memory; **bold** does not fit."""

    def cell(use: Use, capability: int) -> str:
        spilled = f", {use.spilled} B spilled" if use.spilled else ""
        text = f"{use.registers}{spilled}, {use.shared / 1024:.3g} KiB"
        return text if fits(use, capability) else f"**{text}**"

    head = "| setting | " + " | ".join(f"{name} ({cc / 10:.1f})" for cc, (name, _) in CARDS.items()) + " |"
    rows = [
        f"| {setting} | " + " | ".join(cell(by_card[cc], cc) if cc in by_card else "-" for cc in CARDS) + " |"
        for setting, by_card in sorted(uses.items())
    ]
    return "\n".join([head, "|---" * (len(CARDS) + 1) + "|", *rows])


def unfit(found: Found) -> list[str]:
    """Kernels none of whose settings fits a card, by kernel and card. ``linear`` is measured among its settings."""
    return [
        f"{kernel} on {CARDS[cc][0]}"
        for kernel, uses in found.items()
        for cc in CARDS
        if not (any if kernel == "linear" else all)(fits(by_card[cc], cc) for by_card in uses.values() if cc in by_card)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file whose part below the mark is replaced")
    parser.add_argument("--only", choices=("cuda", "triton"))
    arguments = parser.parse_args()
    found: Found = {}
    if arguments.only != "triton":
        found |= cuda_uses()
    if arguments.only != "cuda":
        found |= triton_uses()
    parts = [f"## {kernel}\n\n{table(uses)}\n" for kernel, uses in found.items()]
    text = MARK + "\n\n" + "\n".join(parts)
    if arguments.out is None:
        print(text)
    else:
        before = arguments.out.read_text().split(MARK)[0] if arguments.out.exists() else ""
        arguments.out.write_text(before + text)
    if missing := unfit(found):
        raise SystemExit(f"no setting fits: {', '.join(missing)}")


MARK = "<!-- below: scripts/kernel_table.py -->"

if __name__ == "__main__":
    main()
