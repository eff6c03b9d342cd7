"""Training of an EAGLE head against its target (EAGLE, arXiv 2401.15077, section 4.2), fed its own features.

Row i of a text has the embedding of token i+1 and the target's feature of token i. The head predicts the
feature of token i+1, and the target's LM head turns it into the distribution of token i+2. While drafting,
deeper levels get predicted features instead of the target's. So the head is unrolled for several *passes*
(harmonized context, HASS, arXiv 2408.15766): pass p feeds row i the prediction of pass p-1 in row i-1, and
attends as a draft at that depth: to the keys of true features up to row i-p, to one key of each pass in
between, and to its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.drafts.eagle_head import EagleHead, EagleShape
from training.corpus import move
from training.losses import soft_cross_entropy
from training.measures import chain_tau, greedy_ranks


def shape_for(model: PreTrainedModel, *, kv_heads: int | None, intermediate: int | None) -> EagleShape:
    """The shape of a target's head: by default the target's attention shape, with a bias at ``fc``."""
    config = model.config
    return EagleShape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads or config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=intermediate or config.intermediate_size,
        biases=frozenset({"fc.bias"}),
        eps=config.rms_norm_eps,
        rope=dict(config.rope_parameters),
        max_positions=config.max_position_embeddings,
    )


@torch.no_grad()
def balance_inputs(head: EagleHead, embedding: Tensor, features: Tensor) -> None:
    """Scale the initial ``fc`` so that embedding and feature contribute equally, together with variance 1.

    Args:
        embedding: the table [vocabulary, hidden]; features: some of the target's, [n, hidden].
    """
    for half, values in zip(head.fc.weight.chunk(2, dim=1), (embedding, features), strict=True):
        scale = (2 * half.shape[1] * values.float().square().mean()).rsqrt()
        half.mul_(scale / half.square().mean().sqrt())


def pass_mask(rows: int, number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [rows, number * rows] over the keys of passes 1 to ``number`` for a query of the last one."""
    row = torch.arange(rows, device=device)
    behind = row[:, None] - row[None, :]
    parts = [behind >= number - 1] + [behind == number - p for p in range(2, number + 1)]
    seen = torch.cat(parts, dim=1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def unroll(
    head: EagleHead, embeddings: Tensor, features: Tensor, passes: int, noise: Tensor | None = None
) -> list[Tensor]:
    """Predicted features of every pass.

    Args:
        embeddings: [batch, n, hidden], of token i+1 in row i.
        features: [batch, n, hidden], the target's, of token i.
        passes: their number; pass p is meaningful from row p-1 on.
        noise: added to ``features`` in the first pass.

    Returns:
        [batch, n, hidden] each.
    """
    layer, rows, device = head.layers[0], embeddings.shape[1], embeddings.device
    attention = layer.self_attn
    groups = attention.num_key_value_groups
    positions = torch.arange(rows, device=device)[None]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    predicted: list[Tensor] = []
    fed = features if noise is None else features + noise
    for number in range(1, passes + 1):
        x = head.fc(torch.cat([embeddings, fed.to(embeddings.dtype)], dim=-1))
        cos, sin = head.rotary(x, positions)
        query, key, value = attention.project(x, cos, sin)
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))
        if number == 1:
            attended = nn.functional.scaled_dot_product_attention(query, keys[0], values[0], is_causal=True)
        else:
            # Rows before number-1 attend to no key of the first pass, but always to their own.
            attended = nn.functional.scaled_dot_product_attention(
                query,
                torch.cat(keys, dim=2),
                torch.cat(values, dim=2),
                attn_mask=pass_mask(rows, number, query.dtype, device)[None, None],
            )
        x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
        out = x + layer.mlp(layer.post_attention_layernorm(x))
        predicted.append(out)
        fed = torch.cat([features[:, :1].to(out.dtype), out[:, :-1]], dim=1)
    return predicted


@dataclass
class EagleLesson:
    """An EAGLE head learns its target's next distributions.

    Attributes:
        target: in eval mode; its forward pass is part of every step.
        module: the head, float32.
        passes: unrolled per step.
        decay: weight of each further pass against the one before.
        regression: weight of the smooth L1 distance of features beside the cross-entropy.
        noise: half-width of the uniform noise on the target's features.
        dtype: of the head's arithmetic.
    """

    target: PreTrainedModel
    module: EagleHead
    passes: int = 3
    decay: float = 0.9
    regression: float = 0.1
    noise: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.table = self.target.get_input_embeddings()
        self.head_weight = self.target.get_output_embeddings().weight

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """The target's hidden states after its final norm, [rows, length, hidden]."""
        return self.target.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def _predict(
        self, ids: Tensor, features: Tensor, passes: int, noise: Tensor | None = None
    ) -> list[Tensor]:
        bf16 = self.dtype is torch.bfloat16
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            embeddings = self.table(ids[:, 1:-1]).to(self.dtype)
            return unroll(self.module, embeddings, features[:, :-2].to(self.dtype), passes, noise)

    def loss(
        self, ids: Tensor, learn: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`training.trainer.Lesson`."""
        # Row i is judged by token i+2; the first rows have no input for the later passes. Rows are chosen on the
        # CPU, so that the host does not wait for the device.
        judged = learn[:, 2:].clone()
        judged[:, : self.passes - 1] = False
        batch, row = (move(index, self.head_weight.device) for index in judged.nonzero(as_tuple=True))
        ids = move(ids, self.head_weight.device)
        features = self.features(ids)
        noise = None
        if self.noise:
            noise = torch.empty_like(features[:, :-2], dtype=self.dtype)
            noise.uniform_(-self.noise, self.noise, generator=generator)
        predicted = self._predict(ids, features, self.passes, noise)
        mine = torch.stack([out[batch, row] for out in predicted])
        true = features[batch, row + 1]
        cross, right = soft_cross_entropy(mine, self.head_weight, true, self.head_weight, self.dtype)
        distance = torch.stack([nn.functional.smooth_l1_loss(out.float(), true.float()) for out in mine])
        weights = self.decay ** torch.arange(self.passes, device=ids.device)
        loss = ((cross + self.regression * distance) * weights).sum() / weights.sum()
        figures = {"distance": distance.detach().mean()}
        for index in range(self.passes):
            figures[f"top1@{index + 1}"] = right[index]
        return loss, figures

    @torch.inference_mode()
    def evaluate(self, ids: Tensor, learn: Tensor, depth: int = 6, rows: int = 32) -> dict[str, float]:
        """Share of positions where the target's greedy token is among the head's first 1, 3 and 10, at draft depths 1
        and 3; tokens per pass of a single chain of ``depth`` tokens."""
        ranks, judged = [], []
        for start in range(0, len(ids), rows):
            part = move(ids[start : start + rows], self.head_weight.device)
            mask = learn[start : start + rows, 2:].clone()
            mask[:, : depth - 1] = False
            features = self.features(part)
            predicted = self._predict(part, features, depth)
            ranks.append(
                torch.stack(
                    [
                        greedy_ranks(out, self.head_weight, features[:, 1:-1], self.head_weight)
                        for out in predicted
                    ]
                )
            )
            judged.append(mask)
        rank, mask = torch.cat(ranks, dim=1).cpu(), torch.cat(judged)
        figures = {}
        for level in (1, 3):
            at = rank[min(level, depth) - 1][mask]
            for k in (1, 3, 10):
                figures[f"top{k}@{level}"] = float((at < k).float().mean())
        return {**figures, "chain_tau": chain_tau(rank == 0, mask)}
