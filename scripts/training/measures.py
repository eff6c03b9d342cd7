"""Agreement of a draft with its target on given text, without the engine."""

import torch
from torch import Tensor

CHUNK = 4096


def greedy_ranks(
    hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Rank (0: first) that a draft gives to the target's greedy token.

    Args:
        hidden, weight: the draft's last states [..., h] and its LM head [vocabulary, h].
        teacher, teacher_weight: the target's [..., H] and [vocabulary, H].
        ids: int64, the target's ids of a smaller vocabulary of the draft, ascending; None: it has the target's.

    Returns:
        int64 [...]; for a token that the draft does not know, the size of its vocabulary.
    """
    mine, true = hidden.flatten(0, -2), teacher.flatten(0, -2)
    head = weight.to(mine.dtype)
    ranks = []
    for start in range(0, len(mine), CHUNK):
        part = slice(start, start + CHUNK)
        best = (true[part].to(teacher_weight.dtype) @ teacher_weight.T).argmax(dim=-1, keepdim=True)
        logits = mine[part] @ head.T
        if ids is None:
            ranks.append((logits > logits.gather(1, best)).sum(dim=-1))
            continue
        place = torch.searchsorted(ids, best).clamp(max=len(ids) - 1)
        rank = (logits > logits.gather(1, place)).sum(dim=-1)
        ranks.append(torch.where(ids[place[:, 0]] == best[:, 0], rank, len(ids)))
    return torch.cat(ranks).view(hidden.shape[:-1])


def chain_tau(right: Tensor, judged: Tensor) -> float:
    """Tokens per pass of chains drafted from every judged position: 1 + the mean length of their right parts.

    Args:
        right: bool [depth, rows, n]; level d's guess at position i is for the token after position i.
        judged: bool [rows, n]: the positions that count; a chain ends where they end.
    """
    depth, _, n = right.shape
    good = torch.ones_like(judged)
    length = torch.zeros(judged.shape, device=judged.device)
    for level in range(depth):
        # Level d of a chain that starts at i guesses at position i + d.
        at = torch.zeros_like(judged)
        at[:, : n - level] = (right[level] & judged)[:, level:]
        good = good & at
        length += good
    return 1.0 + float(length[judged].mean())
