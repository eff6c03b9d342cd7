"""The choice of a run's arithmetic: batch-invariant or not, and its tile shapes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from subspec.decoding.bitwise import BitwiseArithmetic, altered, uncovered
from subspec.decoding.pass_shapes import PassShapes
from subspec.decoding.target_model import TargetModel
from subspec.errors import ConfigError, SubspecError
from subspec.kernels.choose_tiling import choose_tilings
from subspec.kernels.invariant_linear import Tiling
from subspec.utils.console import Note

AUTO = "auto"
"""Batch-invariant if it is supported."""


@dataclass(frozen=True)
class Bitwise:
    """The choice of one run.

    Attributes:
        reason: why the target's passes are not batch-invariant; empty when they are.
        tilings: tile shape of each matrix, by role.
    """

    reason: str = ""
    tilings: dict[str, Tiling] = field(default_factory=dict)

    def apply(self, target: TargetModel) -> None:
        """Let ``target`` compute in the chosen arithmetic."""
        if not self.reason:
            target.bitwise = BitwiseArithmetic(target.model, self.tilings, sliced=target.sliced)

    def facts(self) -> dict[str, Any]:
        """For records."""
        kernels = {role: str(tiling) for role, tiling in self.tilings.items()}
        return {"on": not self.reason, "reason": self.reason, "kernels": kernels}


def why_not(
    asked: bool | str,
    model: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    accelerate: bool = False,
    loaded: PreTrainedModel | None = None,
) -> str:
    """Why the target's passes are not batch-invariant; empty when they are.

    Args:
        asked: :data:`AUTO`, or True, or False.
        model: the target's transformers configuration.
        accelerate: whether accelerate offloads the target.
        loaded: a whole target, whose modules may differ from its configuration.

    Raises:
        ConfigError: ``asked`` is True and is not supported.
    """
    reason = uncovered(model, dtype, device) or (altered(loaded) if loaded is not None else None) or ""
    if accelerate:
        reason = "offload=accelerate computes with transformers' own modules"
    if asked is True and reason:
        raise ConfigError(f"decoding.bitwise=true: {reason}; set decoding.bitwise={AUTO}, which records it")
    return "decoding.bitwise=false" if asked is False else reason


def choose_bitwise(
    asked: bool | str,
    model: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    note: Note,
    *,
    accelerate: bool = False,
    loaded: PreTrainedModel | None = None,
) -> Bitwise:
    """As :func:`why_not`, with the tile shapes, which are measured unless an earlier run on this GPU did."""
    reason = why_not(asked, model, dtype, device, accelerate=accelerate, loaded=loaded)
    if not reason:
        matrices = PassShapes.of(model, dtype.itemsize).matrices(model.vocab_size)
        try:
            return Bitwise(tilings=choose_tilings(matrices, dtype, device, note=note))
        except SubspecError as error:
            if asked is True:
                raise
            reason = str(error)
    if device.type == "cuda" and asked is not False:
        note(f"passes of the target are not batch-invariant: {reason}")
    return Bitwise(reason)
