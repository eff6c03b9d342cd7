"""``draft=pard``: a small model that drafts several tokens in one pass (PARD, arXiv 2504.18583; PARD-2, 2605.08632).

The model runs over [last emitted token, pard_token, ..., pard_token]; each row predicts the token behind it. Its KV
cache holds committed tokens only: those of the last tree's accepted path are written by the next tree's pass.

PARD-2 adds a projection of the target's hidden states to every embedding (``target_proj`` in ``warp_model.bin``): those
behind the token before; rows of ``pard_token`` have those of the last emitted token, and the text's first has none.
"""

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from subspec.config.schema import Config
from subspec.decoding.batch import TokenBatch
from subspec.decoding.draft import fit_vocabulary
from subspec.decoding.hidden import NO_HIDDEN, HiddenRequest
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.drafts.block_draft import BlockLevels
from subspec.drafts.eagle import meta_states, observe_bytes
from subspec.drafts.eagle_checkpoint import read_pickle
from subspec.drafts.separate_cache import prompt_rows, twin
from subspec.drafts.small_checkpoint import PLANTED, load_small_config, small_folder
from subspec.drafts.small_model import OwnModelMemory, SmallModelSpec, check_small_model
from subspec.drafts.spec import BuiltDraft
from subspec.errors import ConfigError
from subspec.memory.allocator import Allocation
from subspec.memory.draft_memory import SizingInputs
from subspec.memory.trace import META, draft_level_bytes, token_ids
from subspec.utils.console import Note
from subspec.utils.disk import sha256

WARP = "warp_model.bin"
"""The file of PARD-2's projection."""


@dataclass(frozen=True)
class PardShape:
    """What a model's ``config.json`` says about drafting.

    Attributes:
        token: of every row but the first.
        wants: the target's hidden states that PARD-2 projects; none: the model is PARD's.
        scale: of the projected states.
    """

    token: int
    wants: HiddenRequest = NO_HIDDEN
    scale: float = 0.0

    @property
    def states(self) -> int:
        """Hidden states side by side."""
        return len(self.wants.layers) + self.wants.final


def pard_shape(config: Config, target: PretrainedConfig) -> PardShape:
    """Read it off the model's ``config.json``; a planted model's ``pard_token`` is its last.

    Raises:
        ConfigError: the model is no PARD model, or was made for another target.
    """
    path, small = config.draft.path, load_small_config(config)
    token = small.vocab_size - 1 if path.startswith(PLANTED) else getattr(small, "pard_token", None)
    if not isinstance(token, int) or not 0 <= token < small.vocab_size:
        raise ConfigError(
            f"draft.path={path}: its config.json says pard_token={token}, and draft=pard needs one of its own tokens: "
            "set draft.path to a PARD model, or draft=small_model"
        )
    if not getattr(small, "pard2", False) and getattr(small, "spd_type", None) != "pard2":
        return PardShape(token)
    # transformers' numbers of hidden states: 0 is the embedding, the last one is behind the final norm.
    layers, number = getattr(small, "pard2_target_layers", None) or (), target.num_hidden_layers
    behind = [index % (number + 1) - 1 for index in layers if -number <= index <= number and index != 0]
    final = number - 1 in behind[:1]
    behind = behind[final:]
    known = layers and len(behind) + final == len(layers) and number - 1 not in behind
    width = getattr(small, "pard2_target_dim", len(layers) * target.hidden_size)
    if not known or width != len(layers) * target.hidden_size:
        raise ConfigError(
            f"draft.path={path} projects {width} features of the hidden states {list(layers)} (pard2_target_layers), "
            f"which a target of {number} layers and hidden size {target.hidden_size} does not have: set draft.path to "
            "a model that was trained for this target"
        )
    return PardShape(token, HiddenRequest(final, tuple(behind)), getattr(small, "pard2_scale", 0.02))


