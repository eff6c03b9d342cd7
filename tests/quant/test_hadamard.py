import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspec.quant.hadamard import LEAST_BLOCK, Rotation, hadamard_matrix, walsh_hadamard

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 8, 64, 512, 1024])
def test_the_transform_is_the_matrix(size):
    x = torch.randn(3, 2 * size, dtype=torch.float64)
    matrix = hadamard_matrix(size, CPU, torch.float64)
    expected = (x.view(3, 2, size) @ matrix).flatten(1)
    torch.testing.assert_close(walsh_hadamard(x, size), expected)


def test_the_matrix_is_orthonormal_and_has_one_magnitude():
    matrix = hadamard_matrix(128, CPU, torch.float64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(128, dtype=torch.float64))
    assert matrix.abs().unique().numel() == 1


@pytest.mark.parametrize(("size", "width"), [(3, 12), (8, 12), (0, 8)])
def test_sizes_without_a_transform_are_refused(size, width):
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(torch.zeros(1, width), size)


@pytest.mark.parametrize(
    ("inputs", "limit", "padded", "block"),
    [
        (3584, 512, 3584, 512),
        (18944, 512, 18944, 512),
        (18944, 1024, 18944, 512),
        (4096, 1024, 4096, 1024),
        (576, 512, 576, 64),
        (1536, 512, 1536, 512),
        (11008, 512, 11008, 256),
        (100, 512, 128, 128),
        (1, 512, 64, 64),
        (96, 512, 128, 128),
    ],
)
def test_blocks_are_the_largest_that_divide_and_padding_is_the_exception(inputs, limit, padded, block):
    rotation = Rotation.of(inputs, limit)
    assert (rotation.padded, rotation.block) == (padded, block)


@given(inputs=st.integers(1, 700), limit=st.sampled_from([64, 128, 512]), seed=st.integers(0, 5))
def test_rotating_both_sides_changes_no_product(inputs, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(3, inputs, generator=generator, dtype=torch.float64)
    rotation = Rotation.of(inputs, limit, seed)
    assert rotation.padded % LEAST_BLOCK == 0
    torch.testing.assert_close(rotation(x) @ rotation(weight).t(), x @ weight.t())
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)


def test_an_outlier_is_spread_over_its_block():
    x = torch.zeros(1, 1024)
    x[0, 700] = 32.0
    y = Rotation.of(1024, 512)(x)
    assert float(y[0, :512].abs().max()) == 0
    torch.testing.assert_close(y[0, 512:].abs(), torch.full((512,), 32 / 512**0.5))


def test_signs_follow_from_the_seed_alone():
    first, again, other = (Rotation.of(256, 256, seed).signs(CPU, torch.float32) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 64 < int((first > 0).sum()) < 192
