"""Decoder layers over a few rows on a CPU: our own kernels, where the machine has a C compiler and AVX2.

torch's matrix products rearrange a weight for two rows as for two hundred, and its small operations take as long as a
quantized layer. The source (``csrc/cpu.c``) is compiled once per machine, which takes a few seconds, and kept in the
cache. Without it, everything runs on torch's operations.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from subspec.utils.console import print_note
from subspec.utils.cpu import cpu_name
from subspec.utils.disk import cache_root

BLOCK = 64
"""Inputs that share a factor."""

TILE = 8
"""Outputs of a tile of quantized weights."""

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")

SWITCH = "SUBSPEC_CPU_KERNELS"
"""Environment variable that turns the kernels off (``off``)."""


class Matrix(ctypes.Structure):
    """A weight: float32 [outputs, inputs], or tiles (:class:`Tiles`). Holds addresses only."""

    _fields_ = (("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bits", ctypes.c_int64))


MATRICES = ("q", "k", "v", "out", "gate", "up", "down")
VECTORS = ("input_norm", "post_norm", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm")


class Layer(ctypes.Structure):
    """Addresses of a decoder layer's weights; those of biases and norms that it lacks are null."""

    _fields_ = (*((name, Matrix) for name in MATRICES), *((name, ctypes.c_void_p) for name in VECTORS))


_SIZES = ("rows", "hidden", "inner", "q_heads", "kv_heads", "dim", "threads")
_PLACES = ("head_stride", "write", "read", "length")


class Pass(ctypes.Structure):
    """One pass over a few rows; fields as in ``csrc/cpu.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("turns", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _PLACES),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("mask_start", ctypes.c_int64),
        ("masked", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    )


class Tiles:
    """A quantized weight as ``csrc/cpu.c`` reads it: w = q * factor + constant.

    Args:
        q: integers [n, k]: uint8 below 16 with 4 bits, else int8.
        factor, constant: [n, k / group], groups of a multiple of 64.
        bits: 4 or 8.
    """

    def __init__(self, q: Tensor, factor: Tensor, constant: Tensor, bits: int) -> None:
        n, k = q.shape
        tiles = q.view(n // TILE, TILE, k // BLOCK, BLOCK)
        if bits == 4:
            low, high = tiles.unflatten(-1, (2, -1)).unbind(-2)
            tiles = low | (high << 4)
        # A vector has four inputs of each output.
        self.words = tiles.unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4).contiguous()
        pair = torch.stack([factor, constant]).repeat_interleave(k // BLOCK // factor.shape[1], dim=-1)
        pair = pair.view(2, n // TILE, TILE, k // BLOCK)
        self.scales = pair.permute(1, 3, 0, 2).to(torch.float16).contiguous()
        self.shape, self.bits = (n, k), bits

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def matrix(self, row: int = 0) -> Matrix:
        """The outputs from ``row`` (a multiple of 8) on."""
        k = self.shape[1]
        scales = self.scales.data_ptr() + row * k // BLOCK * 4
        return Matrix(self.words.data_ptr() + row * k * self.bits // 8, scales, self.bits)


def tile_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of :class:`Tiles`."""
    return n * k * bits // 8 + 4 * n * k // BLOCK


def misfit(n: int, k: int) -> str | None:
    """Why a quantized weight [n, k] cannot be tiles; None: it can."""
    return f"[{n}, {k}] is no multiple of [{TILE}, {BLOCK}]" if n % TILE or k % BLOCK else None


def float_matrix(weight: Tensor) -> Matrix:
    """A contiguous float32 weight."""
    return Matrix(weight.data_ptr(), None, 0)


class Scratch(threading.local):
    """Memory for intermediate results, as large as the largest pass of this thread so far."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def at_least(self, size: int) -> int:
        """Address of ``size`` bytes."""
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size + size // 4, dtype=torch.uint8)
        return self._bytes.data_ptr()


class CpuKernels:
    """The compiled functions."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.subspec_scratch_bytes.restype = ctypes.c_int64
        self._scratch = Scratch()
        library, number, address = self._library, ctypes.c_int64, ctypes.c_void_p
        self._layer, self._linear, self._norm = library.subspec_layer, library.subspec_linear, library.subspec_norm
        self._layer.argtypes = [address] * 4
        self._linear.argtypes = [address, address, number, number, number, address, address, number]
        self._norm.argtypes = [address, address, number, number, ctypes.c_float, address]

    def begin(self, run: Pass) -> None:
        """Prepare a pass whose other fields are set."""
        run.threads = torch.get_num_threads()
        run.scratch = None
        run.scratch = self._scratch.at_least(self._library.subspec_scratch_bytes(ctypes.byref(run)))

    def layer(self, layer: Layer, run: Pass, keys: int, values: int) -> None:
        """Run a layer; ``keys`` and ``values``: addresses of its part of the cache."""
        self._layer(ctypes.addressof(layer), ctypes.addressof(run), keys, values)

    def linear(self, matrix: Matrix, x: Tensor, outputs: int) -> Tensor:
        """x, contiguous float32 [rows, inputs] -> [rows, outputs]."""
        rows, inputs = x.shape
        y = torch.empty(rows, outputs)
        scratch = self._scratch.at_least(rows * inputs * 2 + 1024)
        places = x.data_ptr(), rows, inputs, outputs, y.data_ptr(), scratch
        self._linear(ctypes.addressof(matrix), *places, torch.get_num_threads())
        return y

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of contiguous float32 [rows, n]."""
        y = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), *x.shape, eps, y.data_ptr())
        return y


@functools.cache
def cpu_kernels() -> CpuKernels | str:
    """The kernels, compiled if need be; or why there are none, in a few words."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for x86-64, not {platform.machine()}"
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "the CPU has no AVX2"
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        return "no C compiler was found (cc, gcc or clang)"
    source = Path(str(resources.files("subspec.kernels").joinpath("csrc", "cpu.c")))
    facts = (source.read_text(encoding="utf-8"), compiler, cpu_name(), *FLAGS)
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    try:
        return CpuKernels(_compiled(source, cache_root() / "kernels" / f"cpu-{digest}.so", compiler))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} failed: {str(error).splitlines()[0]}"


def _compiled(source: Path, path: Path, compiler: str) -> Path:
    """The shared library ``path``; another process may make it at the same time."""
    if path.is_file():
        return path
    print_note("compiling the CPU kernels, once: a few seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, "-o", str(built), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OSError((done.stderr.strip() or f"status {done.returncode}").splitlines()[0])
        built.replace(path)
    return path
