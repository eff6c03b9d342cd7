"""A target writes whole conversations, thousands of rows in one batch.

Every row starts at position 0 and is fed one token per step: a *given* one from the chat template or a prompt, else the
target's choice. So rows with prompts of different lengths need neither padding nor a mask, and a row whose answer has
ended continues with the next turn. The target plays both sides: as the user it samples (the idea of Magpie, arXiv
2406.08464), as the assistant it answers greedily or at the row's temperature.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspec.errors import SubspecError

_MARKS = ("\u2402first\u2402", "\u2402answer\u2402", "\u2402second\u2402")


@dataclass(frozen=True)
class ChatFrame:
    """The token ids that a chat template puts around the turns of a conversation.

    Attributes:
        opening: everything before the first user's words.
        to_assistant, to_user: ids after ``end`` when that side's turn begins.
        end: the id that ends a turn.
        forbidden: other special ids, which are not allowed in a user's turn.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    end: int
    forbidden: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatFrame":
        """Read off the tokenizer's template.

        Raises:
            SubspecError: there is no template, or one whose turns do not end with a special token.
        """
        if not tokenizer.chat_template:
            raise SubspecError("--target: its tokenizer has no chat template, so it cannot write conversations")
        roles = ("user", "assistant", "user")
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)],
            add_generation_prompt=True,
            tokenize=False,
        )
        opening, rest = text.split(_MARKS[0])
        to_assistant, rest = rest.split(_MARKS[1])
        to_user, _ = rest.split(_MARKS[2])

        def ids(part: str) -> list[int]:
            return list(tokenizer(part, add_special_tokens=False)["input_ids"])

        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        answer, question = ids(to_assistant), ids(to_user)
        if not answer or not question or answer[0] != question[0] or answer[0] not in special:
            raise SubspecError(
                "--target: the turns of its chat template do not end with one special token; "
                "text cannot be written with it"
            )
        end = answer[0]
        return cls(tuple(ids(opening)), tuple(answer[1:]), tuple(question[1:]), end, tuple(sorted(special - {end})))


@dataclass(frozen=True)
class Start:
    """The start of a row: given ids, and whether the assistant's turn follows."""

    ids: tuple[int, ...]
    assistant: bool


class BatchCache:
    """Keys and values of rows of equal length, as ``past_key_values`` of transformers layers."""

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        config = model.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = model.get_input_embeddings().weight
        shape = (config.num_hidden_layers, 2, rows, heads, length, dim)
        self.rows = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store one token's rows [rows, heads, 1, dim]; all keys and values so far."""
        keys, values = self.rows[layer_idx]
        keys[:, :, self.length] = key[:, :, 0]
        values[:, :, self.length] = value[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored so far."""
        return self.length


class ChatWriter:
    """Writes conversations with a target.

    Args:
        model: causal LM in eval mode.
        frame: of its chat template.
        rows, length: conversations side by side, and tokens of each.
        max_answer, max_question: most tokens of a turn; a longer one is ended by force, and that end is not learnt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        frame: ChatFrame,
        *,
        rows: int,
        length: int,
        max_answer: int = 256,
        max_question: int = 96,
    ) -> None:
        self.model, self.frame = model, frame
        self.base, self.head = model.get_decoder(), model.get_output_embeddings()
        self.device = self.head.weight.device
        self.cache = BatchCache(model, rows, length)
        self.count, self.length = rows, length
        self.limits = (max_question, max_answer)

    @torch.inference_mode()
    def write(
        self,
        starts: Sequence[Start],
        temperatures: Sequence[float],
        seed: int,
        tick: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One conversation per row.

        Args:
            starts: how each of the rows begins; shorter than ``length``.
            temperatures: of each row's answers; 0 is greedy.
            seed: of the samples.
            tick: called with the number of finished steps, every 32 of them.

        Returns:
            ids int64 [rows, length], and bool [rows, length]: the target chose them as the assistant.
        """
        if not len(starts) == len(temperatures) == self.count:
            raise ValueError(f"{len(starts)} starts, {len(temperatures)} temperatures for {self.count} rows")
        device, frame = self.device, self.frame
        generator = torch.Generator(device).manual_seed(seed)
        turns = self._padded([frame.to_assistant, frame.to_user], max(len(start.ids) for start in starts))
        given = self._padded([start.ids for start in starts], turns.shape[1])
        sizes = torch.tensor([len(frame.to_assistant), len(frame.to_user)], device=device)
        size = torch.tensor([len(start.ids) for start in starts], device=device)
        if int(size.min()) < 1 or int(size.max()) >= self.length:
            raise ValueError(f"a start needs 1 to {self.length - 1} tokens, one has {int(size.max())}")
        assistant = torch.tensor([start.assistant for start in starts], device=device)
        warmth = torch.tensor(list(temperatures), dtype=torch.float32, device=device)
        forbidden = torch.tensor(frame.forbidden, dtype=torch.int64, device=device)
        most = torch.tensor(self.limits, device=device)
        at = torch.zeros_like(size)
        spoken = torch.zeros_like(size)
        chosen = torch.zeros_like(size)
        ids = torch.zeros(self.count, self.length, dtype=torch.int64, device=device)
        learn = torch.zeros(self.count, self.length, dtype=torch.bool, device=device)
        self.cache.length = 0
        for step in range(self.length):
            forced = at < size
            cut = ~forced & (spoken >= most[assistant.long()])
            token = torch.where(forced, given.gather(1, at.clamp(max=given.shape[1] - 1)[:, None])[:, 0], chosen)
            token = torch.where(cut, frame.end, token)
            ids[:, step] = token
            learn[:, step] = assistant & ~forced & ~cut
            ended = ~forced & (token == frame.end)
            spoken = torch.where(forced | ended, 0, spoken + 1)
            given = torch.where(ended[:, None], turns[assistant.long()], given)
            size = torch.where(ended, sizes[assistant.long()], size)
            at = torch.where(ended, 0, at + 1)
            assistant = assistant ^ ended
            if step + 1 < self.length:
                logits = self._forward(token, step).float()
                asked = logits.index_select(1, forbidden).masked_fill(~assistant[:, None], -torch.inf)
                logits.index_copy_(1, forbidden, asked)
                scale = torch.where(assistant, warmth, 1.0)
                # argmax(logits / T + Gumbel noise) is a sample; scaled by T it is greedy at T = 0.
                noise = torch.empty_like(logits).exponential_(generator=generator)
                noise = noise.clamp_(min=1e-30).log_().mul_(scale[:, None])
                chosen = logits.sub_(noise).argmax(dim=-1)
            if tick is not None and (step + 1) % 32 == 0:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                tick(step + 1)
        return ids, learn

    def _padded(self, rows: Sequence[Sequence[int]], least: int) -> Tensor:
        width = max(least, *(len(row) for row in rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)

    def _forward(self, token: Tensor, position: int) -> Tensor:
        """Logits [rows, vocabulary] after ``token`` int64 [rows] at ``position`` of every row."""
        hidden = self.base.embed_tokens(token[:, None])
        positions = torch.full((1, 1), position, device=self.device)
        rotary = self.base.rotary_emb(hidden, positions)
        for layer in self.base.layers:
            # One query without mask attends to all keys of the cache.
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        self.cache.length += 1
        return self.head(self.base.norm(hidden)[:, 0])
