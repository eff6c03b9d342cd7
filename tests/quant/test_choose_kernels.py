"""Kernels are chosen by measurement, once: with a made-up device here, and on the real one with ``-m gpu``."""

import json

import pytest
import torch

from subspec.errors import ConfigError
from subspec.kernels import int4_wide
from subspec.kernels.few_rows import apply_swiglu
from subspec.kernels.timing import slug
from subspec.quant.choose_kernels import MARGIN, candidates, choose_kernels, settings_rows
from subspec.quant.codebook_linear import HiggsFormat
from subspec.quant.gemlite import load_tuning
from subspec.quant.hqq import HqqFormat
from subspec.quant.kernel_times import CudaBench
from subspec.quant.level_linear import Variant
from subspec.utils.capture import capturing

CUDA = torch.device("cuda")
KERNELS = HqqFormat().kernels
SHAPES = {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}


class FakeBench:
    """A card whose times are a function of the variant."""

    name = "NVIDIA Imaginary (80 GB)"
    device = CUDA

    def __init__(self, time, missing=None, launches="in order (switched off)"):
        self.time, self.missing, self.launches = time, missing or {}, launches
        self.asked, self.finished = [], []

    def unavailable(self, kernel, format_):
        return self.missing.get(kernel)

    def seconds(self, variant, format_, role, n, k, rows):
        self.asked.append((role, variant))
        return self.time(variant, role) / 1e6

    def begin(self, kernels, folder, note):
        self.kernels = kernels

    def finish(self, won, rows, measured, folder, note):
        self.finished.append((won, rows, measured))


def mma_wins(variant, role):
    return {"int4_mma": 5.0 + variant.tiles + abs(variant.splits - 3), "gemlite": 50.0}[variant.kernel]


@pytest.fixture
def choose(tmp_path):
    notes = []

    def run(bench, shapes=SHAPES, rows=6, **options):
        options = {"formats": dict.fromkeys(shapes, HqqFormat()), "folder": tmp_path, **options}
        return choose_kernels(shapes, rows, CUDA, note=notes.append, bench=bench, **options)

    run.notes, run.folder = notes, tmp_path
    return run


def test_the_fastest_of_each_role_is_taken(choose):
    def time(variant, role):
        if role == "down":
            return {"int4_mma": 30.0, "gemlite": 10.0}[variant.kernel]
        return mma_wins(variant, role)

    bench = FakeBench(time)
    choice = choose(bench)
    assert choice.variants == {
        "qkv": Variant("int4_mma", 2, 3),
        "out": Variant("int4_mma", 2, 3),
        "gate_up": Variant("int4_mma", 2, 1),  # the activation needs whole sums
        "down": Variant("gemlite"),
    }
    assert choice.picked["out"].microseconds == pytest.approx(7.0)
    assert choice.measured == 4
    assert bench.finished == [({"down": (HqqFormat(), SHAPES["down"])}, 6, True)]
    assert "down, 10.0 us" in choice.summary()
    assert "measured in" in choice.summary()
    json.dumps(choice.to_dict())
    assert choice.to_dict()["roles"]["out"]["origin"] == "measured"


def test_of_variants_as_fast_as_each_other_the_fewest_slices_win(choose):
    def time(variant, role):
        return 10.0 * (1.0 if variant.splits == 8 else (MARGIN + 1) / 2 if variant.splits == 2 else 2.0)

    choice = choose(FakeBench(time), {"out": SHAPES["out"]})
    assert choice.variants["out"].splits == 2


def test_a_second_start_measures_nothing(choose):
    first = choose(FakeBench(mma_wins))
    assert len(choose.notes) == 1
    again = FakeBench(lambda *_: pytest.fail("measured"))
    second = choose(again)
    assert again.asked == []
    assert again.finished == [({}, 6, False)]
    assert second.variants == first.variants
    assert second.measured == 0
    assert "from the cache" in second.summary()
    assert len(choose.notes) == 1
    assert len(list(choose.folder.iterdir())) == 1
    name = next(choose.folder.iterdir()).name
    assert name.startswith("nvidia-imaginary-80-gb-2.")


