"""What choosing a kernel asks of the device: which kernels are there, and how long one takes.

gemlite tunes itself, for 7 to 9 seconds per shape; its findings are kept beside our own measurements, so that a
second start does not tune again.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from subspec.kernels import launch
from subspec.kernels.timing import slug
from subspec.quant import codebook_linear, level_linear
from subspec.quant.affine_format import Format
from subspec.quant.kernel_timing import variant_time
from subspec.quant.level_linear import GemLite, Variant
from subspec.utils.console import Note
from subspec.utils.disk import replace_file

Won = dict[str, tuple[Format, tuple[int, int]]]
"""Format and shape by role."""


class Bench(Protocol):
    """A device to choose for.

    Attributes:
        name: of the card, as records and file names have it.
        device: where the kernels will run.
        launches: how they are launched there (:func:`subspec.kernels.launch.how`), and measured.
    """

    name: str
    device: torch.device
    launches: str

    def unavailable(self, kernel: str) -> str | None:
        """Why a kernel cannot run here; None when it can."""

    def seconds(self, variant: Variant, format_: Format, role: str, n: int, k: int, rows: int) -> float:
        """Seconds of one call; any exception says that this kernel cannot do it."""

    def begin(self, kernels: list[str], folder: Path, note: Note) -> None:
        """Called once before anything is asked, with the kernels that take part."""

    def finish(self, won: Won, rows: int, measured: bool, folder: Path, note: Note) -> None:
        """Called once at the end. ``won``: the roles that gemlite won; ``measured``: whether anything was."""


class CudaBench:
    """The :class:`Bench` of a CUDA device.

    Args:
        overlap: whether launches are to overlap; None: where the device can.
    """

    def __init__(self, device: torch.device, overlap: bool | None = None) -> None:
        self.device = device
        self.launches = launch.how(device, overlap)
        self.name = torch.cuda.get_device_name(device)
        self._gemlite = False

    def unavailable(self, kernel: str) -> str | None:
        with torch.cuda.device(self.device):
            if kernel in codebook_linear.LUT_KERNELS:
                return codebook_linear.unavailable(kernel, self.device)
            return level_linear.unavailable(kernel, self.device)

    def seconds(self, variant: Variant, format_: Format, role: str, n: int, k: int, rows: int) -> float:
        with torch.cuda.device(self.device):
            overlap = self.launches == launch.OVERLAPPING
            return variant_time(
                variant, n, k, rows, self.device, swiglu=role == "gate_up", format_=format_, overlap=overlap
            )

    def begin(self, kernels: list[str], folder: Path, note: Note) -> None:
        self._gemlite = GemLite.kind in kernels
        if self._gemlite:
            load_tuning(self._tuning(folder), note)

    def finish(self, won: Won, rows: int, measured: bool, folder: Path, note: Note) -> None:
        with torch.cuda.device(self.device), torch.inference_mode():
            for role, (format_, (n, k)) in won.items():
                swiglu = role == "gate_up"
                linear = format_.random_linear(Variant(GemLite.kind), n, k, self.device, swiglu=swiglu)
                # A tree's first level has one row, for which gemlite has another kernel to tune.
                for count in {1, rows}:
                    linear(torch.zeros(count, k, device=self.device, dtype=torch.bfloat16))
                del linear
        if won or measured:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        if self._gemlite and (won or measured):
            save_tuning(self._tuning(folder), note)

    def _tuning(self, folder: Path) -> Path:
        return folder / f"gemlite-{slug(self.name)}-{level_linear.gemlite_version()}.json"


def load_tuning(file: Path, note: Note) -> bool:
    """Let gemlite know what it found out in an earlier run; False: nothing to be known."""
    if not file.is_file():
        return False
    known = _gemlite().load_config(str(file), print_error=False)
    if not known:
        note(f"{file} cannot be read: gemlite tunes itself again")
    return known


def save_tuning(file: Path, note: Note) -> None:
    """Keep what gemlite found out, together with what it knew."""
    try:
        with (
            TemporaryDirectory() as folder
        ):  # it writes in place, and what it cannot read it takes for nothing
            written = Path(folder) / file.name
            _gemlite().cache_config(str(written))
            replace_file(file, written.read_bytes())
    except OSError as error:
        note(f"gemlite's tuning is not kept: cannot write {file} ({error.strerror})")


def _gemlite() -> Any:
    from gemlite.core import GemLiteLinearTriton

    return GemLiteLinearTriton
