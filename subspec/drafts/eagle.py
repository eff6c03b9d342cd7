"""``draft=eagle2``: drafting with an EAGLE head (arXiv 2401.15077, 2406.16858), which continues the target's features.

Row i of the head pairs the embedding of token i+1 with the target's feature of token i, and stands at position i.
So behind L committed tokens the head has L-1 rows with true features, the feature of the last committed token waits
for the next token, and the root of a tree, the token just emitted, pairs with it. Every deeper node is paired with
the feature that the head itself predicted for its *parent*. (The published code feeds the root's feature to all
levels of a tree, unlike the paper, which costs acceptance: figures here may exceed its own.)

Rows of accepted nodes are written anew with the target's true features before the next tree, as EAGLE does.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.schema import Config, Eagle2DraftConfig
from subspec.decoding.batch import DraftRows
from subspec.decoding.draft import Draft
from subspec.decoding.hidden import FINAL_HIDDEN
from subspec.decoding.kv_cache import KVCache, KVView
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle_checkpoint import (
    check_default,
    head_identity,
    head_shape,
    is_at_hand,
    load_head,
    locate_for,
)
from subspec.drafts.eagle_head import OPTIONAL, EagleHead, EagleShape
from subspec.drafts.planted_head import PLANTED, PlantedHead
from subspec.drafts.spec import BuiltDraft, DraftSpec
from subspec.errors import ConfigError
from subspec.memory.allocator import Allocation
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.memory.trace import LEVELS, META, draft_level_bytes, peak_bytes, token_ids
from subspec.utils.console import Note, print_note

SETTLE_ROWS = 256
"""Rows of a prompt written at once: bounds the workspace beside a long prefill chunk."""


class EagleDraft(Draft):
    """Drafts with a head that has a KV cache of its own, of one layer.

    Args:
        head: in the target's dtype, on its device.
        target: its embedding and LM head are the draft's.
        policy: of the trees that will be drafted, for sizes.
        temperature: of the draft distribution (EAGLE-2: 1).
    """

    wants = FINAL_HIDDEN

    def __init__(
        self, head: EagleHead, target: TargetModel, policy: TreePolicy, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature)
        self.head = head
        self.target = target
        self.policy = policy
        # By node number, so that a level finds its parents' features wherever they are in the tree.
        self._predicted = torch.zeros(
            policy.capacity, head.shape.hidden, dtype=target.dtype, device=target.device
        )
        self._rows: DraftRows | None = None
        self._pending: Tensor | None = None  # feature of the last committed token, [1, hidden]

    @property
    def rows(self) -> DraftRows:
        """The draft region of the head's own cache."""
        if self._rows is None:
            raise RuntimeError("begin() comes first")
        return self._rows

    @property
    def cache(self) -> KVCache:
        """The head's own rows: one per committed token but the first."""
        return self.rows.cache

    def begin(self, cache: KVCache) -> None:
        if self._rows is None or self.cache.max_length != cache.max_length:
            shape, target = self.head.shape, self.target
            own = KVCache(
                layers=1,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                max_length=cache.max_length,
                draft_rows=self.policy.draft_rows,
                target_rows=0,
                dtype=target.dtype,
                device=target.device,
            )
            self._rows = DraftRows(own, target.device)
        self.cache.reset()
        self.rows.used = 0
        self._pending = None

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        """Write the rows of a prefill chunk; its last feature is kept for the token behind it."""
        assert hidden is not None
        self._append(tokens, hidden)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Write the rows of the accepted nodes, with true features in place of predicted ones."""
        assert hidden is not None
        self._append(tree.tokens.index_select(0, path), hidden)
        self.rows.used = 0

    def _append(self, tokens: Tensor, features: Tensor) -> None:
        if self._pending is None:  # the text's first token follows no feature
            tokens, earlier = tokens[1:], features[:-1]
        else:
            earlier = torch.cat([self._pending, features[:-1]])
        self._pending = features[-1:].clone()  # a view would keep the whole chunk
        for piece, before in zip(tokens.split(SETTLE_ROWS), earlier.split(SETTLE_ROWS), strict=True):
            if piece.numel():  # a first chunk of one token has no row
                self._write(piece, before)

    def _write(self, tokens: Tensor, earlier: Tensor) -> None:
        cache, count = self.cache, tokens.numel()
        positions = torch.arange(cache.length, cache.length + count, device=tokens.device)
        start = cache.draft_rows + cache.length
        cache.extend(count)
        rows = (start, start + count)
        self.head.store(self.target.embed(tokens), earlier, positions, KVView(cache.rows, rows, rows))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        if tree.levels == 0:
            assert self._pending is not None
            self.rows.used = 0
            features = self._pending
        else:
            features = self._predicted.index_select(0, tree.parents.index_select(0, frontier))
        batch = self.rows.take(tree, frontier)
        mask = self.target.additive_mask(batch.visible())
        hidden = self.head(self.target.embed(batch.tokens), features, batch.positions, mask, batch.view)
        self._predicted.index_copy_(0, frontier, hidden)
        return self.target.logits(hidden)


class EagleMemory(DraftMemory):
    """An EAGLE head with its own KV cache and features; embedding and LM head are the target's.

    With ``plan_only`` a head that is not on disk is not fetched: the largest possible head is counted, one layer of the
    target with a KV head per query head and every bias.

    Raises:
        SubspecError: the head cannot be found or read, or belongs to another target.
    """

    captured = False

    def __init__(self, inputs: SizingInputs) -> None:
        shape, note = _eagle_shape(inputs)
        policy, length, target = inputs.policy, inputs.config.decoding.max_length, inputs.target.model
        weights = {
            name: torch.empty(size, dtype=target.dtype, device=META) for name, size in shape.shapes().items()
        }
        sizes = [weight.nbytes for weight in weights.values()]
        cache = 2 * shape.kv_heads * shape.head_dim * (policy.draft_rows + length) * inputs.itemsize
        features = policy.capacity * shape.hidden * inputs.itemsize
        self.allocations = (
            Allocation("EAGLE head", tuple((size, 1) for size in sizes), note),
            Allocation("EAGLE KV cache", ((cache, 1),), f"{policy.draft_rows} + {length} rows, one layer"),
            Allocation("EAGLE features", ((features, 1),), f"{policy.capacity} nodes"),
        )
        self.read = sum(sizes) + inputs.spec.vocab * inputs.spec.hidden * inputs.itemsize

        key = (shape.kv_heads, *shape.shapes().items())

        def begun(past: int) -> EagleDraft:
            draft = EagleDraft(EagleHead.from_tensors(weights, shape.config()), target, policy)
            draft.begin(target.new_cache(max_length=length + policy.draft_rows, draft_rows=0, target_rows=1))
            draft.observe(token_ids(1), inputs.target.hidden(1))
            draft.cache.length = past
            return draft

        def level() -> int:
            used = 1 + (min(LEVELS, policy.max_depth) - 1) * policy.width
            draft = begun(length + policy.draft_rows - used)  # as many visible rows as the deepest level has
            return draft_level_bytes(draft, policy, inputs.sampling, target.vocab_size)

        def prompt() -> int:
            draft = begun(0)
            return peak_bytes(lambda: draft.observe(token_ids(length), inputs.target.hidden(length)))

        self.level = inputs.target.cached(
            ("EAGLE level", key, policy.width, policy.draft_rows, length, inputs.sampling), level
        )
        self.workspaces = {
            "EAGLE rows of a prompt": inputs.target.cached(("EAGLE prompt", key, length), prompt)
        }


def _eagle_shape(inputs: SizingInputs) -> tuple[EagleShape, str]:
    config, spec = inputs.config, inputs.spec
    draft = config.draft
    assert isinstance(draft, Eagle2DraftConfig)
    path = draft.path
    if config.plan_only and path not in (None, PLANTED) and not is_at_hand(path):
        largest = EagleShape(
            spec.hidden, spec.heads, spec.heads, spec.head_dim, spec.intermediate, frozenset(OPTIONAL)
        )
        return largest, "not fetched for a plan: counted as the largest"
    shape = head_shape(locate_for(draft, config.target, print_note), spec.hidden, config.target.name)
    random = ", random weights" if path == PLANTED else ""
    return shape, f"one layer, {shape.kv_heads} KV heads{random}"


class EagleSpec(DraftSpec):
    """``draft=eagle2``: a published, the shipped or a planted head, in the target's dtype."""

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
        assert isinstance(draft, Eagle2DraftConfig)
        if draft.path is None:
            check_default(config.target)
        elif not draft.path.strip():
            raise ConfigError("draft.path is empty: set it to a folder or hub id, or leave it out")
        elif draft.path == PLANTED:
            PlantedHead.of(config.target)

    @classmethod
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        assert isinstance(config.draft, Eagle2DraftConfig)
        files = locate_for(config.draft, config.target, note)
        head_shape(files, model.hidden_size, config.target.name)

    @classmethod
    def memory(cls, inputs: SizingInputs) -> DraftMemory:
        return EagleMemory(inputs)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str:
        assert isinstance(config.draft, Eagle2DraftConfig)
        return head_identity(locate_for(config.draft, config.target, note))

    def prepare(self) -> None:
        """Load the head, which is part of a streamed target's budget."""
        context, draft = self.context, self.context.config.draft
        assert isinstance(draft, Eagle2DraftConfig)
        self._loaded = load_head(
            locate_for(draft, context.config.target, context.note),
            hidden=context.model.hidden_size,
            target=context.name,
            dtype=context.dtype,
            device=context.device,
        )

    def build(self, target: TargetModel) -> BuiltDraft:
        loaded, draft = self._loaded, self.context.config.draft
        assert isinstance(draft, Eagle2DraftConfig)
        parameters = sum(parameter.numel() for parameter in loaded.head.parameters())
        dtype = str(target.dtype).removeprefix("torch.")
        facts = {
            "head": loaded.source,
            "planted": loaded.planted,
            "dropped": loaded.dropped,
            "dtype": dtype,
            "parameters": parameters,
            "heads": loaded.head.shape.heads,
            "kv_heads": loaded.head.shape.kv_heads,
            "graphs_captured": 0,
        }
        return BuiltDraft(
            EagleDraft(loaded.head, target, self.context.policy, draft.temperature),
            facts=facts,
            summary=f"head {loaded.source}, {parameters / 1e6:.1f} M parameters, {dtype}",
        )