def test_only_what_is_missing_is_measured(choose):
    choose(FakeBench(mma_wins, {"gemlite": "not installed"}))
    bench = FakeBench(mma_wins)
    choose(bench)
    assert {variant.kernel for _, variant in bench.asked} == {"gemlite"}
    bench = FakeBench(mma_wins)
    choose(bench, {**SHAPES, "down": (3584, 9472)})
    assert {role for role, _ in bench.asked} == {"down"}
    bench = FakeBench(mma_wins)
    choose(bench, rows=4)
    assert {role for role, _ in bench.asked} == set(SHAPES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: '{"format": 0}',
        lambda text: text.replace('"for": "nvidia', '"for": "amd'),
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "microseconds": {"a": {"b": "fast"}}}),
        lambda text: json.dumps({**json.loads(text), "microseconds": {"a": {"b": -1}}}),
    ],
)
def test_a_damaged_or_stale_file_is_measured_again_and_said(choose, damage):
    choose(FakeBench(mma_wins))
    file = next(choose.folder.iterdir())
    file.write_text(damage(file.read_text()))
    choose.notes.clear()
    bench = FakeBench(mma_wins)
    assert choose(bench).measured == 4
    assert bench.asked
    assert "measuring again" in choose.notes[0]
    assert choose(FakeBench(lambda *_: pytest.fail("measured"))).measured == 0


