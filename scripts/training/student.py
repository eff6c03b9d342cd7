"""Distilling a tiny causal language model with its target's tokenizer (forward KL, temperature 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from training.corpus import move
from training.losses import soft_cross_entropy
from training.measures import chain_tau, greedy_ranks


def build_student(
    target: PreTrainedModel,
    counts: Tensor,
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    seed: int,
) -> LlamaForCausalLM:
    """A Llama model whose tied embedding is the target's, projected to its main directions.

    Args:
        counts: int64 [vocabulary], occurrences in the text: they weight the main directions.
        hidden, layers, heads, kv_heads, intermediate: its shape.
        seed: of the other weights.
    """
    config = LlamaConfig(
        vocab_size=target.config.vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=target.config.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=target.config.bos_token_id,
        eos_token_id=target.config.eos_token_id,
        pad_token_id=target.config.pad_token_id,
    )
    device = target.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = LlamaForCausalLM(config).float()
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(projected(target.get_input_embeddings().weight, counts, hidden))
    return student.to(device).train()


def projected(table: Tensor, counts: Tensor, hidden: int, std: float = 0.05) -> Tensor:
    """[vocabulary, H] -> [vocabulary, hidden] with standard deviation ``std``, on the CPU in float32."""
    wide = table.detach().double().cpu()
    weights = (counts.double().cpu() + 1).sqrt()
    moments = (wide * weights[:, None]).T @ wide
    main = torch.linalg.eigh(moments).eigenvectors[:, -hidden:].flip(1)
    # eigh leaves signs open; fixing them makes the start the same everywhere.
    main = main * main.gather(0, main.abs().argmax(dim=0, keepdim=True)).sign()
    narrow = wide @ main
    return (narrow * (std / narrow.std())).float()


@dataclass
class StudentLesson:
    """A small model learns its target's next-token distributions.

    Attributes:
        target: in eval mode; its forward pass is part of every step.
        module: the student, float32.
        dtype: of the student's arithmetic.
    """

    target: PreTrainedModel
    module: LlamaForCausalLM
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.head_weight = self.target.get_output_embeddings().weight

    def _states(self, ids: Tensor) -> Tensor:
        bf16 = self.dtype is torch.bfloat16
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            return self.module.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _teacher(self, ids: Tensor) -> Tensor:
        return self.target.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def loss(self, ids: Tensor, learn: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`training.trainer.Lesson`."""
        # Rows are chosen on the CPU, so that the host does not wait for the device.
        batch, row = (move(index, self.head_weight.device) for index in learn[:, 1:].nonzero(as_tuple=True))
        ids = move(ids, self.head_weight.device)
        true = self._teacher(ids)[batch, row]
        mine = self._states(ids)[batch, row][None]
        weight = self.module.get_output_embeddings().weight
        cross = soft_cross_entropy(mine, weight, true, self.head_weight, self.dtype)
        return cross.loss, {"top1": cross.right.float().mean()}

    @torch.inference_mode()
    def evaluate(self, ids: Tensor, learn: Tensor, depth: int = 8, rows: int = 32) -> dict[str, float]:
        """Share of positions where the target's greedy token is among the student's first 1, 3 and 10; tokens per pass
        of a single chain of ``depth`` tokens."""
        ranks = []
        weight = self.module.get_output_embeddings().weight
        for start in range(0, len(ids), rows):
            part = move(ids[start : start + rows], self.head_weight.device)
            mine, true = self._states(part)[:, :-1], self._teacher(part)[:, :-1]
            ranks.append(greedy_ranks(mine.to(self.dtype), weight, true, self.head_weight))
        rank, judged = torch.cat(ranks).cpu(), learn[:, 1:]
        figures = {f"top{k}": float((rank[judged] < k).float().mean()) for k in (1, 3, 10)}
        figures["chain_tau"] = chain_tau((rank == 0).expand(depth, -1, -1), judged)
        return figures
