"""Soft cross-entropy over a large vocabulary: gradients are computed with the logits, which are not kept."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 4096
"""Rows whose logits exist at a time (4096 x 49152 in float32 are 0.8 GB)."""


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        passes, rows, _ = hidden.shape
        head, teacher_head = weight.to(dtype), teacher_weight.to(dtype)
        losses = torch.zeros(passes, device=hidden.device)
        right = torch.zeros(passes, device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, rows, CHUNK):
            part = slice(start, start + CHUNK)
            wanted = torch.softmax(teacher[part].to(dtype) @ teacher_head.T, dim=-1, dtype=torch.float32)
            best = wanted.argmax(dim=-1)
            for index in range(passes):
                states = hidden[index, part].to(dtype)
                logp = torch.log_softmax(states @ head.T, dim=-1, dtype=torch.float32)
                losses[index] -= torch.linalg.vecdot(wanted, logp).sum()
                right[index] += (logp.argmax(dim=-1) == best).sum()
                slope = logp.exp_().sub_(wanted).to(dtype)
                grad_hidden[index, part] = slope @ head
                if grad_weight is not None:
                    grad_weight += slope.T @ states
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        ctx.types = hidden.dtype, weight.dtype
        right /= rows
        ctx.mark_non_differentiable(right)
        return losses / rows, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *rest = ctx.saved_tensors
        scale = grads[0] / grad_hidden.shape[1]
        hidden = (grad_hidden * scale[:, None, None]).to(ctx.types[0])
        # The LM head has a gradient with a single pass only, so there is one scale.
        weight = (rest[0] * scale[0]).to(ctx.types[1]) if rest else None
        return hidden, weight, None, None, None


def soft_cross_entropy(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a student's next-token distribution against a teacher's, at temperature 1.

    Args:
        hidden: [passes, rows, h], several students' last states for the same rows.
        weight: [vocabulary, h], their LM head; may require a gradient if there is one pass.
        teacher, teacher_weight: [rows, H] and [vocabulary, H]; no gradient.
        dtype: of the matrix products; sums are float32.

    Returns:
        Mean over rows [passes], differentiable, and the share of rows with the same argmax [passes].
    """
    if weight.requires_grad and hidden.shape[0] != 1:
        raise ValueError("an LM head is trained with one pass at a time")
    return _SoftCrossEntropy.apply(hidden, weight, teacher, teacher_weight, dtype)
