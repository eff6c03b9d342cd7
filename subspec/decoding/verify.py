"""Verification: the drafted tokens that the target accepts, computed on the device.

The target's pass over the tree yields, for every node, the token the target emits after it (argmax, or one
sample). A node is accepted when it is the token its parent asks for and its parent is accepted too. Following
the target's own tokens through the tree emits exactly the tokens of plain decoding; the tree only decides how many of
them one pass yields (Miao et al., SpecInfer, arXiv 2305.09781, section 4.3, for the
greedy rule; drawing the target's sample first and matching it keeps sampling exact as well).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from subspec.decoding.tree import Tree
from subspec.errors import SubspecError

NOT_FINITE = (
    "the target's logits are not finite (NaN or infinity), so no token can be chosen: the checkpoint's weights are "
    "damaged (check the files), or its arithmetic overflows in 16 bits (set target.dtype=float32)"
)


class NotFiniteError(SubspecError):
    """The target's logits hold NaN or infinity."""


@dataclass(frozen=True)
class Acceptance:
    """Result of a verification, on the device.

    Attributes:
        packed: int64 [3 + 2 * path_room]: number of accepted nodes with the root, then their node numbers
            in order, then the token the target emits after each (entries past the number are meaningless), whether
            one of those tokens was chosen by logits that are not finite, and the depth of the deepest verified node.
        path_room: levels + 1, or the number of nodes if that is less.
        bonus: int64 [1], the target's token after the deepest accepted node: the next root.
    """

    packed: Tensor
    path_room: int
    bonus: Tensor

    def read(self) -> tuple[list[int], list[int], int]:
        """(accepted node numbers with the root, emitted tokens, depth of the deepest verified node).

        One device-to-host copy. The depth is less than the drafted levels if a policy pruned the deepest ones.

        Raises:
            NotFiniteError: a token was chosen by logits that are not finite.
        """
        return self._unpack(self.packed.tolist())

    def _unpack(self, values: list[int]) -> tuple[list[int], list[int], int]:
        if values[-2]:
            raise NotFiniteError(NOT_FINITE)
        count = values[0]
        return (values[1 : 1 + count], values[1 + self.path_room : 1 + self.path_room + count], values[-1])

    def path(self, count: int) -> Tensor:
        """Accepted node numbers with the root, int64 [count], still on the device."""
        return self.packed[1 : 1 + count]


Reading = tuple[list[int], list[int], int] | NotFiniteError
"""The result of :meth:`Acceptance.read`, or its error."""


def read_all(acceptances: Sequence[Acceptance]) -> list[Reading]:
    """:meth:`Acceptance.read` of several texts with one copy; an error stands in place of its text's result."""
    packed = [acceptance.packed for acceptance in acceptances]
    values = iter((packed[0] if len(packed) == 1 else torch.cat(packed)).tolist())
    results: list[Reading] = []
    for acceptance in acceptances:
        try:
            results.append(acceptance._unpack(list(islice(values, len(acceptance.packed)))))
        except NotFiniteError as error:
            results.append(error)
    return results


def verify(tree: Tree, chosen: Tensor, levels: int | None = None, finite: Tensor | None = None) -> Acceptance:
    """Walk the target's choices through the tree.

    Args:
        tree: the drafted tree; siblings carry distinct tokens.
        chosen: int64 [nodes], the token the target emits after each of the first nodes.
        levels: levels that those nodes make up; None: the whole tree.
        finite: bool [nodes], see :func:`finite_choice`; None: not checked.
    """
    size = chosen.numel()
    levels = tree.levels if levels is None else levels
    asked = chosen.index_select(0, tree.parents[:size])
    match = tree.tokens[:size] == asked
    match[:1] = True
    ancestors = tree.ancestors[:size, :size]
    accepted = ~(ancestors & ~match).any(dim=1)
    depths = tree.depths[:size]
    deepest = torch.where(accepted, depths, -1).argmax().view(1)

    # Node numbers grow along a path, so sorting them with non-members pushed to the end yields the path.
    numbers = torch.arange(size, device=chosen.device)
    on_path = ancestors.index_select(0, deepest)[0]
    room = min(levels + 1, size)
    path = torch.where(on_path, numbers, size).sort().values[:room].clamp_(max=size - 1)
    emitted = chosen.index_select(0, path)
    count = depths.index_select(0, deepest) + 1
    bonus = chosen.index_select(0, deepest)
    deepest_drafted = depths.max().view(1)
    wrong = torch.zeros_like(count) if finite is None else (on_path & ~finite).any().view(1).to(count.dtype)
    return Acceptance(torch.cat([count, path, emitted, wrong, deepest_drafted]), room, bonus)


def finite_choice(logits: Tensor, chosen: Tensor) -> Tensor:
    """Whether each row holds neither NaN nor +infinity, and chose a logit that is finite: bool [n].

    A row's largest logit is NaN where any is, though a filter may keep that one from being chosen. A row may hold
    -infinity, but not choose it.

    Args:
        logits: [n, vocabulary].
        chosen: int64 [n].
    """
    return logits.amax(dim=1).isfinite() & logits.gather(1, chosen[:, None])[:, 0].isfinite()
