"""Page-locked host memory of exact size.

PyTorch's pinned allocator rounds every block up to a power of two: a 466 MB layer would pin 512 MB. Anonymous
memory registered with CUDA is not rounded, and is returned to the system when it is closed.
"""

import contextlib
import mmap

import torch
from torch import Tensor

from subspec.errors import SubspecError


class PinnedBuffer:
    """``nbytes`` of host memory, page-locked for a CUDA device (not locked with ``pin=False``).

    Attributes:
        tensor: uint8 [nbytes] over the memory.

    Raises:
        SubspecError: the system lacks the memory, or does not permit the process to lock it.
    """

    def __init__(self, nbytes: int, *, pin: bool = True) -> None:
        self._registered = False
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1))
        except OSError as error:
            raise SubspecError(
                f"{nbytes / 2**30:.2f} GiB of host memory cannot be allocated ({error.strerror}): "
                "free memory (or raise ulimit -v), or set offload.resident_layers higher"
            ) from error
        with contextlib.suppress(AttributeError, OSError):  # huge pages: fewer faults, faster pinning
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        if pin:
            self.lock()

    def lock(self) -> None:
        """Page-lock memory that was made with ``pin=False``."""
        nbytes = self.tensor.numel()
        code = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), nbytes, 0))
        if code != 0:
            raise SubspecError(
                f"{nbytes / 2**30:.2f} GiB of host memory could not be page-locked (CUDA error {code}): "
                "raise the limit (ulimit -l), free memory, or set offload.resident_layers higher"
            )
        self._registered = True

    def close(self) -> None:
        """Unlock the memory; the tensor must not be used any more. May be called twice."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._registered = False

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit the driver may be gone already
            self.close()
