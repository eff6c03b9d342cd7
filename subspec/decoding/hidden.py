"""Hidden states of the target: those that a pass returns, and those that a draft asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """Hidden states of one target pass over n tokens, in the model's dtype.

    Attributes:
        final: [n, hidden], after the final norm; the LM head's input.
        layers: [n, hidden] each: the residual stream behind a decoder layer, by layer number.
    """

    final: Tensor
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, first: int, count: int) -> "Hidden":
        """The states of ``count`` tokens from ``first`` on."""
        own = slice(first, first + count)
        return Hidden(self.final[own], {index: states[own] for index, states in self.layers.items()})


@dataclass(frozen=True)
class HiddenRequest:
    """Hidden states that a draft reads: none, the final ones, or those of named layers (EAGLE-3).

    Attributes:
        final: the states after the final norm.
        layers: decoder layers whose residual streams are wanted, in the order in which they are concatenated.
    """

    final: bool = False
    layers: tuple[int, ...] = ()

    def select(self, hidden: Hidden, rows: Tensor | None = None) -> Tensor | None:
        """[n, states * hidden], the states side by side; None if nothing is wanted.

        Args:
            rows: int64, the rows to take; None: all of them.
        """
        states = [hidden.final] * self.final + [hidden.layers[index] for index in self.layers]
        if rows is not None:
            states = [state.index_select(0, rows) for state in states]
        if len(states) < 2:
            return states[0] if states else None
        return torch.cat(states, dim=-1)


NO_HIDDEN = HiddenRequest()
FINAL_HIDDEN = HiddenRequest(final=True)
