"""HIGGS (Malinovskii et al. 2024, arXiv 2411.17525): rotate, scale, round to a grid that is optimal for Gaussians.

No calibration data and no search: after a random Hadamard rotation weights are close to Gaussian, and for a Gaussian
the best grid is known in advance. One scale per 256 weights and no zero point make 4.06 bits per weight, where HQQ's
usual 4 bits take 4.5, with a smaller error (``experiments/quantizers``).
"""

import torch
from torch import Tensor, nn

from subspec.config.enums import Hadamard, HiggsKernel
from subspec.config.quant_checks import check_higgs
from subspec.errors import ConfigError
from subspec.quant.codebook_linear import CODEBOOK_KERNELS, HiggsFormat, ReferenceCodebook, make_codebook_linear
from subspec.quant.hadamard import rotate, rotate_by
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.weight_format import check_finite, plain_linear


def choose_kernel(asked: HiggsKernel, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that computes Linears here; ``auto`` is the first that can.

    Raises:
        ConfigError: the kernel that was asked for cannot run here.
    """
    unavailable = HiggsFormat().unavailable
    if asked is HiggsKernel.auto:
        if dtype is not torch.bfloat16:
            return ReferenceCodebook.kind  # the others compute in bfloat16
        return next(name for name in CODEBOOK_KERNELS if unavailable(name, device) is None)
    problem = unavailable(asked.value, device)
    if problem is None and asked is not HiggsKernel.reference and dtype is not torch.bfloat16:
        problem = f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if problem is not None:
        raise ConfigError(f"quant.kernel={asked.value} cannot run here: {problem}; set quant.kernel=auto")
    return asked.value


class HiggsModule(nn.Module):
    """Stands in for an ``nn.Linear``: a look-up kernel, and the exact layer's bias, shared with it."""

    def __init__(self, linear: LevelLinear, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.linear, self.out_features, self.bias = linear, out_features, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``."""
        partial = self.linear(x.reshape(-1, x.shape[-1]))
        y = partial.sum(0)[:, : self.out_features].to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, x.shape[:-1])


class HiggsQuantizer:
    """Quantizes whole Linears with :class:`~subspec.quant.codebook_linear.HiggsFormat`.

    Args:
        kernel, hadamard: kernel of the quantized Linears, and what rotates their inputs.
        unpack: keep the dequantized values, rotated back, as a plain Linear: the same logits up to rounding, without
            a rotation and a look-up in every forward pass, where memory allows.
    """

    name = "higgs"

    def __init__(
        self,
        *,
        bits: int = 4,
        vector_dim: int = 2,
        group_size: int = 256,
        hadamard_size: int = 512,
        kernel: HiggsKernel = HiggsKernel.auto,
        hadamard: Hadamard = Hadamard.auto,
        compute_dtype: torch.dtype,
        device: torch.device,
        unpack: bool,
    ) -> None:
        check_higgs(bits, vector_dim, group_size, hadamard_size)
        self.format = HiggsFormat(bits, vector_dim, group_size, hadamard_size)
        self.compute_dtype, self.device, self.unpack = compute_dtype, device, unpack
        if unpack and (kernel is not HiggsKernel.auto or hadamard is not Hadamard.auto):
            key = "kernel" if kernel is not HiggsKernel.auto else "hadamard"
            raise ConfigError(
                f"quant.{key} computes nothing when the substitute is unpacked: set draft.unpack=never, or leave "
                f"quant.{key} at auto"
            )
        self.kernel = "" if unpack else choose_kernel(kernel, device, compute_dtype)
        self.rotate = rotate if unpack else rotate_by(hadamard.value, device)

    @property
    def backend(self) -> str:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return f"unpacked {dtype} Linears" if self.unpack else f"higgs {self.kernel} {dtype}"

    def stored_bytes(self, linear: nn.Linear, name: str = "") -> int:
        return self.format.device_bytes(linear.out_features, linear.in_features)

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        check_finite(linear.weight, name)
        weight = self.format.quantize(linear.weight.detach().to(self.device))
        if not self.unpack:
            look_up = make_codebook_linear(weight, Variant(self.kernel), rotate=self.rotate)
            return HiggsModule(look_up, linear.out_features, linear.bias)
        return plain_linear(weight.dequantize().to(self.compute_dtype), linear.bias)
