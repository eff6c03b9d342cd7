import pytest

from subspec.errors import ConfigError
from subspec.planning.gpu_specs import GPU_SPECS, find_gpu


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx_3060", "RTX 3060 12GB"),
        ("4060 ti 16gb", "RTX 4060 Ti 16GB"),
        ("RTX 4060", "RTX 4060"),
        ("5070", "RTX 5070"),
        ("A10", "A10"),
        ("L4", "L4"),
        ("h100-sxm", "H100 SXM"),
    ],
)
def test_a_card_is_found_however_it_is_spelt(said, name):
    assert find_gpu(said).name == name


@pytest.mark.parametrize("said", ["RTX 9090", "", "rtx", "Radeon"])
def test_an_unknown_card_lists_the_known_ones(said):
    with pytest.raises(ConfigError, match=r"unknown card; known are .*RTX 4090.*offload\.link_gb_per_s"):
        find_gpu(said)


def test_an_ambiguous_card_lists_the_candidates():
    with pytest.raises(ConfigError, match=r"any of A100 40GB, A100 80GB PCIe, A100 80GB SXM"):
        find_gpu("A100")


def test_every_card_finds_itself_and_its_figures_are_of_a_plausible_size():
    for card in GPU_SPECS:
        assert find_gpu(card.name) is card
        assert 8 <= card.vram_gib <= 192
        assert 5 < card.link_gb_per_s < 60
        assert card.memory_gb_per_s > 4 * card.link_gb_per_s


def test_link_rates():
    assert find_gpu("H200").link_gb_per_s == 55.5
    assert find_gpu("RTX 4090").link_gb_per_s == pytest.approx(27.4, abs=0.05)
    assert find_gpu("RTX 4060").link_gb_per_s == pytest.approx(13.7, abs=0.05)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("RTX 3060", 25.5),
        ("RTX 3090", 71.2),
        ("RTX 4090", 165.2),
        ("RTX 5090", 209.5),
        ("A10", 125),
        ("L4", 121),
        ("L40S", 362),
        ("A100 40GB", 312),
        ("H100 PCIe", 756),
        ("H200", 989),
    ],
)
def test_tensor_rates_are_those_of_the_data_sheets(name, tflops):
    ghz, operations = find_gpu(name).tensor
    assert ghz * operations / 1e3 == pytest.approx(tflops, rel=0.01)