def test_a_file_of_other_kernels_is_not_read(choose, monkeypatch):
    choose(FakeBench(mma_wins))
    monkeypatch.setattr("subspec.kernels.timing.source_hash", lambda packages: "0123456789ab")
    assert choose(FakeBench(mma_wins)).measured == 4
    assert len(list(choose.folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_to_is_only_said(choose):
    (choose.folder / "file").write_text("")
    choice = choose(FakeBench(mma_wins), folder=choose.folder / "file" / "kernels")
    assert choice.measured == 4
    assert any("not kept" in note for note in choose.notes)


def test_a_kernel_that_fails_is_left_out_and_named(choose):
    def time(variant, role):
        if variant.kernel == "int4_mma":
            raise RuntimeError("out of shared memory\nand more")
        return mma_wins(variant, role)

    choice = choose(FakeBench(time))
    assert {variant.kernel for variant in choice.variants.values()} == {"gemlite"}
    assert choice.unavailable["int4_mma (out)"] == "out of shared memory"
    assert "out of shared memory" in choice.summary()


def test_the_kernel_that_was_asked_for_is_used(choose):
    bench = FakeBench(mma_wins)
    choice = choose(bench, kernel="gemlite")
    assert set(choice.variants.values()) == {Variant("gemlite")}
    assert {variant.kernel for _, variant in bench.asked} == {"gemlite"}


@pytest.mark.parametrize(
    ("missing", "kernel", "message"),
    [
        ({"gemlite": "none"}, "gemlite", r"draft\.kernel=gemlite cannot run here: none; set draft\.kernel=auto$"),
        ({"int4_mma": "old"}, "int4_mma", r"draft\.kernel=int4_mma cannot run here: old; set draft\.kernel=auto$"),
        ({}, "int4_mma", r"draft\.kernel=int4_mma cannot run here: 3616 inputs"),
        (dict.fromkeys(KERNELS, "none"), "auto", r"draft\.kernel=auto .*int4_mma: none; gemlite: none"),
    ],
)
def test_a_kernel_that_cannot_run_or_does_not_take_the_shape_stops_the_run(choose, missing, kernel, message):
    with pytest.raises(ConfigError, match=message):
        choose(FakeBench(mma_wins, missing), {"out": (3584, 3616)}, kernel=kernel, formats={"out": HqqFormat(4, 32)})


def test_a_cpu_has_the_reference_and_nothing_else(tmp_path):
    cpu, formats = torch.device("cpu"), dict.fromkeys(SHAPES, HqqFormat(8, 128))
    choice = choose_kernels(SHAPES, 6, cpu, formats=formats, folder=tmp_path)
    assert {variant.kernel for variant in choice.variants.values()} == {"int4_mma"}
    assert choice.summary().startswith("int4_mma 2 (qkv)")
    assert "reference" in choice.summary()
    assert choice.unavailable == {"gemlite": "no CUDA device"}
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"draft\.kernel=gemlite cannot run here: no CUDA device"):
        choose_kernels(SHAPES, 6, cpu, formats=formats, kernel="gemlite")
    with pytest.raises(ConfigError, match=r"draft\.kernel=auto .*multiples of 64, not 32.*quant\.group_size"):
        choose_kernels(SHAPES, 6, cpu, formats=dict.fromkeys(SHAPES, HqqFormat(4, 32)))


def test_nothing_quantized_is_nothing_to_choose(choose):
    choice = choose(FakeBench(mma_wins, dict.fromkeys(KERNELS, "none")), {})
    assert choice.variants == {}
    assert choice.summary() == "no quantized Linears"


def test_what_is_available_is_told_in_words(monkeypatch):
    for kernel in KERNELS:
        assert HqqFormat().unavailable(kernel, torch.device("cpu")) == "no CUDA device"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert HqqFormat().unavailable("gemlite", CUDA) == "gemlite is not installed (pip install gemlite)"


@pytest.mark.parametrize(
    ("bits", "group", "k", "kernel", "reason"),
    [
        (4, 64, 3584, "int4_mma", None),
        (2, 192, 3648, "int4_mma", None),
        (8, 32, 3584, "int4_mma", "its groups are multiples of 64, not 32"),
        (8, 32, 3584, "gemlite", None),
        (8, 96, 3584, "int4_mma", "groups of 96 do not divide 3584 inputs"),
        (4, 16, 3584, "gemlite", "it has groups of 32, 64, 128 ..., not 16"),
        (4, 64, 3584, "lut_mma", "it has no 4-bit integers"),
    ],
)
def test_what_a_kernel_does_not_take_is_told(bits, group, k, kernel, reason):
    assert HqqFormat(bits, group).unfit(kernel, 512, k) == reason


def test_slices_leave_work_for_every_warp():
    few = candidates(HqqFormat(), "out", 64, 64, ["int4_mma"], {})
    assert {variant.splits for variant in few.values()} == {1}
    for bits, inputs in [(4, 16 * 64), (8, 8 * 64)]:  # 8 bits are two planes
        many = candidates(HqqFormat(bits), "out", 64, inputs, ["int4_mma"], {})
        assert {variant.splits for variant in many.values()} == {1, 2, 3, 4}


def test_times_of_overlapping_launches_are_kept_apart(choose):
    """What is fastest one after the other need not be fastest overlapping, and a file holds both."""
    fewest = FakeBench(lambda variant, role: variant.splits + 1.0 if variant.tiles else 50.0)
    most = FakeBench(lambda variant, role: 20.0 - variant.splits if variant.tiles else 50.0, None, "overlapping")
    in_order, overlapping = choose(fewest, {"out": SHAPES["out"]}), choose(most, {"out": SHAPES["out"]})
    assert in_order.measured == overlapping.measured == 1
    assert in_order.variants["out"].splits == 1
    assert overlapping.variants["out"].splits == 8
    assert overlapping.to_dict()["launches"] == "overlapping"
    again = choose(fewest, {"out": SHAPES["out"]})
    assert not again.measured
    assert again.variants == in_order.variants


def test_file_names_are_plain():
    assert slug("NVIDIA H100 80GB HBM3 / MIG 1g.10gb") == "nvidia-h100-80gb-hbm3-mig-1g.10gb"


# ------------------------------------------------------------------------------------------- on a device


@pytest.mark.gpu
def test_on_a_card_every_kernel_is_measured_and_the_memory_given_back(tmp_path):
    shapes = {"out": (3584, 3584), "gate_up": (2 * 4864, 896)}
    formats = dict.fromkeys(shapes, HqqFormat())
    choose_kernels(shapes, 6, CUDA, formats=formats, folder=tmp_path / "first", note=print)
    before = torch.cuda.memory_allocated()
    choice = choose_kernels(shapes, 6, CUDA, formats=formats, folder=tmp_path / "second", note=print)
    assert torch.cuda.memory_allocated() == before
    here = [kernel for kernel in KERNELS if not HqqFormat().unavailable(kernel, CUDA)]
    assert "int4_mma" in here
    for role, picked in choice.picked.items():
        asked = candidates(HqqFormat(), role, *shapes[role], here, {})
        assert "int4_mma" in {name.split()[0] for name in picked.others}
        assert picked.variant in asked.values()
        assert picked.measured


@pytest.mark.gpu
def test_on_a_card_a_second_call_measures_nothing(tmp_path, monkeypatch):
    shapes, formats = {"out": (1024, 1024)}, {"out": HqqFormat(8)}
    first = choose_kernels(shapes, 4, CUDA, formats=formats, folder=tmp_path, note=print)
    monkeypatch.setattr(CudaBench, "seconds", lambda *_: pytest.fail("measured"))
    second = choose_kernels(shapes, 4, CUDA, formats=formats, folder=tmp_path, note=print)
    assert second.variants == first.variants
    assert second.measured == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(1, 576), (6, 1024)])
