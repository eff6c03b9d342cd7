"""Soft cross-entropy over a large vocabulary: gradients are computed with the logits, which are not kept."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 4096
"""Rows whose logits exist at a time (4096 x 49152 in float32 are 0.8 GB)."""


class Cross(NamedTuple):
    """Result of :func:`soft_cross_entropy`.

    Attributes:
        loss: weighted mean, a scalar; alone differentiable.
        entropy: cross-entropy of every row [passes, rows].
        right: whether the argmax is the teacher's, bool [passes, rows].
        overlap: share of samples that speculative sampling accepts [passes, rows].
    """

    loss: Tensor
    entropy: Tensor
    right: Tensor
    overlap: Tensor


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        weights: Tensor,
        shift: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        passes, rows, _ = hidden.shape
        head, teacher_head = weight.to(dtype), teacher_weight.to(dtype)
        added = 0.0 if shift is None else shift.to(dtype)
        entropy, overlap = (torch.empty(passes, rows, device=hidden.device) for _ in range(2))
        right = torch.empty(passes, rows, dtype=torch.bool, device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        shares = weights / weights.sum()
        for start in range(0, rows, CHUNK):
            part = slice(start, start + CHUNK)
            logits = teacher[part].to(dtype) @ teacher_head.T + added
            wanted = torch.softmax(logits, dim=-1, dtype=torch.float32)
            best = wanted.argmax(dim=-1)
            for index in range(passes):
                states = hidden[index, part].to(dtype)
                logp = torch.log_softmax(states @ head.T + added, dim=-1, dtype=torch.float32)
                entropy[index, part] = -torch.linalg.vecdot(wanted, logp)
                right[index, part] = logp.argmax(dim=-1) == best
                slope = logp.exp_().sub_(wanted)
                overlap[index, part] = 1 - slope.abs().sum(-1) / 2
                slope = slope.mul_(shares[index, part, None]).to(dtype)
                grad_hidden[index, part] = slope @ head
                if grad_weight is not None:
                    grad_weight += slope.T @ states
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        ctx.types = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(entropy, right, overlap)
        return (entropy * shares).sum(), entropy, right, overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [(slope * grads[0]).to(kind) for slope, kind in zip(ctx.saved_tensors, ctx.types, strict=False)]
        return scaled[0], scaled[1] if len(scaled) > 1 else None, None, None, None, None, None


def soft_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    shift: Tensor | None = None,
) -> Cross:
    """Cross-entropy of a student's next-token distribution against a teacher's, at temperature 1.

    Args:
        hidden: [passes, rows, h], several students' last states for the same rows.
        weight: [vocabulary, h], their LM head; may require a gradient.
        teacher, teacher_weight: [rows, H] and [vocabulary, H]; no gradient.
        dtype: of the matrix products; sums are float32.
        weights: of the loss, [passes, rows]; None: all equal.
        shift: added to the logits of both, [vocabulary] (:class:`SampledVocabulary`).
    """
    if weights is None:
        weights = torch.ones(hidden.shape[:2], device=hidden.device)
    return Cross(*_SoftCrossEntropy.apply(hidden, weight, teacher, teacher_weight, weights, shift, dtype))


@dataclass
class SampledVocabulary:
    """The frequent ids, and every step others by chance, so that a loss costs less than the whole vocabulary.

    The logits of the others are raised by the logarithm of how many each stands for: sums of exponentials stay right
    on average.

    Attributes:
        frequent, others: int64, together all ids.
        sampled: of the others per step.
    """

    frequent: Tensor
    others: Tensor
    sampled: int

    @classmethod
    def of(cls, counts: Tensor, frequent: int, sampled: int) -> "SampledVocabulary":
        """By the occurrences ``counts`` int64 [vocabulary] of the ids; with few ids all of them are frequent."""
        order = counts.argsort(descending=True, stable=True)
        if len(order) <= frequent + sampled:
            frequent = len(order)
        return cls(order[:frequent].sort().values, order[frequent:], sampled)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Ids of one step int64 [n], and the ``shift`` of their logits [n]."""
        if not len(self.others):
            return self.frequent, None
        device = self.others.device
        # With repetition: a permutation of all ids costs more than the few repeated ones.
        index = torch.randint(len(self.others), (self.sampled,), generator=generator, device=device)
        shift = torch.zeros(len(self.frequent) + self.sampled, device=device)
        shift[len(self.frequent) :] = math.log(len(self.others) / self.sampled)
        return torch.cat([self.frequent, self.others[index]]), shift
