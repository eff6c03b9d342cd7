"""``draft.proposer``: a draft for the draft (cascade), which lets one pass of the substitute grow several levels.

A pass of the substitute costs nearly the same for 30 rows as for one, since it reads its weights once. So a cheap
draft, the proposer, guesses which nodes the next levels of the tree will hold, and one pass scores these beside the
frontier. Nodes of the tree and their scores are the substitute's alone: a level grows without a pass if the nodes it
grows from have been scored, and a wrong guess costs a row. The tree is therefore the substitute's own, whatever the
proposer guesses.

Every level reads the new nodes' tokens back to the host, which decides whether another pass is needed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.enums import Proposer
from subspec.config.schema import (
    Config,
    DraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    PromptLookupDraftConfig,
    SmallModelDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.draft import Draft, LevelDraft, Perturb
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.drafts.eagle import EagleSpec
from subspec.drafts.prompt_lookup import PromptLookupSpec
from subspec.drafts.small_model import SmallModelSpec
from subspec.drafts.spec import BuiltDraft, DraftContext, DraftSpec
from subspec.drafts.substitute import SubstituteSpec
from subspec.errors import ConfigError, SubspecError
from subspec.utils.console import Note

LEAST = -7.0
"""Log-probability of a guess, given its parent, below which it is not worth a row."""

DOUBT = 2
"""Factor of the temperature at which guesses beside the likeliest tree are ranked: the proposer may be wrong."""

SHARE = 0.25
"""Share of the rows left that the next level of guesses takes: a level counts only if those above it were right."""

SPARE = 4
"""Passes whose guesses may all be wrong, in rows of the cache; later ones guess less."""


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
        levels: the substitute; runs any nodes of a tree in one pass.
        proposer: built for the sizes of :class:`GuessPolicy`.
        policy: of the trees that will be drafted.
        proposed: most guesses of a pass.
    """

    shares_cache = True

    def __init__(
        self,
        levels: LevelDraft,
        proposer: Draft,
        policy: TreePolicy,
        proposed: int,
        device: torch.device,
    ) -> None:
        super().__init__(levels.temperature)
        self.levels, self.proposer, self.wants = levels, proposer, proposer.wants
        self.proposed, self._policy = proposed, policy
        sizes = GuessPolicy(policy, proposed)
        self.extra_rows = sizes.draft_rows - policy.draft_rows
        # The nodes that the substitute runs. Their numbers stay while the tree grows, and name them in both drafts.
        self._known = Tree(sizes.capacity, device)
        self._clear()

    def _clear(self) -> None:
        self._lineage: list[tuple[int, int]] = []  # parent and depth of every known node
        self._children: dict[tuple[int, int], int] = {}  # by parent and token
        self._number: dict[int, int] = {}  # of the drafted tree's nodes that were in a frontier
        self._scored: dict[int, Tensor] = {}  # the substitute's logits
        self._guessed: dict[int, Tensor] = {}  # the proposer's log-probabilities
        self._due = self._policy.draft_rows  # rows that the policy may still ask for
        self._passes = 0

    def begin(self, cache: KVCache) -> None:
        self._clear()
        self._cache = cache
        self.levels.begin(cache)
        self.proposer.begin(cache)

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        self.proposer.observe(tokens, hidden)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        nodes = self._locate(tree, frontier)
        self._run(tree, frontier, nodes, None)
        return torch.stack([self._scored[node] for node in nodes])

    def extend(
        self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None
    ) -> Tensor:
        nodes, before = self._locate(tree, frontier), (tree.size, tree.levels, tree.level_size)
        unscored = {
            number for number, node in zip(frontier.tolist(), nodes, strict=True) if node not in self._scored
        }
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
        logits = torch.stack([self._scored[nodes[row]] for row in scored])
        if perturb is not None:
            logits = perturb(logits)
        if len(scored) < len(nodes):
            known = logits
            logits = known.new_full((len(nodes), known.shape[1]), -torch.inf)
            logits[:, 0] = 0
            logits[torch.tensor(scored, device=known.device)] = known
        return policy.grow(tree, frontier, logits, self.temperature)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        if not self._lineage:
            self._plant(tree)
        nodes = [0]
        for token in tree.tokens.index_select(0, path[1:]).tolist():
            nodes += self._nodes([(nodes[-1], token)])
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

    def _locate(self, tree: Tree, frontier: Tensor) -> list[int]:
        """The known nodes that ``frontier`` stands for; new ones are added."""
        if not self._lineage:
            self._plant(tree)
        if tree.levels:
            pairs = torch.stack(
                [tree.parents.index_select(0, frontier), tree.tokens.index_select(0, frontier)]
            )
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
                deepest = max(deepest, depth)
            known.append(tokens, parents, torch.zeros(len(new), device=device))
            known.levels, known.level_size = deepest, 0
        return [self._children[child] for child in children]

    def _run(self, tree: Tree, frontier: Tensor, nodes: list[int], perturb: Perturb | None) -> None:
        """Score the frontier and the guesses behind it in one pass."""
        batch = [node for node in nodes if node not in self._scored]
        batch += self._guess(tree.levels, nodes, tree.scores.index_select(0, frontier), perturb)
        logits = self.levels.expand(self._known, torch.tensor(batch, device=frontier.device))
        self._scored.update(zip(batch, logits, strict=True))
        # Logits of a large vocabulary: those of earlier levels are not needed again.
        self._scored = {n: row for n, row in self._scored.items() if self._lineage[n][1] >= tree.levels}
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
        plain = torch.stack([self._scored.get(node, self._guessed.get(node)) for node in nodes]).float()
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
            self._guessed.update(zip(group, logits.float().log_softmax(dim=-1), strict=True))


