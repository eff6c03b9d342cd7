"""The checksum of tensors' bits: any change shows, places count, and the device does not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspec.utils import checksum as module
from subspec.utils.checksum import checksum


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_bit_counts(content, data):
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = tensor.clone()
    changed[bit // 8] ^= 1 << (bit % 8)
    assert checksum(changed) != checksum(tensor) == checksum(tensor.clone())


def test_it_is_the_sum_that_the_docstring_says():
    words = torch.tensor([3, -5, 1 << 62, -(1 << 63)])

    def multiplier(place):
        number = module._wrap(place * module._STEP)
        return module._wrap((number ^ (number >> 31)) * module._MIX) | 1

    expected = sum(int(word) * multiplier(place) for place, word in enumerate(words, 1)) + 4
    assert checksum(words) == module._wrap(expected)


def test_places_lengths_and_order_count(monkeypatch):
    one, other = torch.randn(64, 33).bfloat16(), torch.randn(8).bfloat16()
    swapped = one.clone()
    swapped[[3, 5]] = one[[5, 3]]
    assert checksum(swapped) != checksum(one)
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))
    assert checksum(one, other) != checksum(other, one)
    assert checksum(-torch.zeros(3)) != checksum(torch.zeros(3))
    whole = checksum(one)
    monkeypatch.setattr(module, "BLOCK", 5)
    assert checksum(one) == whole


def test_it_is_of_values_in_their_order_not_of_how_they_lie():
    tensor = torch.arange(31 * 7, dtype=torch.int16).view(31, 7)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(tensor.flatten()[3:]) == checksum(tensor.flatten()[3:].clone())


@pytest.mark.gpu
def test_a_card_counts_as_a_cpu_does():
    tensor = torch.randn(3000, 4097).bfloat16()
    assert checksum(tensor.cuda()) == checksum(tensor)
