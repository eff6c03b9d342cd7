"""One decoder model run on explicit tokens, positions, visibility and KV rows.

The thin layer between the engine and Hugging Face modelling code: a 4-D *additive* mask with explicit position
ids passes straight through transformers' mask preparation to scaled-dot-product attention (a boolean 4-D mask
would be silently wrong with eager attention).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.decoding.batch import TokenBatch
from subspec.decoding.bitwise import BitwiseArithmetic
from subspec.decoding.kv_cache import KVCache, KVView


class TargetModel:
    """Runs a causal language model; holds no state of its own.

    Args:
        model: a transformers causal LM of the Llama, Qwen2, Qwen3 or Mistral family, in eval mode.

    Attributes:
        bitwise: batch-invariant arithmetic that :meth:`run` and :meth:`logits` compute with; None: the model's own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.bitwise: BitwiseArithmetic | None = None
        self.base = model.get_decoder()
        self.head = model.get_output_embeddings()
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.vocab_size: int = self.head.out_features
        embedding = model.get_input_embeddings().weight
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = embedding.device
        # cuDNN's attention builds a plan for every new number of keys, tens of milliseconds on the host; the number of
        # keys grows with every pass over a tree, so each pass would pay (seen on an H200, see experiments/gpu).
        torch.backends.cuda.enable_cudnn_sdp(False)

    def new_cache(self, *, max_length: int, draft_rows: int, target_rows: int) -> KVCache:
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
        )

    def run(self, batch: TokenBatch) -> Tensor:
        """Hidden states [n, hidden] after the final norm, in the model's dtype."""
        if self.bitwise is None:
            return self.forward(batch.tokens, batch.positions, batch.visible(), batch.view)
        self.begin_pass()
        state = self.bitwise.begin(batch, self.embed(batch.tokens))
        for index in range(self.num_layers):
            with self.layer(index) as layer:
                self.bitwise.layer(state, index, layer)
        return self.bitwise.finish(state, self.base.norm)

    def begin_pass(self) -> None:
        """Layers are asked for in order from now on."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A module that holds the parameters of decoder layer ``index`` while the context is entered."""
        yield self.base.layers[index]

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, view: KVView) -> Tensor:
        """Hidden states after the final norm, by the model's own modules.

        Args:
            tokens, positions: int64 [n].
            visible: bool [n, rows of ``view``]: which row each token attends to, its own included.
            view: where keys and values go and come from.

        Returns:
            Hidden states [n, hidden] in the model's dtype.
        """
        output = self.base(
            input_ids=tokens.unsqueeze(0),
            attention_mask=self.additive_mask(visible),
            position_ids=positions.unsqueeze(0),
            past_key_values=view,
            use_cache=True,
        )
        return output.last_hidden_state[0]

    def append(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Run ``tokens`` (int64 [c]) causally behind the cache's prefix and commit them; hidden states [c, hidden]."""
        count = tokens.numel()
        hidden = self.run(TokenBatch.chain(tokens, cache.length, cache.target_view(count)))
        cache.extend(count)
        return hidden

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows of ``tokens`` [n] -> [n, hidden]."""
        return self.model.get_input_embeddings()(tokens)

    def additive_mask(self, visible: Tensor) -> Tensor:
        """bool [n, rows] -> [1, 1, n, rows] in the model's dtype: 0 where visible, else the lowest number."""
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[None, None]

    def take_transfer(self) -> tuple[int, float]:
        """(weight bytes, seconds of the link) since the last call; nothing where nothing is streamed."""
        return 0, 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head: [n, hidden] -> [n, vocabulary]."""
        if self.bitwise is None:
            return self.head(hidden)
        out = torch.empty(hidden.shape[0], self.vocab_size, dtype=hidden.dtype, device=hidden.device)
        return self.bitwise.linear("head", hidden, self.head.weight, out)
