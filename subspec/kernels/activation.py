"""The activation between gate, up and down, of outputs that alternate 16 by 16."""

from torch import Tensor
from torch.nn import functional


def apply_swiglu(y: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 n] -> [rows, n], in the dtype of ``y``.

    Columns are laid out as :func:`subspec.kernels.int4.interleave` lays out the rows of a fused weight.
    """
    gate, up = y.unflatten(-1, (-1, 2, 16)).unbind(-2)
    return (functional.silu(gate) * up).flatten(-2)
