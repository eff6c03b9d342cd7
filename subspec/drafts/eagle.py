"""``draft=eagle2`` and ``draft=eagle3``: drafting with an EAGLE head, which continues the target's features.

Papers: arXiv 2401.15077, 2406.16858 (EAGLE-1 and EAGLE-2), 2503.01840 (EAGLE-3).

Row i of the head pairs the embedding of token i+1 with the target's feature of token i, and stands at position i.
So behind L committed tokens the head has L-1 rows with true features, the feature of the last committed token waits
for the next token, and the root of a tree, the token just emitted, pairs with it. Every deeper node is paired with
the feature that the head itself predicted for its *parent*. (The published code feeds the root's feature to all
levels of a tree, unlike the paper, which costs acceptance: figures here may exceed its own.)

Rows of accepted nodes are written anew with the target's true features before the next tree, as EAGLE does.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.schema import Config
from subspec.decoding.draft import Draft, Perturb, fit_vocabulary
from subspec.decoding.hidden import HiddenRequest
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle3_head import D2T, EMBEDDING, LM_HEAD
from subspec.drafts.eagle_checkpoint import (
    check_default,
    head_identity,
    head_shape,
    is_at_hand,
    kind_of,
    load_head,
    locate_for,
)
from subspec.drafts.eagle_head import OPTIONAL, EagleShape
from subspec.drafts.feature_draft import SETTLE_ROWS, FeatureDraft
from subspec.drafts.planted_head import PLANTED, PlantedHead
from subspec.drafts.spec import BuiltDraft, DraftSpec
from subspec.errors import ConfigError
from subspec.memory.allocator import Allocation
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.memory.trace import LEVELS, META, draft_level_bytes, peak_bytes, token_ids
from subspec.utils.console import Note, print_note


class EagleDraft(FeatureDraft):
    """Drafts with an EAGLE head; arguments as of :class:`~subspec.drafts.feature_draft.FeatureDraft`."""

    def begin(self, cache: KVCache) -> None:
        super().begin(cache)
        self._pending: Tensor | None = None  # hidden states of the last committed token, [1, width]

    def settle(self, tokens: Tensor, states: Tensor) -> None:
        """Write rows with true features; the last token's feature waits for the token behind it."""
        waiting, self._pending = self._pending, states[-1:].clone()  # a view would keep the whole chunk
        if waiting is None:  # the text's first token follows no feature
            tokens, waiting, states = tokens[1:], states[:1], states[1:]
        for piece, own in zip(tokens.split(SETTLE_ROWS), states.split(SETTLE_ROWS), strict=True):
            if piece.numel():  # a first chunk of one token has no row
                self._write(piece, torch.cat([waiting, own[:-1]]))
            waiting = own[-1:]

    def _write(self, tokens: Tensor, states: Tensor) -> None:
        head, (positions, view) = self.head, self.append_rows(tokens.numel())
        head.store(head.embed(tokens, self.target), head.fuse(states), positions, view)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        logits, d2t, vocab_size = self._own_logits(tree, frontier), self.head.d2t, self.target.vocab_size
        if d2t is None:
            return fit_vocabulary(logits[:, :vocab_size], vocab_size)
        ids = d2t + torch.arange(len(d2t), device=d2t.device)
        return logits.new_full((len(logits), vocab_size), -torch.inf).index_copy_(1, ids, logits)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        """One level. A greedy one is chosen among the head's own ids, which become the target's afterwards."""
        d2t, first = self.head.d2t, tree.size
        if perturb is not None or d2t is None or policy.width > len(d2t):
            return super().extend(tree, frontier, policy, perturb)
        frontier = policy.grow(tree, frontier, self._own_logits(tree, frontier), self.temperature)
        tree.tokens[first : tree.size] += d2t.index_select(0, tree.tokens[first : tree.size])
        return frontier

    def _own_logits(self, tree: Tree, frontier: Tensor) -> Tensor:
        head, target = self.head, self.target
        if tree.levels == 0:
            assert self._pending is not None
            self.rows.used = 0
            features = head.fuse(self._pending)
        else:
            features = self.features.index_select(0, tree.parents.index_select(0, frontier))
        batch = self.rows.take(tree, frontier)
        mask = target.additive_mask(batch.visible())
        hidden = head(head.embed(batch.tokens, target), features, batch.positions, mask, batch.view)
        self.features.index_copy_(0, frontier, hidden)
        return head.logits(hidden, target)


