"""``draft.proposer``: a draft for the draft (cascade), which lets one pass of the substitute grow several levels.

A pass of the substitute costs nearly the same for 30 rows as for one, since it reads its weights once. So a cheap
draft, the proposer, guesses which nodes the next levels of the tree will hold, and one pass scores these beside the
frontier. Nodes of the tree and their scores are the substitute's alone: a level grows without a pass if the nodes it
grows from have been scored, and a wrong guess costs a row. The tree is therefore the substitute's own, whatever the
proposer guesses.

Beside the proposer, an index of n-grams guesses: of the text so far, and of the substitute's likeliest tokens in this
text's trees, accepted or not. It costs nothing, and knows names, numbers and what follows where branches meet again.

Every level reads the new nodes' tokens back to the host, which decides whether another pass is needed.
"""

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from subspec.decoding.draft import Draft, LevelDraft, Perturb
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.padded_levels import PaddedLevels

LEAST = -7.0
"""Log-probability of a guess, given its parent, below which it is not worth a row."""

CONTEXT, INDEXED, INDEX_SHARE = 4, 16, 0.3
"""Of the index: most tokens of a context, most tokens guessed behind it, and their share among the guesses."""

DOUBT = 2
"""Factor of the temperature at which guesses beside the likeliest tree are ranked: the proposer may be wrong."""

SHARE = 0.25
"""Share of the rows left that the next level of guesses takes: a level counts only if those above it were right."""

SPARE = 4
"""Passes whose guesses may all be wrong, in rows of the cache; later ones guess less."""


SCORED, GUESSED = 0, 1
"""Kinds of rows that are kept of a node."""


class GuessPolicy(Beam):
    """Sizes of a cascade, for a proposer: the largest tree of everything that the substitute may run.

    Args:
        policy: of the trees that are verified.
        proposed: most guesses of a pass.
    """

    whole_levels = False

    def __init__(self, policy: TreePolicy, proposed: int) -> None:
        super().__init__(policy.max_depth, max(policy.width, proposed))
        self.draft_rows = policy.draft_rows + SPARE * proposed
        self.capacity = self.pass_nodes = self.draft_rows + 1  # an accepted node may never have run


