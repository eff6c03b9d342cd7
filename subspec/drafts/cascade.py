"""``draft.proposer``: a draft for the draft (cascade), which lets one pass of the substitute grow several levels.

A pass of the substitute reads its weights once: 16 rows take 1.27 times as long as eight on an H200. So a cheap
draft, the proposer, guesses which nodes the next levels of the tree will hold, and one pass scores these beside the
frontier. Nodes of the tree and their scores are the substitute's alone: a level grows without a pass if the nodes it
grows from have been scored, and a wrong guess costs a row. The tree is therefore the substitute's own, whatever the
proposer guesses.

Beside the proposer, an index of n-grams guesses: of the text so far, and of the substitute's likeliest tokens in this
text's trees, accepted or not. It costs nothing, and knows names, numbers and what follows where branches meet again.
It is all that guesses with ``draft.proposer=prompt_lookup``.

The tree grows on the host: a pass returns the likeliest tokens after every node (:class:`Said`), the policy selects
nodes there, and the tree is copied to the device when it has grown. Small operations on the device took longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from subspec.decoding.draft import Draft, Perturb
from subspec.decoding.hidden import NO_HIDDEN
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy, likeliest
from subspec.drafts.known_nodes import KnownNodes
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.padded_levels import KnownLevels
from subspec.utils.rounding import round_up
from subspec.utils.upload import upload

CPU = torch.device("cpu")

LEAST = -7.0
"""Log-probability of a guess, given its parent, below which it is not worth a row."""

CONTEXT, INDEXED, INDEX_SHARE = 4, 16, 0.3
"""Of the index: most tokens of a context, most tokens guessed behind it, and their share among the guesses."""

UNKNOWN = 1e-6
"""Probability of all tokens together that never followed, where the index alone guesses."""

DOUBT = 2
"""Factor of the temperature at which guesses beside the likeliest tree are ranked: the proposer may be wrong."""

SHARE = 0.25
"""Share of the rows left that the next level of guesses takes: a level counts only if those above it were right."""

SPARE = 12
"""Passes whose guesses may all be wrong, in rows of the cache; later ones guess less."""


class GuessPolicy(Beam):
    """Sizes of a cascade, for a proposer: the largest tree of everything that the substitute may run.

    Args:
        policy: of the trees that are verified.
        proposed: most guesses of a pass.
    """

    whole_levels = False

    def __init__(self, policy: TreePolicy, proposed: int) -> None:
        super().__init__(policy.max_depth, policy.width + proposed)
        self.draft_rows = policy.draft_rows + SPARE * round_up(proposed, 8)  # captured passes guess in whole eights
        self.capacity = self.pass_nodes = self.draft_rows + 1  # an accepted node may never have run


@dataclass(frozen=True)
class Said:
    """The likeliest tokens after a node by the substitute or the proposer, best first.

    Attributes:
        sharp: their log-probabilities at the tree's temperature.
        wide: the proposer's at :data:`DOUBT` times that temperature; the substitute's as ``sharp``.
        worth: whether a token's log-probability is at least :data:`LEAST`; always for the substitute's.
    """

    tokens: list[int]
    sharp: list[float]
    wide: list[float]
    worth: list[bool]


class CascadeDraft(Draft):
    """A substitute that scores a proposer's guesses beside the frontier.

    No child of a node may score higher than the node, as in every policy here: a node that was not scored is not
    needed if even its likeliest possible child would not be chosen.

    Args:
        levels: the substitute. temperature: of its distribution.
        proposer: built for the sizes of :class:`GuessPolicy`; None: the index alone guesses.
        policy: of the trees that will be drafted.
        proposed: most guesses of a pass; captured passes have as many more as the frontier leaves rows.
        vocab_size: of both drafts.
    """

    shares_cache = True

    def __init__(
        self,
        levels: KnownLevels,
        temperature: float,
        proposer: Draft | None,
        policy: TreePolicy,
        proposed: int,
        vocab_size: int,
    ) -> None:
        super().__init__(temperature)
        self.levels, self.proposer, self.device = levels, proposer, levels.device
        self.wants = NO_HIDDEN if proposer is None else proposer.wants
        self.proposed, self.vocab_size, self._policy = proposed, vocab_size, policy
        self.extra_rows = levels.draft_rows - policy.draft_rows
        sizes = GuessPolicy(policy, proposed)
        self._most = min(max(policy.width, int(SHARE * proposed)), vocab_size)  # tokens that are kept of a node
        self._known = KnownNodes(sizes.capacity, CONTEXT, self.device)
        self._index = NgramIndex(CONTEXT)
        self._tree = Tree(policy.capacity, CPU)  # the drafted tree, on the host
        self._clear()

    def _clear(self) -> None:
        self._number: dict[int, int] = {0: 0}  # known nodes by those of the drafted tree that were in a frontier
        self._scored: dict[int, Said] = {}  # by node, what the substitute has said
        self._guessed: dict[int, Said] = {}  # what the proposer has
        self._due = self._policy.draft_rows  # rows that the policy may still ask for
        self._passes = 0

    def begin(self, cache: KVCache) -> None:
        self._clear()
        self._cache = cache
        self._index.clear()
        self.levels.begin(cache)
        if self.proposer is not None:
            self.proposer.begin(cache)

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        self._index.add(tokens.tolist())
        if self.proposer is not None:
            self.proposer.observe(tokens, hidden)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        raise NotImplementedError("a cascade keeps no logits: it extends trees")

    def plant(self, tree: Tree, root: Tensor) -> Tree:
        root = root.cpu()
        self._tree.plant(root)
        self._known.plant(int(root), self._index.tail)
        return self._tree

    def place(self, tree: Tree) -> None:
        tree.copy_from(self._tree)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        nodes, before = self._locate(frontier), (tree.size, tree.levels, tree.level_size)
        numbers = zip(frontier.tolist(), nodes, strict=True)
        unscored = {number for number, node in numbers if node not in self._scored}
        if len(unscored) < len(nodes):
            grown = self._grow(nodes, frontier, policy)
            if unscored.isdisjoint(tree.parents[before[0] : tree.size].tolist()):
                return grown
            tree.size, tree.levels, tree.level_size = before
        self._run(nodes, frontier, policy, perturb)
        return self._grow(nodes, frontier, policy)

    def _grow(self, nodes: list[int], frontier: Tensor, policy: TreePolicy) -> Tensor:
        """Grow a level; nodes that were not scored have one child of probability 1."""
        bound = Said([0] * self._most, [0.0] + [-math.inf] * (self._most - 1), [], [])
        said = [self._scored.get(node, bound) for node in nodes]
        tokens, sharp = torch.tensor([own.tokens for own in said]), torch.tensor([own.sharp for own in said])
        return policy.select(self._tree, frontier, tokens, sharp)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        tokens = self._tree.tokens[path.cpu()].tolist()
        if self.proposer is not None:
            nodes = [0]
            for token in tokens[1:]:
                nodes += self._known.children([(nodes[-1], token)])
            self.proposer.commit(self._known.on_device(), upload(nodes, self.device), hidden)
        self._index.add(tokens)
        self.levels.commit(tree, path)
        self._clear()

    def passes(self, tree: Tree) -> int:
        return self._passes

    def facts(self) -> dict[str, Any]:
        return {**({} if self.proposer is None else self.proposer.facts()), **self.levels.levels.facts()}

    def _locate(self, frontier: Tensor) -> list[int]:
        """The known nodes that the frontier stands for; new ones are added."""
        tree, numbers = self._tree, frontier.tolist()
        if tree.levels:
            tokens, parents = tree.tokens[frontier].tolist(), tree.parents[frontier].tolist()
            pairs = [(self._number[parent], token) for parent, token in zip(parents, tokens, strict=True)]
            self._number |= zip(numbers, self._known.children(pairs), strict=True)
        self._due -= len(numbers)
        return [self._number[number] for number in numbers]

    def _run(self, nodes: list[int], frontier: Tensor, policy: TreePolicy, perturb: Perturb | None) -> None:
        """Score the frontier and the guesses behind it in one pass."""
        batch = [node for node in nodes if node not in self._scored]
        batch += self._guess(nodes, self._tree.scores[frontier].tolist(), len(batch), perturb)
        temperature = policy.sharpened(self.temperature)
        if perturb is None:
            said = self.levels.likeliest(self._known, batch, temperature, self._most)
        else:
            logits = self.levels.expand(self._known, batch)
            tokens, sharp = likeliest(self._perturbed(batch, logits, perturb), temperature, self._most)
            said = torch.cat([tokens, sharp, logits.argmax(dim=-1, keepdim=True)], dim=1)
        for node, row in zip(batch, said.tolist(), strict=True):
            own, values = [int(token) for token in row[: self._most]], row[self._most : 2 * self._most]
            self._scored[node] = Said(own, values, values, [True] * self._most)
            self._index.count(self._known.ends[node], int(row[-1]) if perturb else own[0])
        self._passes += 1

    def _perturbed(self, nodes: Sequence[int], logits: Tensor, perturb: Perturb) -> Tensor:
        """Logits with the noise of every node's position; nodes of a depth lie behind each other."""
        depths = [self._known.depths[node] for node in nodes]
        counts = [(depth, len(list(same))) for depth, same in groupby(depths)]
        parts = logits.split([count for _, count in counts])
        level = self._tree.levels
        return torch.cat([perturb(part, depth - level) for part, (depth, _) in zip(parts, counts, strict=True)])

    def _guess(self, nodes: list[int], scores: list[float], asked: int, perturb: Perturb | None) -> list[int]:
        """Nodes that the levels below ``nodes`` will grow from, if the proposer is right: a beam of its guesses.

        Args:
            nodes, scores: of the frontier. asked: number of these nodes that the pass runs.
        """
        room = self.levels.rows - asked if self.levels.rows else self.proposed
        room = min(room, self._known.capacity - 1 - len(self._known) - self._due)
        # Nodes of the deepest level are never run, and positions end with the cache.
        deepest = min(self._policy.max_depth, self._cache.max_length - self._cache.length) - 1
        guesses: list[int] = []
        exact = wide = scores
        for _ in range(deepest - self._tree.levels):
            left = room - len(guesses)
            width = min(left, max(self._policy.width, int(left * SHARE)))
            if width <= 0:
                break
            said = self._after(nodes, perturb)
            # First the nodes that the tree would have if the proposer were right, of those before; then others.
            likely = [
                (score + value, row, place)
                for row, (score, own) in enumerate(zip(exact, said, strict=False))
                for place, value in enumerate(own.sharp)
            ]
            first = sorted(likely, reverse=True)[: min(self._policy.width, width)]
            taken = {(row, place) for _, row, place in first}
            doubted = [
                (score + value, row, place)
                for row, (score, own) in enumerate(zip(wide, said, strict=True))
                for place, value in enumerate(own.wide)
                if (row, place) not in taken
            ]
            others = sorted(doubted, reverse=True)[: width - len(first)]
            chosen = [(wide[row] + said[row].wide[place], score, row, place) for score, row, place in first]
            chosen += [(score, None, row, place) for score, row, place in others]
            chosen = [own for own in chosen if own[0] > -math.inf and said[own[2]].worth[own[3]]]
            if not chosen:
                break
            exact, wide = [own[1] for own in chosen if own[1] is not None], [own[0] for own in chosen]
            nodes = self._known.children([(nodes[row], said[row].tokens[place]) for *_, row, place in chosen])
            guesses += [node for node in nodes if node not in self._scored]
        return guesses

    def _after(self, nodes: Sequence[int], perturb: Perturb | None) -> list[Said]:
        """What follows ``nodes``, by the substitute where it has scored them, else by the proposer."""
        missing: set[int] = set()
        for node in nodes:
            if node in self._scored:
                continue
            while node not in self._guessed and node not in missing:
                missing.add(node)
                if self.proposer is None:
                    break
                node = self._known.parents[node]  # a proposer has to run these, too
        depths = self._known.depths
        for _, level in groupby(sorted(missing, key=lambda node: (depths[node], node)), key=depths.__getitem__):
            group = list(level)
            found = [self._index.candidates(self._known.ends[node], INDEXED) for node in group]
            plain = self.proposer is None and perturb is None
            said = map(self._by_index, found) if plain else self._by_logits(group, found, perturb)
            self._guessed |= zip(group, said, strict=True)
        return [self._scored.get(node) or self._guessed[node] for node in nodes]

    def _by_index(self, candidates: dict[int, float]) -> Said:
        most = list(candidates.items())[: self._most]
        return self._doubted([token for token, _ in most], [math.log(p) for _, p in most])

    def _doubted(self, tokens: list[int], values: list[float], plain: list[float] | None = None) -> Said:
        """What a proposer says with these log-probabilities; ``plain``: those without noise."""
        temperature = self._policy.sharpened(self.temperature)
        sharp, wide = (_log_softmax(values, temperature * factor) for factor in (1, DOUBT))
        return Said(tokens, sharp, wide, [value >= LEAST for value in plain or values])

    def _by_logits(self, nodes: list[int], found: Sequence[dict[int, float]], perturb: Perturb | None) -> list[Said]:
        """What the proposer says after nodes of one depth, mixed with the index's candidates."""
        device, share = self.device, 1.0 if self.proposer is None else INDEX_SHARE
        if self.proposer is None:
            rows = torch.full((len(nodes), self.vocab_size), math.log(UNKNOWN / self.vocab_size), device=device)
        else:
            rows = self.proposer.expand(self._known.on_device(), upload(nodes, device)).float().log_softmax(dim=-1)
            kept = [[math.log(1 - share) if candidates else 0.0] for candidates in found]
            rows = rows + upload(kept, device, torch.float32)
        places = [(row, token) for row, candidates in enumerate(found) for token in candidates]
        if places:
            at = tuple(upload(places, device).t())
            own = [math.log(p * share) for candidates in found for p in candidates.values()]
            rows[at] = rows[at].logaddexp(upload(own, device, torch.float32))
        noisy = rows if perturb is None else perturb(rows, self._known.depths[nodes[0]] - self._tree.levels)
        best, tokens = noisy.topk(self._most, dim=-1)
        read, most = torch.cat([tokens.float(), best, rows.gather(1, tokens)], dim=1).tolist(), self._most
        return [self._doubted([int(t) for t in row[:most]], row[most : 2 * most], row[2 * most :]) for row in read]


def _log_softmax(values: Sequence[float], temperature: float) -> list[float]:
    if not values or (highest := max(values)) == -math.inf:
        return [-math.inf] * len(values)
    total = math.log(sum(math.exp((value - highest) / temperature) for value in values))
    return [(value - highest) / temperature - total for value in values]