class FusedModel(TargetModel):
    """A model that adds projected hidden states of the target to its embeddings.

    Args:
        projection: [hidden, width], already scaled. bias: [hidden], scaled too; None: there is none.

    Attributes:
        states: [n, width], of the tokens of the next pass.
    """

    states: Tensor | None = None

    def __init__(self, model: PreTrainedModel, projection: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(model)
        self.projection, self.bias = projection, bias

    def embed(self, tokens: Tensor) -> Tensor:
        assert self.states is not None
        return super().embed(tokens) + linear(self.states.to(self.dtype), self.projection, self.bias)


class PardDraft(BlockLevels):
    """Drafts with a model on a cache of its own.

    Args:
        model: a :class:`FusedModel` if ``shape`` wants hidden states.
        levels: rows of a pass over a block.
        max_length: most tokens of prompt and output together.
        vocab_size: of the target.

    Attributes:
        cache: the draft's own.
    """

    def __init__(
        self,
        model: TargetModel,
        shape: PardShape,
        *,
        levels: int,
        max_length: int,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature)
        self.model, self.levels, self.vocab_size, self.wants = model, levels, vocab_size, shape.wants
        self.cache = model.new_cache(max_length=max_length, draft_rows=0, target_rows=cache_rows(max_length, levels))
        self._prompt_rows = prompt_rows(max_length)
        self._block = torch.full((levels - 1,), shape.token, device=model.device)

    def fork(self) -> "PardDraft":
        other = copy.copy(self)
        other.cache = twin(self.cache, self.model)
        return other

    def begin(self, cache: KVCache) -> None:
        self.cache.reset()
        self._tokens = self._block[:0]  # committed tokens without a row, with the states before them
        self._states: Tensor | None = None
        self._last: Tensor | None = None  # the target's states of the last committed token, [1, width]

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        states = self._before(hidden)
        for start in range(0, len(tokens), self._prompt_rows):
            rows = slice(start, start + self._prompt_rows)
            self._run(tokens[rows], None if states is None else states[rows], len(tokens[rows]))

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        self._tokens, self._states = tree.tokens.index_select(0, path), self._before(hidden)

    def run_block(self, root: Tensor) -> Tensor:
        waiting, states = len(self._tokens), self._states
        if self._last is not None:
            own = self._last.expand(self.levels, -1)
            states = own if states is None else torch.cat([states, own])
        hidden = self._run(torch.cat([self._tokens, root, self._block]), states, waiting)
        self._tokens, self._states = self._tokens[:0], None
        return fit_vocabulary(self.model.logits(hidden[waiting:]), self.vocab_size)

    def _before(self, hidden: Tensor | None) -> Tensor | None:
        """The target's states of the token before each, given those of the tokens, [n, width]."""
        if hidden is None:
            return None
        last = torch.zeros_like(hidden[:1]) if self._last is None else self._last
        self._last = hidden[-1:].clone()  # a view would keep the whole chunk
        return torch.cat([last, hidden[:-1]])

    def _run(self, tokens: Tensor, states: Tensor | None, committed: int) -> Tensor:
        """Run ``tokens`` behind the prefix and commit the first of them; returns final hidden states."""
        view, model = self.cache.target_view(len(tokens)), self.model
        if isinstance(model, FusedModel):
            model.states = states
        hidden = model.forward(TokenBatch.chain(tokens, self.cache.length, view)).final
        if isinstance(model, FusedModel):
            model.states = None  # a view would keep the whole chunk
        self.cache.extend(committed)
        return hidden


def cache_rows(max_length: int, levels: int) -> int:
    """Rows behind the prefix: a chunk of the prompt, or an accepted path with its root and a block."""
    return max(prompt_rows(max_length), 2 * levels + 1)


class PardMemory(OwnModelMemory):
    """A model in bfloat16 with a KV cache of its own; nothing is captured."""

    captured = False

    def __init__(self, inputs: SizingInputs) -> None:
        shape, length = pard_shape(inputs.config, inputs.model), inputs.config.decoding.max_length
        levels = min(inputs.config.draft.block, inputs.policy.max_depth)
        super().__init__(inputs, 0, cache_rows(length, levels))
        model, self.states = self.trace.model, len(shape.wants.layers)
        width = shape.states * inputs.spec.hidden
        if width:
            hidden = model.model.config.hidden_size
            projection = torch.empty(hidden, width, dtype=model.dtype, device=META)
            self.allocations += (Allocation("projection", ((projection.nbytes, 1),), f"{width} features"),)
            model = FusedModel(model.model, projection)
        self.read //= levels

        def begun(past: int) -> PardDraft:
            vocab = inputs.target.model.vocab_size
            draft = PardDraft(model, shape, levels=levels, max_length=length, vocab_size=vocab)
            draft.begin(draft.cache)
            draft.cache.length = past
            return draft

        def level() -> int:
            draft, path = begun(max(0, length - levels - 1)), min(levels + 1, length)
            draft._tokens = token_ids(path)
            draft._states = draft._before(meta_states(inputs, shape.wants, path))
            return draft_level_bytes(draft, inputs.policy, inputs.sampling, draft.vocab_size)

        key = (levels, length, width, inputs.target.model.vocab_size)
        self.level = self.trace.cached(
            ("PARD level", key, inputs.policy.width, inputs.policy.capacity, inputs.sampling), level
        )
        self._prompt = lambda chunk: self.trace.cached(
            ("PARD prompt", key, chunk), lambda: observe_bytes(inputs, begun(length - chunk), chunk)
        )

    def prompt_bytes(self, chunk: int) -> int:
        return self._prompt(chunk)


class PardSpec(SmallModelSpec):
    """``draft=pard``."""

    memory = PardMemory

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
        if draft.path is None:
            raise ConfigError(
                "draft=pard ships no model: set draft.path to the folder or hub id of a PARD model with the vocabulary "
                f"of target={config.target.name}"
            )
        if draft.block < 1:
            raise ConfigError(f"draft.block={draft.block} must be at least 1: a pass drafts a token per row")
        super().check(config)

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        pard_shape(config, model)
        check_small_model(config, load_small_config(config))

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str:
        own, folder = super().weights_identity(config, note), small_folder(config, note)
        if folder is None or not (folder / WARP).is_file():
            return own
        return hashlib.sha256(f"{own} {sha256(folder / WARP)}".encode()).hexdigest()

    def prepare(self) -> None:
        """Load the model, and PARD-2's projection."""
        self._shape = pard_shape(self.context.config, self.context.model)
        super().prepare()
        model, shape = self._model, self._shape
        self._pard = TargetModel(model)
        if not (width := shape.states * self.context.model.hidden_size):
            return
        folder, name = small_folder(self.context.config, self.context.note), f"draft.path={self._source.name}"
        if folder is None or not (folder / WARP).is_file():
            raise ConfigError(f"{name} lacks {WARP}, which its config.json asks for (pard2): fetch or copy it")
        dtype, device = self._pard.dtype, self._pard.device
        scaled = {
            key: (tensor.to(device, torch.float32) * shape.scale).to(dtype)
            for key, tensor in read_pickle(folder / WARP).items()
        }
        weight, bias = scaled.pop("target_proj.weight", None), scaled.pop("target_proj.bias", None)
        hidden = model.config.hidden_size
        if weight is None or weight.shape != (hidden, width) or scaled:
            raise ConfigError(
                f"{name}: {WARP} holds no target_proj.weight of [{hidden}, {width}] alone: fetch or copy it again"
            )
        self._pard = FusedModel(model, weight, bias)

    def build(self, target: TargetModel) -> BuiltDraft:
        context, draft = self.context, self.context.config.draft
        depth = context.policy.max_depth
        levels = min(draft.block, depth)
        if depth > levels:
            context.note(f"tree.depth={depth}: a pass drafts draft.block={levels} levels, and no tree is deeper")
        sizes = {"levels": levels, "max_length": context.config.decoding.max_length, "vocab_size": target.vocab_size}
        made = PardDraft(self._pard, self._shape, **sizes, temperature=draft.temperature)
        method = "PARD-2" if isinstance(self._pard, FusedModel) else "PARD"
        built = self.built(made, made.cache, f"{method}, {levels} in a pass")
        built.facts |= {"method": method, "block": levels, "graphs_captured": 0}
        if made.wants.layers:
            built.facts["feature_layers"] = list(made.wants.layers)
        return built
