"""Training of an EAGLE-2 or EAGLE-3 head against its target, fed its own features.

Row i of a text has the embedding of token i+1 and the target's feature of token i. The head predicts the
feature of token i+1, and an LM head turns it into the distribution of token i+2. While drafting,
deeper levels get predicted features instead of the target's. So the head is unrolled for several *passes*
(harmonized context, HASS, arXiv 2408.15766; training-time test, EAGLE-3, arXiv 2503.01840): pass p feeds row i the
prediction of pass p-1 in row i-1, and attends as a draft at that depth: to the keys of true features up to row i-p, to
one key of each pass in between, and to its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.decoding.hidden import Hidden, HiddenRequest
from subspec.drafts.eagle_head import EagleHead, EagleShape
from training.corpus import move
from training.losses import SampledVocabulary, soft_cross_entropy
from training.measures import chain_tau, greedy_ranks


def shape_for(
    model: PreTrainedModel,
    kind: type[EagleShape] = EagleShape,
    *,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    **own: Any,
) -> EagleShape:
    """The shape of a target's head: by default the target's attention shape.

    Args:
        own: the fields that the kind adds.
    """
    config = model.config
    return kind(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads or config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=intermediate or config.intermediate_size,
        biases=frozenset({"fc.bias"} if kind is EagleShape else ()),
        eps=config.rms_norm_eps,
        rope=dict(config.rope_parameters),
        max_positions=config.max_position_embeddings,
        **own,
    )


@torch.no_grad()
def target_states(model: PreTrainedModel, ids: Tensor, wants: HiddenRequest) -> tuple[Tensor, Tensor]:
    """The target's states after its final norm [rows, length, H], and those in ``wants`` [rows, length, width]."""
    out = model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=bool(wants.layers))
    layers = {layer: out.hidden_states[layer + 1] for layer in wants.layers}
    wanted = wants.select(Hidden(out.last_hidden_state, layers))
    assert wanted is not None
    return out.last_hidden_state, wanted


@torch.no_grad()
def balance_inputs(head: EagleHead, inputs: Sequence[Tensor]) -> None:
    """Scale the initial ``fc`` so that its inputs contribute equally, together with variance 1.

    Args:
        inputs: samples [n, width] each of what is concatenated.
    """
    for part, values in zip(head.fc.weight.chunk(len(inputs), dim=1), inputs, strict=True):
        scale = (len(inputs) * part.shape[1] * values.float().square().mean()).rsqrt()
        part.mul_(scale / part.square().mean().sqrt())


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
        features: [batch, n, hidden], the target's (:meth:`EagleHead.fuse`), of token i.
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
        residual, x = head.combine(embeddings, fed.to(embeddings.dtype))
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
        x = residual + attention.o_proj(attended.transpose(1, 2).flatten(2))
        out = x + layer.mlp(layer.post_attention_layernorm(x))
        predicted.append(out)
        fed = torch.cat([features[:, :1].to(out.dtype), out[:, :-1]], dim=1)
    return predicted


@dataclass
class HeadLesson:
    """A draft head and the target that it learns from.

    Attributes:
        target: in eval mode; its forward pass is part of every step.
        module: the head, float32.
        vocabulary: of the losses; None: every id.
        dtype: of the head's arithmetic.
    """

    target: PreTrainedModel
    module: EagleHead
    vocabulary: SampledVocabulary | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.table = self.target.get_input_embeddings()
        self.head_weight = self.target.get_output_embeddings().weight
        self.wants = self.module.shape.wants(self.target.config)

    def arithmetic(self) -> torch.autocast:
        """The context of the head's forward pass."""
        return torch.autocast(self.head_weight.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)


@dataclass
class EagleLesson(HeadLesson):
    """An EAGLE-2 or EAGLE-3 head learns its target's next distributions.

    Attributes:
        passes: unrolled per step.
        decay: weight of each further pass against the one before.
        regression: weight of the smooth L1 distance of features beside the cross-entropy.
        noise: half-width of the uniform noise on the target's features.
    """

    passes: int = 3
    decay: float = 0.9
    regression: float = 0.1
    noise: float = 0.0

    def _predict(self, ids: Tensor, states: Tensor, passes: int, noise: Tensor | None = None) -> list[Tensor]:
        with self.arithmetic():
            embeddings = self.table(ids[:, 1:-1]).to(self.dtype)
            features = self.module.fuse(states[:, :-2].to(self.dtype))
            return unroll(self.module, embeddings, features, passes, noise)

    def _own_ids(self) -> Tensor | None:
        """The target's ids in the head's own vocabulary; None: it uses the target's LM head."""
        d2t = self.module.d2t
        return None if d2t is None else d2t + torch.arange(len(d2t), device=d2t.device)

    def _weights(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """The LM heads of the draft and of the target for the ids of a loss, and the shift of their logits."""
        if (own := self._own_ids()) is not None:
            return self.module.lm_head.weight, self.head_weight[own], None
        if self.vocabulary is None:
            return self.head_weight, self.head_weight, None
        ids, shift = self.vocabulary.draw(generator)
        weight = self.head_weight[ids]
        return weight, weight, shift

    def loss(self, ids: Tensor, learn: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`training.trainer.Lesson`."""
        # Row i is judged by token i+2; the first rows have no input for the later passes. Rows are chosen on the
        # CPU, so that the host does not wait for the device.
        judged = learn[:, 2:].clone()
        judged[:, : self.passes - 1] = False
        batch, row = (move(index, self.head_weight.device) for index in judged.nonzero(as_tuple=True))
        ids = move(ids, self.head_weight.device)
        final, states = target_states(self.target, ids, self.wants)
        noise = None
        if self.noise:
            noise = torch.empty_like(self.table(ids[:, :-2]), dtype=self.dtype)
            noise.uniform_(-self.noise, self.noise, generator=generator)
        predicted = self._predict(ids, states, self.passes, noise)
        mine = torch.stack([self.module.finish(out[batch, row]) for out in predicted])
        true = final[batch, row + 1]
        mine_weight, true_weight, shift = self._weights(generator)
        decays = self.decay ** torch.arange(self.passes, device=ids.device)
        weights = decays[:, None].expand(mine.shape[:2])
        cross = soft_cross_entropy(mine, mine_weight, true, true_weight, self.dtype, weights, shift)
        loss, figures = cross.loss, {}
        if self.regression:
            distance = torch.stack([nn.functional.smooth_l1_loss(out.float(), true.float()) for out in mine])
            loss = loss + self.regression * (distance * decays).sum() / decays.sum()
            figures["distance"] = distance.detach().mean()
        for index, right in enumerate(cross.right):
            figures[f"top1@{index + 1}"] = right.float().mean()
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
            final, states = target_states(self.target, part, self.wants)
            outs = [self.module.finish(out) for out in self._predict(part, states, depth)]
            own, true = self._own_ids(), (final[:, 1:-1], self.head_weight)
            weight = self.head_weight if own is None else self.module.lm_head.weight
            ranks.append(torch.stack([greedy_ranks(out, weight, *true, own) for out in outs]))
            judged.append(mask)
        rank, mask = torch.cat(ranks, dim=1).cpu(), torch.cat(judged)
        figures = {}
        for level in (1, 3):
            at = rank[min(level, depth) - 1][mask]
            for k in (1, 3, 10):
                figures[f"top{k}@{level}"] = float((at < k).float().mean())
        return {**figures, "chain_tau": chain_tau(rank == 0, mask)}
