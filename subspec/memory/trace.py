"""Memory that the engine's own code allocates, measured by running it on the meta device.

A trace counts the storages of tensors. Every decoder layer of a supported model has the same shapes, so :data:`LAYERS`
of them are enough. Kernels launched on meta tensors do nothing (:mod:`subspec.kernels.modules`); what only CUDA's
operations allocate is added (:data:`WORKSPACE_BYTES`, :class:`_FusedAttention`). On an H200 the peaks of passes,
sampling, audits and EAGLE levels of a 7B and an 8B were within 4 MiB of their traces, which is the allocator's rounding
(``pytest -m gpu tests/planning``).

Example::

    target = target_trace(config, itemsize=2, bitwise=True)
    target.prefill_bytes(chunk=512, max_length=2048)
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from subspec.decoding.audit import Auditor
from subspec.decoding.batch import TokenBatch, join
from subspec.decoding.bitwise import ROLES, BitwiseArithmetic
from subspec.decoding.draft import Draft, NextLevel, fit_vocabulary
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import PIECE_ROWS, Sampler, Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.decoding.verify import finite_choice, verify
from subspec.kernels.invariant_linear import REFERENCE
from subspec.targets.meta_model import empty_model

META = torch.device("meta")

LAYERS = 2
"""Decoder layers of a traced model: the second one runs while the first one's result is held."""

LEVELS = 3
"""Draft levels that are traced: the root's, the first whole one, and one below it."""

WORKSPACE_BYTES = {torch.ops.aten.sort: 25, torch.ops.aten.logsumexp: 4}
"""Bytes per input element of what CUDA's operations allocate besides their results: a segmented sort holds keys and
64-bit indices twice and one byte more, a logsumexp the float32 exponentials (both measured on an H200)."""