class CascadeDraft(Draft):
    """A substitute that scores a proposer's guesses beside the frontier.

    No child of a node may score higher than the node, as in every policy here: a node that was not scored is not
    needed if even its likeliest possible child would not be chosen.

    Args:
        levels: the substitute; runs any nodes of a tree in one pass, and may overwrite the logits of the one before.
        proposer: built for the sizes of :class:`GuessPolicy`.
        policy: of the trees that will be drafted.
        proposed: most guesses of a pass.
    """

    shares_cache = True

    def __init__(
        self,
        levels: LevelDraft | PaddedLevels,
        proposer: Draft,
        policy: TreePolicy,
        proposed: int,
        device: torch.device,
    ) -> None:
        super().__init__(levels.temperature)
        self.levels, self.proposer, self.wants = levels, proposer, proposer.wants
        self.proposed, self._policy = proposed, policy
        sizes = GuessPolicy(policy, proposed)
        rows = levels.draft_rows if isinstance(levels, PaddedLevels) else sizes.draft_rows
        self.extra_rows = rows - policy.draft_rows
        # The nodes that the substitute runs. Their numbers stay while the tree grows, and name them in both drafts.
        self._known = Tree(sizes.capacity, device)
        self._index = NgramIndex(CONTEXT)
        self._rows: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._lineage: list[tuple[int, int]] = []  # parent and depth of every known node
        self._ends: list[tuple[int, ...]] = []  # the last tokens of their paths
        self._children: dict[tuple[int, int], int] = {}  # by parent and token
        self._number: dict[int, int] = {}  # of the drafted tree's nodes that were in a frontier
        self._scored: set[int] = set()  # nodes whose logits the substitute has computed
        self._guessed: set[int] = set()  # nodes whose log-probabilities the proposer has
        self._due = self._policy.draft_rows  # rows that the policy may still ask for
        self._passes = 0

    def begin(self, cache: KVCache) -> None:
        self._clear()
        self._cache = cache
        self._index.clear()
        self.levels.begin(cache)
        self.proposer.begin(cache)

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        self._index.add(tokens.tolist())
        self.proposer.observe(tokens, hidden)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        nodes = self._locate(tree, frontier)
        if any(node not in self._scored for node in nodes):
            self._run(tree, frontier, nodes, None)
        return self._kept(nodes)

    def _kept(self, nodes: list[int]) -> Tensor:
        """[n, vocabulary]: the substitute's logits where it has scored a node, else the proposer's."""
        kinds = [SCORED if node in self._scored else GUESSED for node in nodes]
        places = [kind * self._known.capacity + node for kind, node in zip(kinds, nodes, strict=True)]
        return self._rows.flatten(0, 1).index_select(0, torch.tensor(places, device=self._rows.device))

    def _keep(self, kind: int, nodes: list[int], rows: Tensor) -> None:
        if self._rows is None:
            shape = (2, self._known.capacity, rows.shape[1])
            self._rows = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        numbers = torch.tensor(nodes, device=rows.device)
        self._rows[kind].index_copy_(0, numbers, rows.to(self._rows.dtype))

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        nodes, before = self._locate(tree, frontier), (tree.size, tree.levels, tree.level_size)
        unscored = {number for number, node in zip(frontier.tolist(), nodes, strict=True) if node not in self._scored}
        if unscored:
            if len(unscored) < len(nodes):
                grown = self._grow(tree, frontier, nodes, policy, perturb)
                if unscored.isdisjoint(tree.parents[before[0] : tree.size].tolist()):
                    return grown
                tree.size, tree.levels, tree.level_size = before
            self._run(tree, frontier, nodes, perturb)
        return self._grow(tree, frontier, nodes, policy, perturb)

    def _grow(
        self, tree: Tree, frontier: Tensor, nodes: list[int], policy: TreePolicy, perturb: Perturb | None
    ) -> Tensor:
        """Grow a level; nodes that were not scored have one child of probability 1."""
        scored = [row for row, node in enumerate(nodes) if node in self._scored]
        logits = self._kept([nodes[row] for row in scored])
        if perturb is not None:
            logits = perturb(logits)
        if len(scored) < len(nodes):
            known, logits = logits, logits.new_full((len(nodes), logits.shape[1]), -torch.inf)
            logits[:, 0] = 0
            logits[torch.tensor(scored, device=known.device)] = known
        return policy.grow(tree, frontier, logits, self.temperature)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        if not self._lineage:
            self._plant(tree)
        nodes, tokens = [0], tree.tokens.index_select(0, path).tolist()
        for token in tokens[1:]:
            nodes += self._nodes([(nodes[-1], token)])
        self._index.add(tokens)
        self.proposer.commit(self._known, torch.tensor(nodes, device=path.device), hidden)
        self.levels.commit(tree, path, None)
        self._clear()

    def passes(self, tree: Tree) -> int:
        return self._passes

    def facts(self) -> dict[str, Any]:
        return {**self.proposer.facts(), **self.levels.facts()}

    def _plant(self, tree: Tree) -> None:
        self._known.plant(tree.tokens[:1])
        self._known.level_size = 0  # it has no levels: nodes of any depth follow each other
        self._lineage, self._number = [(0, 0)], {0: 0}
        self._ends = [(*self._index.tail, int(tree.tokens[0]))]

    def _locate(self, tree: Tree, frontier: Tensor) -> list[int]:
        """The known nodes that ``frontier`` stands for; new ones are added."""
        if not self._lineage:
            self._plant(tree)
        if tree.levels:
            pairs = torch.stack([tree.parents.index_select(0, frontier), tree.tokens.index_select(0, frontier)])
            nodes = self._nodes([(self._number[parent], token) for parent, token in pairs.t().tolist()])
            self._number.update(zip(frontier.tolist(), nodes, strict=True))
        else:
            nodes = [0]
        self._due -= len(nodes)
        return nodes

    def _nodes(self, children: list[tuple[int, int]]) -> list[int]:
        """Known nodes by parent and token; new ones are added."""
        known, device = self._known, self._known.tokens.device
        new = [child for child in dict.fromkeys(children) if child not in self._children]
        if new:
            parents, tokens = torch.tensor(new, device=device).unbind(1)
            deepest = known.levels
            for number, child in enumerate(new, known.size):
                self._children[child] = number
                depth = self._lineage[child[0]][1] + 1
                self._lineage.append((child[0], depth))
                self._ends.append((*self._ends[child[0]][-CONTEXT:], child[1]))
                deepest = max(deepest, depth)
            known.append(tokens, parents, torch.zeros(len(new), device=device))
            known.levels, known.level_size = deepest, 0
        return [self._children[child] for child in children]

    def _run(self, tree: Tree, frontier: Tensor, nodes: list[int], perturb: Perturb | None) -> None:
        """Score the frontier and the guesses behind it in one pass."""
        batch = [node for node in nodes if node not in self._scored]
        batch += self._guess(tree.levels, nodes, tree.scores.index_select(0, frontier), perturb)
        logits = self.levels.expand(self._known, torch.tensor(batch, device=frontier.device))
        self._keep(SCORED, batch, logits)
        self._scored.update(batch)
        for node, token in zip(batch, logits.argmax(dim=-1).tolist(), strict=True):
            self._index.count(self._ends[node], token)
        self._passes += 1

    def _guess(self, level: int, nodes: list[int], scores: Tensor, perturb: Perturb | None) -> list[int]:
        """Nodes that the levels below ``nodes`` will grow from, if the proposer is right: a beam of its guesses.

        Args:
            level: of ``nodes``.
            scores: of ``nodes`` in the tree.
        """
        room = min(self.proposed, self._known.capacity - 1 - self._known.size - self._due)
        # Nodes of the deepest level are never run, and positions end with the cache.
        deepest = min(self._policy.max_depth, self._cache.max_length - self._cache.length) - 1
        guesses: list[int] = []
        exact = wide = scores
        for ahead in range(deepest - level):
            left = room - len(guesses)
            width = min(left, max(self._policy.width, int(left * SHARE)))
            if width <= 0:
                break
            known, best, tokens, likely = self._likeliest(nodes, ahead, perturb, width)
            # First the nodes that the tree would have if the proposer were right, of those before; then others.
            sharp = exact[:, None] + (best[: len(exact)] / self.temperature).log_softmax(dim=-1)
            exact, first = sharp.flatten().topk(min(self._policy.width, width, sharp.numel()))
            flat = self.temperature * torch.where(known, 1, DOUBT)[:, None]
            joint = (wide[:, None] + (best / flat).log_softmax(dim=-1)).flatten()
            own = joint[first]
            joint[first] = -torch.inf
            rest, others = joint.topk(min(width, joint.numel()) - len(first))
            chosen, wide = torch.cat([first, others]), torch.cat([own, rest])
            kept = likely.flatten()[chosen] & (wide > -torch.inf)
            exact, wide, chosen = exact[kept[: len(exact)]], wide[kept], chosen[kept]
            rows = torch.stack([chosen // best.shape[1], tokens.flatten()[chosen]]).t().tolist()
            if not rows:
                break
            nodes = self._nodes([(nodes[row], token) for row, token in rows])
            guesses += [node for node in nodes if node not in self._scored]
        return guesses

    def _likeliest(
        self, nodes: list[int], ahead: int, perturb: Perturb | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The likeliest tokens after ``nodes``, by the substitute where it has scored them, else by the proposer.

        Returns:
            Which nodes are scored, bool [n], and [n, ``count``]: logits, tokens, and whether a token is worth a row.
        """
        self._ask([node for node in nodes if node not in self._scored])
        plain = self._kept(nodes).float()
        logits = plain if perturb is None else perturb(plain, ahead)
        best, tokens = logits.topk(min(count, logits.shape[1]), dim=-1)
        known = torch.tensor([node in self._scored for node in nodes], device=plain.device)
        return known, best, tokens, known[:, None] | (plain.gather(1, tokens) >= LEAST)

    def _ask(self, nodes: list[int]) -> None:
        """Let the proposer run ``nodes`` and those above them that it has not run, level by level."""
        missing = set()
        for node in nodes:
            while node not in self._guessed and node not in missing:
                missing.add(node)
                node = self._lineage[node][0]

        def depth(node: int) -> int:
            return self._lineage[node][1]

        for _, level in groupby(sorted(missing, key=depth), key=depth):
            group = list(level)
            logits = self.proposer.expand(self._known, torch.tensor(group, device=self._known.tokens.device))
            rows = logits.float().log_softmax(dim=-1)
            mixed = [
                self._mixed(row, self._index.candidates(self._ends[node], INDEXED))
                for node, row in zip(group, rows, strict=True)
            ]
            self._keep(GUESSED, group, torch.stack(mixed))
            self._guessed.update(group)

    def _mixed(self, log_probs: Tensor, candidates: dict[int, float]) -> Tensor:
        """A proposer's log-probabilities [vocabulary], mixed with the index's probabilities."""
        if not candidates:
            return log_probs
        mixed = log_probs + math.log(1 - INDEX_SHARE)
        tokens = torch.tensor(list(candidates), device=mixed.device)
        probabilities = torch.tensor(list(candidates.values()), device=mixed.device)
        mixed[tokens] = mixed[tokens].logaddexp(probabilities.log() + math.log(INDEX_SHARE))
        return mixed
