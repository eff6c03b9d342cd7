"""The target's choice of the next token: argmax, or a sample whose randomness belongs to the *position*.

Sampling uses the Gumbel-max trick: the argmax of log-probability + Gumbel noise is an exact sample. The noise is
a function of (seed, position) alone, so every tree node of one depth shares it. That stays exact: only one node
per depth ends up on the emitted path, and whether it does depends on noise of earlier positions only. It has two
benefits over independent noise per node: one noise row per level instead of one per node, and the sampled text
is token for token what plain decoding samples with the same seed, so that the losslessness audit covers sampling.

Since the noise is known before the target runs, the draft ranks its candidates with the same noise added: it then
predicts the sample itself instead of the distribution, and acceptance comes close to that of greedy decoding. The
tree decides only how far one pass gets, never which token is emitted, so this costs no exactness.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.arguments import ArgumentError, finite_number, whole_number

MIN_TEMPERATURE = 1e-6
"""Below it logits / temperature overflow."""


MASS_UNITS = 2.0**32
"""Of the likeliest token's probability mass: sums over any vocabulary stay whole numbers that a float64 holds."""

PIECE_ROWS = 32
"""Rows that are sampled at a time: float32 copies and sorted rows of a whole tree's logits would take gigabytes."""


@dataclass(frozen=True)
class Sampling:
    """Parameters of the target's distribution. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off.

    Raises:
        ArgumentError: with the parameter that is out of range or no number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature = finite_number("temperature", self.temperature)
        whole_number("top_k", self.top_k, least=0)
        top_p = finite_number("top_p", self.top_p)
        if temperature < 0:
            raise ArgumentError(f"temperature={temperature} must not be negative (0: greedy)")
        if 0 < temperature < MIN_TEMPERATURE:
            raise ArgumentError(
                f"temperature={temperature} is too small for float32: it must be 0 (greedy) or at least "
                f"{MIN_TEMPERATURE}"
            )
        if not 0 < top_p <= 1:
            raise ArgumentError(f"top_p={top_p} must lie in (0, 1] (1: off)")

    @property
    def greedy(self) -> bool:
        """Whether the choice is the plain argmax."""
        return self.temperature == 0


def keep_mask(logits: Tensor, sampling: Sampling, slack: float = 0.0) -> Tensor:
    """Which tokens the top-k and top-p filters keep, bool like ``logits`` ([n, vocabulary], temperature applied).

    ``slack`` (in logits) widens the kept set when positive and narrows it when negative: the audit asks with
    both signs to tell a token on the filter's edge from one well outside.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        keep &= logits >= kth - slack
    if sampling.top_p < 1:
        ordered, order = logits.masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True, stable=True)
        # Whole numbers: their sums have no order, so a row's filter does not depend on the rows beside it.
        highest = ordered[..., :1].clone()
        mass = ordered.sub_(highest).exp_().double().mul_(MASS_UNITS).long()
        before = mass.cumsum(dim=-1)
        total = before[..., -1:].double()
        before = before.sub_(mass).double().div_(total)
        # A token is kept when the tokens before it hold less than top_p; the one that crosses it is kept too.
        # A shift of the logits by `slack` changes a cumulative probability c by about 2 * slack * c * (1 - c).
        edge = 2 * slack * before * (1 - before) + (slack > 0) * 1e-6 - (slack < 0) * 1e-6
        inside = before < sampling.top_p + edge
        inside[..., 0] = True
        keep &= torch.zeros_like(keep).scatter(-1, order, inside)
    return keep


class PositionNoise:
    """Gumbel noise rows that depend on (seed, position) only; rows are kept while they may be needed again."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._generator = None if device.type == "meta" else torch.Generator(device=device)
        self._seed = 0
        self._rows: dict[int, Tensor] = {}

    def reseed(self, seed: int) -> None:
        """Start a new text."""
        self._seed = seed
        self._rows.clear()

    def forget_before(self, position: int) -> None:
        """Drop rows of positions already decided."""
        for known in [p for p in self._rows if p < position]:
            del self._rows[known]

    def rows(self, start: int, count: int) -> Tensor:
        """Noise of the tokens at positions ``start`` .. ``start + count - 1``: float32 [count, vocabulary]."""
        return torch.stack([self._row(position) for position in range(start, start + count)])

    def _row(self, position: int) -> Tensor:
        if position not in self._rows:
            row = torch.empty(self.vocab_size, dtype=torch.float32, device=self.device)
            if self._generator is not None:
                # A digest rather than seed + position: neighbouring seeds must not share rows.
                digest = hashlib.blake2b(f"{self._seed}/{position}".encode(), digest_size=7).digest()
                self._generator.manual_seed(int.from_bytes(digest, "little"))
                row.exponential_(generator=self._generator)
            self._rows[position] = -row.clamp_min_(torch.finfo(torch.float32).tiny).log_()
        return self._rows[position]


class Sampler:
    """Chooses the target's next token for rows of logits."""

    def __init__(self, sampling: Sampling, vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self.noise = PositionNoise(vocab_size, device)

    def reseed(self, seed: int) -> None:
        """Start a new text."""
        self.noise.reseed(seed)

    def scores(self, logits: Tensor, noise: Tensor) -> Tensor:
        """The scores whose argmax is chosen, float32 [n, vocabulary]; filtered tokens are -inf."""
        scaled = logits.float() / self.sampling.temperature
        if self.sampling.top_k == 0 and self.sampling.top_p == 1:
            return scaled + noise
        keep = keep_mask(scaled, self.sampling)
        return (scaled + noise).masked_fill_(~keep, -torch.inf)

    def choose(self, logits: Tensor, start: int, offsets: Tensor, span: int) -> Tensor:
        """The token after each row, int64 [n].

        Args:
            logits: [n, vocabulary].
            start: position of the token that follows a row with offset 0.
            offsets: int64 [n], each row's offset (a tree node's depth).
            span: number of distinct offsets, 1 + their largest.
        """
        if self.sampling.greedy:
            return logits.argmax(dim=-1)
        self.noise.forget_before(start - 1)
        noise = self.noise.rows(start, span)
        pieces = zip(logits.split(PIECE_ROWS), offsets.split(PIECE_ROWS), strict=True)
        return torch.cat([self.scores(rows, noise.index_select(0, at)).argmax(dim=-1) for rows, at in pieces])

    def perturb(self, logits: Tensor, position: int) -> Tensor:
        """A draft's logits [f, vocabulary] for the token at ``position``, with the noise the target will use."""
        if self.sampling.greedy:
            return logits
        return self.scores(logits, self.noise.rows(position, 1))