class MemoryTrace(TorchDispatchMode):
    """Count the bytes of the storages that are allocated while the mode is on.

    Storages that existed before are not counted, even if operations return views of them.

    Attributes:
        live: bytes allocated and not freed. peak: the largest ``live``, with the buffers of the running operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, counted=False)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor, counted=True)
        workspace = WORKSPACE_BYTES.get(func.overloadpacket)
        if workspace is not None:
            self.peak = max(self.peak, self.live + workspace * args[0].numel())
        return result

    def _add(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


class _FusedAttention(TorchFunctionMode):
    """Allocate for attention what PyTorch's fused CUDA kernels do: the output, and a padded copy of the mask."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        padded = [torch.empty_like(mask) for mask in _tensors((args[3:], kwargs.get("attn_mask")))]
        output = torch.empty_like(args[0])
        padded.clear()
        return output


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` holds at once, beside everything that existed before."""
    with torch.inference_mode(), _FusedAttention(), MemoryTrace() as trace:
        run()
    return trace.peak


def token_ids(count: int) -> Tensor:
    """int64 [count] on the meta device."""
    return torch.zeros(count, dtype=torch.int64, device=META)


class TargetTrace:
    """Peaks of the target's work, logits and sampling, cached by shape.

    Args:
        config: of the target.
        itemsize: bytes per weight: 2 is bfloat16, 4 float32.
        bitwise: whether passes run in batch-invariant arithmetic. sliced: whether they restore the MLP slice by slice.
    """

    def __init__(self, config: PretrainedConfig, itemsize: int, *, bitwise: bool, sliced: bool = False) -> None:
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        self.model = target = TargetModel(empty_model(shortened(config), dtype, META))
        if bitwise:
            target.bitwise = BitwiseArithmetic(target.model, dict.fromkeys(ROLES, REFERENCE), sliced=sliced)
        self._peaks: dict[tuple[object, ...], int] = {}

    def cached(self, key: tuple[object, ...], measure: Callable[[], int]) -> int:
        """``measure()``, once for each ``key``."""
        if key not in self._peaks:
            self._peaks[key] = measure()
        return self._peaks[key]

    def _cache(self, past: int, rows: int) -> KVCache:
        cache = self.model.new_cache(max_length=past + rows, draft_rows=0, target_rows=rows)
        cache.length = past
        return cache

    def prefill_bytes(self, chunk: int, max_length: int, states: int = 0) -> int:
        """Of a prefill pass over the last ``chunk`` tokens of ``max_length``.

        Args:
            states: layers whose hidden states the pass returns, too.
        """

        def measure() -> int:
            cache, tokens = self._cache(max_length - chunk, chunk), token_ids(chunk)

            def run() -> None:
                held = min(chunk, max_length - chunk)  # the engine holds the last chunk's
                before = [self.hidden(held) for _ in range(1 + states)]
                kept = [self.hidden(chunk) for _ in range(states - 1)]
                self.model.append(tokens, cache, hidden_of=range(min(states, 1)))
                del before, kept

            return peak_bytes(run)

        return self.cached(("prefill", chunk, max_length, states), measure)

    def tree_pass_bytes(
        self, rows: int, levels: int, max_length: int, states: int = 0, texts: int = 1, piece: int = 0
    ) -> int:
        """Of a verification pass over a tree of ``rows`` rows whose deepest tokens are the last of ``max_length``.

        Args:
            texts: number of such trees. piece: prompt tokens beside them, the last ones of ``max_length``.
        """

        def measure() -> int:
            depth = min(levels, max_length - 1)
            past, batches = max_length - 1 - depth, []
            for _ in range(texts):
                tree, view = Tree(rows, META), self._cache(past, rows).target_view(rows)
                batches.append(TokenBatch(tree.tokens, tree.depths, past, view, depth, tree.ancestors))
            if piece:
                view = self._cache(max_length - piece, piece).target_view(piece)
                batches.append(TokenBatch.chain(token_ids(piece), max_length - piece, view))

            def run() -> None:
                kept = [self.hidden(texts * rows + piece) for _ in range(states - 1)]
                self.model.forward(join(batches), hidden_of=range(min(states, 1)))
                del kept

            return peak_bytes(run)

        return self.cached(("tree", rows, levels, max_length, states, texts, piece), measure)

    def verify_bytes(self, rows: int, levels: int, sampling: Sampling) -> int:
        """Of the logits of trees of ``rows`` rows, and the choice of tokens and of the accepted path."""

        def measure() -> int:
            tree, sampler = Tree(rows, META), Sampler(sampling, self.model.vocab_size, META)
            few = 2 * PIECE_ROWS  # the choice is made piece by piece

            def run() -> None:
                logits = self.model.logits(self.hidden(rows))
                sampler.choose(logits[:few], 1, tree.depths[:few], levels + 1)
                chosen = token_ids(rows)
                verify(tree, chosen, levels, finite_choice(logits, chosen))

            return peak_bytes(run)

        return self.cached(("verify", rows, levels, sampling), measure)

    def audit_bytes(self, rows: int, sampling: Sampling) -> int:
        """Of the logits of ``rows`` tokens of an audit's pass, and what it derives from them."""

        def measure() -> int:
            auditor = Auditor(self.model, sampling)

            def run() -> None:
                logits = self.model.logits(self.hidden(rows))[:PIECE_ROWS]  # judged piece by piece
                auditor._judge(logits, token_ids(len(logits)), 1)

            return peak_bytes(run)

        return self.cached(("audit", rows, sampling), measure)

    def hidden(self, rows: int) -> Tensor:
        """Hidden states [rows, hidden] without numbers."""
        target = self.model
        return torch.zeros(rows, target.model.config.hidden_size, dtype=target.dtype, device=META)


def draft_level_bytes(
    draft: Draft, policy: TreePolicy, sampling: Sampling, vocab_size: int, forks: Sequence[Draft] = ()
) -> int:
    """The most bytes that the first :data:`LEVELS` levels hold at once, with buffers that they keep.

    Args:
        draft: on the meta device, begun, and, if it reads hidden states, after a first ``observe``.
        vocab_size: of the target.
        forks: of the draft, for other texts beside the first one.
    """
    trees = Tree.several(1 + len(forks), policy.capacity, META)
    sampler = Sampler(sampling, vocab_size, META)

    def perturb(logits: Tensor) -> Tensor:
        return sampler.perturb(fit_vocabulary(logits, vocab_size), trees[0].levels + 1)

    def levels() -> None:
        frontiers = [tree.plant(token_ids(1)) for tree in trees]
        noise = None if sampling.greedy else perturb
        for _ in range(min(LEVELS, policy.max_depth)):
            if not forks:
                frontiers = [draft.extend(trees[0], frontiers[0], policy, noise)]
                continue
            together = zip((draft, *forks), trees, frontiers, strict=True)
            frontiers = draft.extend_together([NextLevel(*own, noise) for own in together], policy)

    return peak_bytes(levels)


def shortened(config: PretrainedConfig) -> PretrainedConfig:
    """``config`` with the first :data:`LAYERS` decoder layers."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[: short.num_hidden_layers]
    return short


_TARGETS: dict[tuple[str, int, bool, bool], TargetTrace] = {}


def target_trace(config: PretrainedConfig, itemsize: int, *, bitwise: bool, sliced: bool = False) -> TargetTrace:
    """The traces of a target's configuration, which every plan in this process shares."""
    key = (config.to_json_string(use_diff=False), itemsize, bitwise, sliced)
    if key not in _TARGETS:
        _TARGETS[key] = TargetTrace(config, itemsize, bitwise=bitwise, sliced=sliced)
    return _TARGETS[key]
