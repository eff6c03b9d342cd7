"""EAGLE-2's tree (Li et al., arXiv 2406.16858, section 4): expand widely, then keep the best nodes overall.

Expansion: every node of the frontier gets its ``width`` best children, all of which become nodes; the best ``width``
of these by cumulative log-probability are the next frontier. Re-ranking: when the tree is drafted, the best
``total_tokens`` nodes of the whole tree, root included, are verified. Shallow nodes that the frontier passed over
compete with deep ones this way. (The paper's confidence of a node is its cumulative probability, the same order.)
"""

import torch
from torch import Tensor

from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy


def drafted_nodes(depth: int, width: int) -> int:
    """Nodes of a fully expanded tree, root included: width below the root, width * width on every further level."""
    return 1 + width + (depth - 1) * width * width


class Eagle2(TreePolicy):
    """Expansion and re-ranking.

    Args:
        depth: levels below the root.
        width: children per node, and nodes per frontier (the paper's top-k).
        total_tokens: most nodes that are verified, root included.
    """

    whole_levels = False

    def __init__(self, depth: int, width: int, total_tokens: int) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree.depth and tree.width must be at least 1, not {depth} and {width}")
        if total_tokens < 2:
            raise ValueError(f"tree.total_tokens must be at least 2 (the root and a node), not {total_tokens}")
        self.max_depth = depth
        self.width = width
        self.total_tokens = total_tokens
        self.capacity = drafted_nodes(depth, width)
        self.pass_nodes = min(total_tokens, self.capacity)
        self.draft_rows = 1 + (depth - 1) * width

    def select(self, tree: Tree, frontier: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        # Rounding must not make a child likelier than its parent. NaN would rank before its own parent, and the
        # re-ranked nodes would not form a tree.
        own = log_probs[:, : self.width].clamp(max=0).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)
        scores = (tree.scores.index_select(0, frontier)[:, None] + own).flatten()
        nodes = tree.append(tokens[:, : self.width].flatten(), frontier.repeat_interleave(self.width), scores)
        return nodes.index_select(0, scores.topk(self.width).indices)

    def finish(self, tree: Tree) -> None:
        """Keep the best ``total_tokens`` - 1 nodes and the root.

        No node scores higher than its parent, and equal scores are ordered by number, so a kept node's parent is kept.
        """
        if tree.size <= self.total_tokens:
            return
        ranked = tree.scores[1 : tree.size].sort(descending=True, stable=True).indices
        best = ranked[: self.total_tokens - 1].sort().values + 1
        tree.keep(torch.cat([tree._slots[:1], best]))
