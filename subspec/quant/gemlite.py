"""gemlite's Triton kernels for integers with scales and zeros, where that package is installed.

They tune themselves, for 7 to 9 seconds per shape; :func:`load_tuning` and :func:`save_tuning` keep the result on disk.
"""

import importlib.metadata
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from subspec.kernels.few_rows import apply_swiglu
from subspec.quant.level_linear import LevelLinear
from subspec.quant.optional_package import import_problem
from subspec.utils.console import Note
from subspec.utils.files import write_atomic


class GemLite(LevelLinear):
    """A Linear of gemlite's.

    The first call of a shape and number of rows tunes it, with 256 MiB of its own; after that call it may be captured.
    Its splits of the inputs add up with atomics, so results vary in the last bits.

    Args:
        q: integers below 2**bits [n, k]; scale, zero: [n, k / group].
        bits: 8, 4 or 2.
        swiglu: rows are gate and up interleaved 16 by 16.
    """

    kind, parts = "gemlite", ("words", "scale", "zero")

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor, group: int, *, bits: int = 4, swiglu: bool = False
    ) -> None:
        from gemlite.core import DType, GemLiteLinearTriton, forward_functional

        n, k = q.shape
        packed = GemLiteLinearTriton(
            bits, group_size=group, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        packed.pack(q.to(torch.uint8).contiguous(), scale.to(torch.bfloat16), zero.to(torch.bfloat16))
        self.swiglu, self.stride = swiglu, n
        self._forward = forward_functional
        # Only the call's arguments are kept: the module holds copies of small things on the device besides.
        arguments = (tensor.detach() for tensor in packed.get_tensor_args())
        self.words, self.scale, self.zero, *self._others = arguments
        self._meta = packed.get_meta_args()
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._forward(x, None, [*self.tensors, *self._others], self._meta)
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


def unfit(k: int, group: int) -> str | None:
    """Why it does not take a weight with ``k`` inputs in groups of ``group``; None if it does."""
    if group < 32 or group & (group - 1):
        return f"it has groups of 32, 64, 128 ..., not {group}"
    return f"{k} inputs are not a multiple of 64" if k % 64 else None


def unavailable() -> str | None:
    """Why it cannot run here, in a few words; None if it can."""
    logging.getLogger("gemlite").setLevel(logging.ERROR)  # it warns about each of its own settings files
    return import_problem("gemlite", "pip install gemlite", "gemlite.core")


def version() -> str:
    """Of the installed package; empty if there is none."""
    try:
        return importlib.metadata.version("gemlite")
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_tuning(file: Path, note: Note) -> bool:
    """Give gemlite the tuning of an earlier run; False if there is none."""
    known = file.is_file() and _gemlite().load_config(str(file), print_error=False)
    if file.is_file() and not known:
        note(f"{file} cannot be read: gemlite tunes itself again")
    return known


def save_tuning(file: Path, note: Note) -> None:
    """Keep gemlite's tuning, which includes what :func:`load_tuning` gave it."""
    try:
        # It writes in place, and takes a file that it cannot read for an empty one.
        with TemporaryDirectory() as folder:
            written = Path(folder) / file.name
            _gemlite().cache_config(str(written))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, written.read_bytes())
    except OSError as error:
        note(f"gemlite's tuning is not kept: cannot write {file} ({error.strerror})")


def _gemlite() -> Any:
    from gemlite.core import GemLiteLinearTriton

    return GemLiteLinearTriton