class EagleMemory(DraftMemory):
    """A draft head with its own KV cache and features; embedding and LM head are often the target's.

    With ``plan_only`` a head that is not on disk is not fetched: the largest possible head is counted, one layer of the
    target with a KV head per query head and every bias; for EAGLE-3 and block heads also five feature
    layers and an embedding and an LM head of its own.
    """

    captured = False
    name = "EAGLE"
    draft: ClassVar[Callable[..., FeatureDraft]] = EagleDraft

    def __init__(self, inputs: SizingInputs) -> None:
        shape, note = _eagle_shape(inputs)
        policy, length, target = inputs.policy, inputs.config.decoding.max_length, inputs.target.model
        kind, wants = kind_of(inputs.config.draft), shape.wants(inputs.model)
        self.states = len(wants.layers)
        shapes = shape.shapes()
        weights = {
            name: torch.empty(size, dtype=torch.int64 if name == D2T else target.dtype, device=META)
            for name, size in shapes.items()
        }
        rows, layers, nodes = shape.draft_rows(policy), shape.decoder_layers, policy.capacity * shape.keeps_features
        cache = 2 * layers * shape.kv_heads * shape.head_dim * (rows + length) * inputs.itemsize
        features = nodes * shape.hidden * inputs.itemsize
        self.allocations = (
            Allocation(f"{self.name} head", tuple((weight.nbytes, 1) for weight in weights.values()), note),
            Allocation(f"{self.name} KV cache", ((cache, inputs.texts),), f"{rows} + {length} rows, {_layers(shape)}"),
            Allocation(f"{self.name} features", ((features, inputs.texts * int(nodes > 0)),), f"{nodes} nodes"),
        )
        self.read = sum(weight.nbytes for name, weight in weights.items() if name not in (EMBEDDING, D2T))
        if LM_HEAD not in weights:
            self.read += inputs.spec.vocab * inputs.spec.hidden * inputs.itemsize
        self.read //= min(shape.levels, policy.max_depth)
        key = (shape.kv_heads, *shapes.items())

        def begun(past: int) -> FeatureDraft:
            head = kind.from_tensors(weights, shape.config())
            draft = self.draft(head, target, policy, wants=wants)
            draft.begin(target.new_cache(max_length=length + policy.draft_rows, draft_rows=0, target_rows=1))
            draft.observe(token_ids(1), meta_states(inputs, wants, 1))
            draft.cache.length = past
            return draft

        def level() -> int:
            used = 1 + (min(LEVELS, policy.max_depth) - 1) * policy.width
            draft = begun(length + policy.draft_rows - used)  # as many visible rows as the deepest level has
            return draft_level_bytes(draft, policy, inputs.sampling, target.vocab_size)

        self.level = inputs.target.cached(
            (self.name, "level", key, policy.width, policy.draft_rows, length, inputs.sampling), level
        )
        self._prompt = lambda chunk: inputs.target.cached(
            (self.name, "prompt", key, chunk), lambda: observe_bytes(inputs, begun(0), chunk)
        )

    def prompt_bytes(self, chunk: int) -> int:
        return self._prompt(chunk)


def meta_states(inputs: SizingInputs, wants: HiddenRequest, rows: int) -> Tensor | None:
    """The target's hidden states in ``wants`` of ``rows`` tokens, without numbers."""
    width = (wants.final + len(wants.layers)) * inputs.spec.hidden
    return torch.zeros(rows, width, dtype=inputs.target.model.dtype, device=META) if width else None


def observe_bytes(inputs: SizingInputs, draft: Draft, chunk: int) -> int:
    """Peak of ``draft.observe`` of ``chunk`` tokens, beside the hidden states that the target's pass returns."""
    states = len(draft.wants.layers)

    def run() -> None:
        held = [inputs.target.hidden(chunk) for _ in range(states and states + 1)]
        draft.observe(token_ids(chunk), meta_states(inputs, draft.wants, chunk))
        del held

    return peak_bytes(run)


def _eagle_shape(inputs: SizingInputs) -> tuple[EagleShape, str]:
    config, spec, draft = inputs.config, inputs.spec, inputs.config.draft
    path, kind = draft.path, kind_of(draft)
    if config.plan_only and path not in (None, PLANTED) and not is_at_hand(path):
        attention = (spec.hidden, spec.heads, spec.heads, spec.head_dim, spec.intermediate)
        own = kind.shape_class.largest(inputs.model)
        largest = kind.shape_class(*attention, frozenset(OPTIONAL), **own)
        return largest, "not fetched for a plan: counted as the largest"
    shape = head_shape(locate_for(draft, config.target, print_note), spec.hidden, config.target.name, kind)
    random = ", random weights" if path == PLANTED else ""
    return shape, f"{_layers(shape)}, {shape.kv_heads} KV heads{random}"


def _layers(shape: EagleShape) -> str:
    return "one layer" if shape.decoder_layers == 1 else f"{shape.decoder_layers} layers"


class EagleSpec(DraftSpec):
    """``draft=eagle2``, ``draft=eagle3``: a published, the shipped or a planted head, in the target's dtype."""

    memory = EagleMemory

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
        if draft.path is None:
            check_default(draft, config.target)
        elif not draft.path.strip():
            raise ConfigError("draft.path is empty: set it to a folder or hub id, or leave it out")
        elif draft.path == PLANTED:
            PlantedHead.of(config.target)

    @classmethod
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        files = locate_for(config.draft, config.target, note)
        head_shape(files, model.hidden_size, config.target.name, kind_of(config.draft)).wants(model)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str:
        return head_identity(locate_for(config.draft, config.target, note))

    def prepare(self) -> None:
        """Load the head, which is part of a streamed target's budget."""
        context, draft = self.context, self.context.config.draft
        self._loaded = load_head(
            locate_for(draft, context.config.target, context.note),
            hidden=context.model.hidden_size,
            target=context.name,
            dtype=context.dtype,
            device=context.device,
            kind=kind_of(draft),
        )
        self._loaded.head.shape.wants(context.model)

    def build(self, target: TargetModel) -> BuiltDraft:
        loaded, context = self._loaded, self.context
        head, shape = loaded.head, loaded.head.shape
        draft = self.memory.draft(head, target, context.policy, context.config.draft.temperature)
        parameters = sum(parameter.numel() for parameter in head.parameters())
        dtype = str(target.dtype).removeprefix("torch.")
        facts = {"head": loaded.source, "planted": loaded.planted, "dropped": loaded.dropped, "dtype": dtype}
        facts |= {"parameters": parameters, "heads": shape.heads, "kv_heads": shape.kv_heads, "graphs_captured": 0}
        if draft.wants.layers:
            facts["feature_layers"] = list(draft.wants.layers)
            facts["draft_vocab"] = target.vocab_size if head.d2t is None else len(head.d2t)
        summary = f"head {loaded.source}, {parameters / 1e6:.1f} M parameters, {dtype}"
        return BuiltDraft(draft, facts=facts, summary=summary)
