"""A causal language model run on token batches: explicit positions, visibility and KV rows.

Every target runs the same loop over decoder layers, whether its layers are on one device, streamed, or placed by
accelerate. The layers compute with transformers' own modules, or in batch-invariant arithmetic
(:mod:`subspec.decoding.bitwise`). A draft that consists of modules runs through the same loop.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.decoding.batch import JointBatch, TokenBatch
from subspec.decoding.bitwise import BitwiseArithmetic, BitwisePass
from subspec.decoding.cpu_pass import MOST_ROWS, ExactCpu, ExactCpuPass, kernels_for
from subspec.decoding.hidden import Hidden
from subspec.decoding.kv_cache import KVCache

FEW_ROWS = 8
"""On a CPU without our kernels the LM head takes half the time for 2 to 8 rows if rows and outputs are exchanged:
matrix libraries rearrange the weight for few rows as for many (``experiments/cpu``)."""


@functools.cache
def cache_argument(layer: type[nn.Module]) -> str:
    """Name of the KV cache among a decoder layer's arguments, which transformers 5.24 changed."""
    return "cache" if "cache" in inspect.signature(layer.forward).parameters else "past_key_values"


class ModulePass:
    """One pass by the model's own modules.

    Args:
        embedded: [n, hidden], embedding rows of the batch's tokens.
        mask: additive, [1, 1, n, rows of the view].
    """

    def __init__(self, batch: TokenBatch | JointBatch, embedded: Tensor, mask: Tensor, rotary: nn.Module) -> None:
        positions = batch.positions.unsqueeze(0)
        self._hidden = embedded.unsqueeze(0)
        self._arguments: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": rotary(self._hidden, positions),
            "use_cache": True,
        }
        self._view = batch.view

    def layer(self, layer: nn.Module) -> None:
        """Run a decoder layer; its keys and values go to the cache rows of its ``layer_idx``."""
        view = {cache_argument(type(layer)): self._view}
        self._hidden = layer(self._hidden, **view, **self._arguments)

    def hidden(self) -> Tensor:
        """The residual stream [n, hidden] behind the last layer that was run."""
        return self._hidden[0]

    def finish(self, norm: nn.Module) -> Tensor:
        """Hidden states [n, hidden] after the final norm."""
        return norm(self._hidden)[0]


class TargetModel:
    """Runs a causal language model that is whole on one device; the interface of all targets.

    Args:
        model: a transformers causal LM of the Llama, Qwen2, Qwen3 or Mistral family, in eval mode.

    Attributes:
        bitwise: the batch-invariant arithmetic of passes and logits; None: the model's own modules.
        cpu_reason: why passes over few rows do not run by our kernels for CPUs; empty if they do.
        whole: whether all layers stay where they are.
        sliced: whether batch-invariant passes ask for the MLP's matrices slice by slice.
    """

    whole = True
    sliced = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.bitwise: BitwiseArithmetic | None = None
        self.base = model.get_decoder()
        self.head = model.get_output_embeddings()
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocab_size: int = self.head.out_features
        embedding = model.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device
        plain_head = type(self.head) is nn.Linear and self.head.bias is None
        self._exchanges = plain_head and self.device.type == "cpu" and self.dtype is torch.float32
        kernels = kernels_for(model)
        self.cpu_reason = kernels if isinstance(kernels, str) else ""
        self._cpu = None if isinstance(kernels, str) else ExactCpu(model, kernels)
        # cuDNN's attention builds a plan for every new number of keys, tens of milliseconds on the host; the number of
        # keys grows with every pass over a tree, so each pass would pay (seen on an H200, see experiments/gpu).
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def captured(self) -> bool:
        """Whether passes over trees are captured as CUDA graphs, which takes fixed addresses and launches."""
        return self.whole and self.bitwise is not None

    def new_cache(self, *, max_length: int, draft_rows: int, target_rows: int, texts: int = 1) -> KVCache:
        """An empty KV cache of this model's shape."""
        return KVCache(
            layers=self.num_layers,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_length=max_length,
            draft_rows=draft_rows,
            target_rows=target_rows,
            dtype=self.dtype,
            device=self.device,
            texts=texts,
        )

    def forward(self, batch: TokenBatch | JointBatch, *, hidden_of: Sequence[int] = ()) -> Hidden:
        """Run the tokens of ``batch``, of one text or of several.

        Args:
            hidden_of: decoder layers whose residual streams are returned besides the final hidden states.
        """
        self.begin_pass()
        run: BitwisePass | ModulePass | ExactCpuPass
        if self.bitwise is not None:
            run = BitwisePass(self.bitwise, batch, self.embed(batch.tokens))
        elif self._cpu is not None and isinstance(batch, TokenBatch) and batch.tokens.numel() <= MOST_ROWS:
            run = ExactCpuPass(self._cpu, batch, self.embed(batch.tokens))
        else:
            mask = self.additive_mask(batch.visible())
            run = ModulePass(batch, self.embed(batch.tokens), mask, self.base.rotary_emb)
        kept = {}
        for index in range(len(self.base.layers)):
            with self.layer(index) as layer:
                run.layer(layer)
            if index in hidden_of:
                kept[index] = run.hidden().to(self.device)
        return Hidden(run.finish(self.base.norm).to(self.device), kept)

    def append(self, tokens: Tensor, cache: KVCache, *, hidden_of: Sequence[int] = ()) -> Hidden:
        """Run ``tokens`` (int64 [c]) causally behind the cache's prefix and commit them."""
        batch = TokenBatch.chain(tokens, cache.length, cache.target_view(tokens.numel()))
        hidden = self.forward(batch, hidden_of=hidden_of)
        cache.extend(tokens.numel())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head: [n, hidden] -> [n, vocabulary]."""
        if self._cpu is not None and hidden.shape[0] <= MOST_ROWS:
            return self._cpu.logits(self.head.weight, hidden)
        if self._exchanges and 1 < hidden.shape[0] <= FEW_ROWS:
            return torch.mm(self.head.weight, hidden.t()).t().contiguous()
        if self.bitwise is None:
            return self.head(hidden).to(self.device)
        out = torch.empty(hidden.shape[0], self.vocab_size, dtype=hidden.dtype, device=hidden.device)
        return self.bitwise.linear("head", hidden, self.head.weight, out)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows of ``tokens`` [n] -> [n, hidden]."""
        return self.model.get_input_embeddings()(tokens)

    def additive_mask(self, visible: Tensor) -> Tensor:
        """bool [n, rows] -> [1, 1, n, rows] in the model's dtype: 0 where visible, else the lowest number.

        A boolean 4-D mask would be silently wrong with transformers' eager attention.
        """
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[None, None]

    def begin_pass(self) -> None:
        """Prepare a pass, which asks for the layers in order."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A module that holds the parameters of decoder layer ``index`` while the context is entered."""
        yield self.base.layers[index]

    def take_transfer(self) -> tuple[int, float]:
        """(weight bytes, seconds of the link) since the last call; zeros unless layers are streamed."""
        return 0, 0.0

    def facts(self) -> dict[str, Any]:
        """Facts about the placement of the weights, and on a CPU about the kernels, for the run's record."""
        return {} if self.device.type != "cpu" else {"cpu_kernels": self.cpu_reason or "own"}
