"""Integers rounded up, to multiples and to powers of two, and shared out."""


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``number``."""
    return -(-number // multiple) * multiple


def next_power_of_two(number: int) -> int:
    """Smallest power of two that is at least ``number``; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def equal_slices(count: int, most: int, multiple: int) -> list[tuple[int, int]]:
    """First number and size of the slices of ``count``: as few and as equal as ``most`` allows.

    Sizes are multiples of ``multiple``, which ``most`` is not below, but for the last one.
    """
    slices = -(-count // (most // multiple * multiple))
    size = round_up(-(-count // slices), multiple)
    return [(first, min(size, count - first)) for first in range(0, count, size)]


def evenly(count: int, keep: int) -> tuple[int, ...]:
    """``keep`` of the numbers below ``count``, evenly, with the first and the last (a single one is the first)."""
    if keep == 1:
        return (0,)
    return tuple(round(index * (count - 1) / (keep - 1)) for index in range(keep))


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, ..."""
    return number > 0 and number & (number - 1) == 0
