"""Arguments of the library: taken as they are meant, or refused with their name."""

import array

import numpy as np
import pytest
import torch

from subspec.decoding.arguments import ArgumentError, finite_number, prompt_list, stop_list, whole_number
from subspec.errors import ConfigError
from tests.helpers.tiny import tiny_tokenizer

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "prompt",
    [
        *([5, 6], (5, 6), range(5, 7), iter([5, 6]), [np.int64(5), np.int32(6)], array.array("i", [5, 6])),
        *(np.array([5, 6]), np.array([[5, 6]], dtype=np.uint8)),
        *(torch.tensor([5, 6]), torch.tensor([[5, 6]]), torch.tensor([5, 6], dtype=torch.int32)),
    ],
)
def test_one_prompt_is_taken_in_every_form(prompt):
    ids = prompt_list(prompt)
    assert ids == [5, 6]
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize(
    "prompt",
    [
        *([], [5.0, 6], [5, NAN], [True, False], [np.bool_(True)], [5, None], ["5"], [[5, 6]], [[5, 6], [7]]),
        *(torch.tensor([], dtype=torch.int64), torch.tensor([[]], dtype=torch.int64), [torch.tensor(5)]),
        *(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[5], [6]]), torch.tensor([[[5, 6]]]), torch.tensor(5)),
        *(torch.tensor([5.0, 6.0]), torch.tensor([True, False]), np.array([5.0, 6.0]), np.array([True])),
        *(np.array([[5, 6], [7, 8]]), np.array(["5"]), "the", b"the", 5, None, {5, 6}, {"input_ids": [5, 6]}),
    ],
    ids=repr,
)
def test_what_is_not_one_prompt_is_refused(prompt):
    with pytest.raises(ArgumentError, match="prompt_ids") as refused:
        prompt_list(prompt)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, ConfigError | ValueError)


def test_a_tokenizers_whole_output_is_refused_with_the_remedy():
    with pytest.raises(ArgumentError, match=r"prompt_ids.*input_ids"):
        prompt_list(tiny_tokenizer()("the"))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("the", ("the",)), (["a", "bc"], ("a", "bc")), (("a",), ("a",)), ([], ()), ((), ()), (None, ())],
)
def test_stop_strings(stop, expected):
    assert stop_list(stop) == expected


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [5], 5, [b"a"], b"a", {"a": 1}, [None], [["a"]], True], ids=repr)
def test_what_is_no_stop_string_is_refused(stop):
    with pytest.raises(ArgumentError, match="stop "):
        stop_list(stop)


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None, NAN, np.float32(1), [1]], ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ArgumentError, match="seed="):
        whole_number("seed", value, least=0)
    assert whole_number("seed", np.int64(3), least=0) == 3


@pytest.mark.parametrize("value", [NAN, INF, -INF, 10**400, True, "1", None, 1j, torch.tensor(1.0)], ids=repr)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ArgumentError, match="heat="):
        finite_number("heat", value)
    assert finite_number("heat", np.float32(0.5)) == 0.5