PROPOSERS: dict[Proposer, tuple[type[DraftSpec], type[DraftConfig]]] = {
    Proposer.prompt_lookup: (PromptLookupSpec, PromptLookupDraftConfig),
    Proposer.small_model: (SmallModelSpec, SmallModelDraftConfig),
    Proposer.eagle2: (EagleSpec, Eagle2DraftConfig),
    Proposer.eagle3: (EagleSpec, Eagle3DraftConfig),
}


def proposer_of(config: Config) -> tuple[type[DraftSpec], Config] | None:
    """The proposer's kind, and the configuration in which it is the draft; None: there is none."""
    draft = config.draft
    if not isinstance(draft, SubstituteDraftConfig) or draft.proposer is Proposer.none:
        return None
    kind, settings = PROPOSERS[draft.proposer]
    options: dict[str, Any] = {"name": draft.proposer.value}
    if settings is PromptLookupDraftConfig:
        options["shortest"] = 1  # a wrong guess costs only a row
    else:
        options["path"] = draft.proposer_path
    return kind, replace(config, draft=settings(**options))


@contextmanager
def _about_proposer() -> Iterator[None]:
    """Name the proposer's keys in its own messages."""
    try:
        yield
    except SubspecError as error:
        text = str(error).replace("draft.path", "draft.proposer_path")
        raise type(error)(re.sub(r"\bdraft=(?!subspec)", "draft.proposer=", text)) from error


class CascadeSpec(SubstituteSpec):
    """``draft=subspec``, with ``draft.proposer`` in front of it if there is one."""

    def __init__(self, context: DraftContext) -> None:
        self._proposer: DraftSpec | None = None
        if found := proposer_of(context.config):
            kind, config = found
            assert isinstance(context.config.draft, SubstituteDraftConfig)
            self._policy, self._proposed = context.policy, context.config.draft.proposed
            # The substitute's kernels are chosen for the rows of a pass, too.
            context = replace(context, policy=GuessPolicy(context.policy, self._proposed))
            self._proposer = kind(replace(context, config=config, quantizer=None))
        super().__init__(context)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        draft, found = config.draft, proposer_of(config)
        path = getattr(draft, "proposer_path", None)
        if path is not None and (found is None or draft.proposer is Proposer.prompt_lookup):
            raise ConfigError(
                f"draft.proposer_path={path}: draft.proposer={draft.proposer.value} has no weights: leave it at null"
            )
        if found is None:
            return
        if isinstance(config.offload, StreamOffloadConfig):
            raise ConfigError(
                f"draft.proposer={draft.proposer.value}: offload=stream captures whole levels, and a proposer adds "
                "single nodes: set draft.proposer=none, or offload=none"
            )
        with _about_proposer():
            found[0].check(found[1])

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        super().check_target(config, model)
        if found := proposer_of(config):
            with _about_proposer():
                found[0].check_target(found[1], model)

    @classmethod
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        if found := proposer_of(config):
            with _about_proposer():
                found[0].check_files(found[1], model, note)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        own = super().weights_identity(config, note)
        if found := proposer_of(config):
            with _about_proposer():
                own = "+".join(filter(None, (own, found[0].weights_identity(found[1], note)))) or None
        return own

    def prepare(self) -> None:
        super().prepare()
        if self._proposer is not None:
            with _about_proposer():
                self._proposer.prepare()

    def build(self, target: TargetModel) -> BuiltDraft:
        built = super().build(target)
        if self._proposer is None:
            return built
        assert isinstance(built.draft, LevelDraft)
        with _about_proposer():
            proposer = self._proposer.build(target)
        draft = CascadeDraft(built.draft, proposer.draft, self._policy, self._proposed, target.device)
        name = self._proposer.context.config.draft.name
        own = {"draft": name, "proposed": self._proposed, **proposer.facts}
        summary = f"up to {self._proposed} nodes a pass are proposed by {name}, {proposer.summary}"
        return replace(built, draft=draft, facts={**built.facts, "proposer": own}, summary=summary)

    def _take_whole(self, target: TargetModel, draft: SubstituteDraftConfig) -> str | None:
        """Captured levels are whole, and a proposer adds single nodes."""
        if self._proposer is not None:
            return f"draft.proposer={draft.proposer.value}"
        return super()._take_whole(target, draft)
