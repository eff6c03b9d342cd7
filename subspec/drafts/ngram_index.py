"""Which tokens followed a context before: counts of n-grams over growing text, blended over the context's lengths."""

from collections.abc import Sequence


class NgramIndex:
    """Counts of the tokens behind every context of 1 to ``longest`` tokens.

    Probabilities are those of prediction by partial matching, method C (Moffat 1990, "Implementing the PPM data
    compression scheme", section 2): the longest known context is believed first, and an escape in proportion to its
    number of distinct continuations goes on to the next shorter one.

    Args:
        longest: most tokens of a context.
        shortest: fewest; 1 predicts from the last token alone.
    """

    def __init__(self, longest: int, shortest: int = 1) -> None:
        self.longest = longest
        self.shortest = shortest
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}
        self._tail: tuple[int, ...] = ()

    def clear(self) -> None:
        """Forget all text."""
        self._followers.clear()
        self._tail = ()

    def end_text(self) -> None:
        """Keep the counts; the next token follows none of the earlier ones."""
        self._tail = ()

    @property
    def tail(self) -> tuple[int, ...]:
        """The text's last tokens, at most ``longest``."""
        return self._tail

    def add(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` to the text."""
        tail = list(self._tail)
        for token in tokens:
            self.count(tail, token)
            tail = [*tail, token][-self.longest :]
        self._tail = tuple(tail)

    def count(self, context: Sequence[int], token: int) -> None:
        """Count ``token`` behind ``context`` and its endings, outside of the text."""
        for length in range(self.shortest, min(self.longest, len(context)) + 1):
            known = self._followers.setdefault(tuple(context[len(context) - length :]), {})
            known[token] = known.get(token, 0) + 1

    def candidates(self, context: Sequence[int], most: int) -> dict[int, float]:
        """Tokens that followed ``context`` or its endings, and their probabilities: at most ``most``, likeliest first.

        The probabilities add up to less than 1: the rest belongs to tokens that never followed.
        """
        found: dict[int, float] = {}
        left = 1.0
        for length in range(min(self.longest, len(context)), self.shortest - 1, -1):
            followers = self._followers.get(tuple(context[len(context) - length :]))
            if followers is None:
                continue
            total = sum(followers.values()) + len(followers)
            for token, count in followers.items():
                found[token] = found.get(token, 0.0) + left * count / total
            left *= len(followers) / total
        likeliest = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        return dict(likeliest)
