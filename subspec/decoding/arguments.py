"""Arguments of the library, checked by value and type before anything is computed.

A refusal names the argument. Configurations are checked in :mod:`subspec.drafts.check_config`.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from subspec.errors import ConfigError


class ArgumentError(ConfigError, ValueError):
    """An argument of a library call has the wrong type or is out of range."""


def prompt_list(prompt_ids: Any) -> list[int]:
    """The ids of one prompt.

    Args:
        prompt_ids: a sequence of whole numbers, or an integer tensor or array of shape [n] or [1, n].

    Raises:
        ArgumentError: text, several prompts, no ids, or ids that are not whole numbers.
    """
    if isinstance(prompt_ids, str | bytes):
        raise ArgumentError("prompt_ids is text: pass its token ids, tokenizer(TEXT).input_ids")
    if isinstance(prompt_ids, Mapping) or hasattr(prompt_ids, "input_ids"):
        raise ArgumentError("prompt_ids is a tokenizer's whole output: pass its input_ids")
    if isinstance(prompt_ids, torch.Tensor | np.ndarray):
        ids = _tensor_ids(prompt_ids)
    elif isinstance(prompt_ids, Iterable) and not isinstance(prompt_ids, set | frozenset):
        ids = list(prompt_ids)
    else:
        raise ArgumentError(f"prompt_ids is a {_type(prompt_ids)}: pass a list of token ids")
    if not ids:
        raise ArgumentError("prompt_ids: the prompt is empty: it needs at least one token")
    for token in ids:
        if is_whole(token):
            continue
        if isinstance(token, list | tuple | torch.Tensor | np.ndarray):
            raise ArgumentError(
                f"prompt_ids holds a {_type(token)}: pass one prompt, a flat list of token ids, at a time"
            )
        raise ArgumentError(f"prompt_ids holds {token!r}, a {_type(token)}: token ids are whole numbers")
    return [int(token) for token in ids]


def _tensor_ids(tensor: torch.Tensor | np.ndarray) -> list[int]:
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
        raise ArgumentError(f"prompt_ids has shape {shape}: one prompt at a time, as [n] or [1, n]")
    if not dtype.startswith(("int", "uint")):
        raise ArgumentError(f"prompt_ids has dtype {dtype}: token ids are whole numbers (int64)")
    return tensor.reshape(-1).tolist()


def stop_list(stop: Any) -> tuple[str, ...]:
    """The strings that end a text.

    Args:
        stop: one string, several, or None for none.

    Raises:
        ArgumentError: an empty string, or something that is no string.
    """
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if isinstance(stop, bytes | Mapping) or not isinstance(stop, Iterable):
        raise ArgumentError(f"stop is a {_type(stop)}: pass a string or a list of strings")
    strings = tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise ArgumentError(f"stop holds {string!r}, a {_type(string)}: stops are strings")
        if not string:
            raise ArgumentError("stop holds an empty string: leave it out")
    return strings


def whole_number(name: str, value: Any, least: int) -> int:
    """``value``, if it is a whole number of at least ``least``.

    Args:
        name: of the argument.

    Raises:
        ArgumentError: it is not.
    """
    if not is_whole(value):
        raise ArgumentError(f"{name}={value!r} must be a whole number, not a {_type(value)}")
    if value < least:
        raise ArgumentError(f"{name}={value} must be at least {least}")
    return int(value)


def finite_number(name: str, value: Any) -> float:
    """``value``, if it is a number that is neither infinite nor NaN.

    Args:
        name: of the argument.

    Raises:
        ArgumentError: it is not.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentError(f"{name}={value!r} must be a number, not a {_type(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ArgumentError(f"{name}={number} must be finite")
    return number


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number; a bool is none, though Python calls it an int."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _type(value: Any) -> str:
    return type(value).__name__