def test_every_kernel_computes_the_quantized_weight(kernel, bits, swiglu, rows, k):
    format_ = HqqFormat(bits)
    if reason := format_.unavailable(kernel, CUDA):
        pytest.skip(reason)
    torch.manual_seed(0)
    codes = format_.random_weight(256, k, CUDA)
    linear = format_.linear(Variant(kernel, 2, 1), codes, swiglu=swiglu)
    x = torch.randn(rows, k, device=CUDA, dtype=linear.reads)
    linear(x)  # gemlite tunes itself
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        y = linear(x)
    for _ in range(2):  # split sums must be cleared by the graph itself
        graph.replay()
    expected = x.float() @ codes.dequantize().t()
    if swiglu:
        expected = apply_swiglu(expected)
        got = y.float()[:, : expected.shape[1]]
    else:
        got = y.float().sum(0)[:, :256]
    assert (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.gpu
def test_gemlites_tuning_is_kept(tmp_path):
    pytest.importorskip("gemlite.core")
    shapes, formats = {"out": (1024, 1024)}, {"out": HqqFormat()}
    choice = choose_kernels(shapes, 4, CUDA, formats=formats, kernel="gemlite", folder=tmp_path, note=print)
    assert choice.variants["out"].kernel == "gemlite"
    kept = list(tmp_path.glob("gemlite-*.json"))
    assert len(kept) == 1
    tuned = json.loads(kept[0].read_text())
    assert tuned["GEMM_SPLITK"]
    assert load_tuning(kept[0], print)


def test_settings_are_those_of_one_text_where_many_rows_take_none(monkeypatch):
    monkeypatch.setattr(int4_wide, "runs_on", lambda device: True)
    four, eight = HqqFormat(4), HqqFormat(8)
    assert settings_rows(32, 6, [four], CUDA) == 6
    assert settings_rows(40, 40, [four], CUDA) == int4_wide.FROM - 1
    assert settings_rows(12, 6, [four], CUDA) == 12
    assert settings_rows(32, 6, [four, eight], CUDA) == settings_rows(32, 6, [HiggsFormat()], CUDA) == 32
    assert settings_rows(32, 6, [four], torch.device("cpu")) == 32
    monkeypatch.setattr(int4_wide, "runs_on", lambda device: False)
    assert settings_rows(32, 6, [four], CUDA) == 32
