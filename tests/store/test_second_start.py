"""Assembling a streamed run twice: the second start quantizes and measures nothing, and drafts the same tree."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.enums import Codec
from subspec.config.schema import (
    BeamTreeConfig,
    BenchmarkConfig,
    BitsByModule,
    Cache,
    Config,
    DecodingConfig,
    HiggsConfig,
    HqqConfig,
    Kernel,
    NoDraftConfig,
    NoLoggerConfig,
    OffloadConfig,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.drafts.check_config import check_config
from subspec.errors import ConfigError
from subspec.planning.plan import plan_run
from subspec.quant.quantized_weight import HqqCodes
from subspec.runs.loading import Loaded
from subspec.session import assemble_streamed
from subspec.targets.layers import open_source

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99]


def config(kernel=Kernel.auto, cache=Cache.auto, seed=0, offload=None, **quant):
    return Config(
        target=PlantedTargetConfig(name="planted_tiny_tied", shape="tiny_tied", seed=seed),
        draft=SubstituteDraftConfig(name="subspec", kernel=kernel),
        quant=HqqConfig(name="hqq", cache=cache, **quant),
        tree=BeamTreeConfig(name="beam", depth=3, width=3),
        decoding=DecodingConfig(name="greedy", max_length=128),
        offload=offload or StreamOffloadConfig(name="stream", vram_gib=1.0),
        benchmark=BenchmarkConfig(name="gsm8k"),
        logger=NoLoggerConfig(name="none"),
        run_dir="somewhere",
    )


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))

    def run(device="cpu", **options):
        notes = []
        settings = config(**options)
        device = torch.device(device)
        source = open_source(settings.target, torch.bfloat16, device, note=lambda text: None)
        plan = plan_run(settings, source.config, link_gb_per_s=25.0, host_free=None, device_total=None)
        assembly = assemble_streamed(settings, source, plan, device, note=notes.append)
        substitute = assembly.streamed.substitute
        weights = [
            tensor.cpu().view(torch.uint8)
            for layer in substitute.layers
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
            for tensor in linear.tensors
        ]
        if device.type == "cuda":  # the interpreter of a CPU takes seconds a level
            assert len(assembly.engine.generate(PROMPT, max_new_tokens=6).token_ids) == 6
        assembly.close()
        return assembly.quant, weights, notes

    run.root = tmp_path
    return run


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_start_quantizes_and_measures_nothing(start, device, monkeypatch):
    first, weights, _ = start(device)
    assert first.details["cache"]["quantized"] == first.modules == 21

    def refuse(*arguments, **options):
        raise AssertionError("quantized or measured again")

    monkeypatch.setattr(HqqCodes, "codes", refuse)
    monkeypatch.setattr("subspec.quant.bench.variant_time", refuse)
    second, again, notes = start(device)
    assert second.details["cache"] | {"folder": ""} == {
        "folder": "",
        "read": 21,
        "quantized": 0,
        "trouble": None,
    }
    assert all(map(torch.equal, weights, again))
    assert len(weights) == len(again) > 0
    assert notes == []
    assert second.details["kernels"]["asked"] == "auto"
    assert set(second.details["kernels"]["roles"]) == {"qkv", "out", "gate_up", "down"}
    assert "int4_mma" in second.backend or device == "cuda"


MIXED = {
    "bits": 4,
    "bits_by": BitsByModule(mlp=2, down_proj=3, lm_head=8),
    "group_size": 32,
    "modules": ["attention", "mlp", "lm_head"],
}


@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_every_kind_are_kept_and_recorded(start, device, monkeypatch):
    first, weights, _ = start(device, **MIXED)
    assert first.modules == 22
    assert first.details["formats"] == {
        "qkv": "4 bit, groups of 32",
        "out": "4 bit, groups of 32",
        "gate_up": "2 bit, groups of 32",
        "down": "3 bit in 4-bit words, groups of 32",
        "head": "8 bit, groups of 32",
    }
    assert first.bits == {"qkv": 5.0, "out": 5.0, "gate_up": 3.0, "down": 5.0, "head": 9.0}
    roles = first.details["kernels"]["roles"]
    assert {role: kept["format"] for role, kept in roles.items()} == first.details["formats"]
    monkeypatch.setattr(HqqCodes, "codes", lambda *_: pytest.fail("quantized again"))
    second, again, notes = start(device, **MIXED)
    assert second.details["cache"]["read"] == 22
    assert all(map(torch.equal, weights, again))
    assert notes == []


def test_a_folder_of_ones_own_is_saved_to_and_loaded_from(start, monkeypatch):
    folder = start.root / "mine"
    first, weights, _ = start(folder=str(folder), **MIXED)
    assert first.details["cache"] | {"read": 0} == first.details["cache"]
    assert not (start.root / "substitutes").exists()
    with pytest.raises(ConfigError, match=r"quant\.folder=.* made with bits 4, this run has 3"):
        start(folder=str(folder), **MIXED | {"bits": 3})
    with pytest.raises(ConfigError, match=r"its layer 0, .* was made from other weights"):
        start(folder=str(folder), seed=1, **MIXED)
    monkeypatch.setattr(HqqCodes, "codes", lambda *_: pytest.fail("quantized again"))
    second, again, _ = start(folder=str(folder), **MIXED)
    assert second.details["cache"]["read"] == 22
    assert all(map(torch.equal, weights, again))


def test_other_weights_have_a_folder_of_their_own(start):
    start()
    start(seed=1)
    assert len([path for path in (start.root / "substitutes").iterdir() if path.is_dir()]) == 2


def test_off_keeps_nothing(start):
    report, _, _ = start(cache=Cache.off)
    assert report.details["cache"]["trouble"] == "quant.cache=off"
    assert not (start.root / "substitutes").exists()


@pytest.mark.parametrize("kernel", [Kernel.tinygemm, Kernel.gemlite])
def test_a_kernel_that_is_not_there_stops_the_run_before_anything_is_loaded(start, kernel):
    with pytest.raises(
        ConfigError, match=rf"^draft\.kernel={kernel.name} cannot run here: no CUDA device .*auto$"
    ):
        start(kernel=kernel)
    assert not (start.root / "substitutes").exists()


def test_where_no_kernel_can_decode_the_refusal_names_what_can_do_without(start, monkeypatch):
    def none_there(*arguments, allowed=None, **options):
        raise ConfigError(
            f"draft.kernel=auto finds no kernel that runs here: {', '.join(allowed or ['any'])}"
        )

    monkeypatch.setattr("subspec.drafts.build_substitute.choose_kernels", none_there)
    for codec, end in (
        (Codec.substitute, r"lut_mma; offload\.codec=none takes other kernels, too$"),
        (Codec.none, "any$"),
    ):
        with pytest.raises(ConfigError, match=end):
            start(offload=StreamOffloadConfig(name="stream", vram_gib=1.0, codec=codec))


def test_the_kernel_belongs_to_streaming():
    settings = config(kernel=Kernel.int4_mma, offload=OffloadConfig(name="none"))
    with pytest.raises(ConfigError, match=r"draft\.kernel=int4_mma .* offload=stream"):
        check_config(settings)


@pytest.mark.gpu
def test_every_kernel_that_is_there_drafts(start):
    from subspec.quant.level_linear import unavailable

    for kernel in (Kernel.int4_mma, Kernel.tinygemm, Kernel.gemlite, Kernel.triton_wq):
        if unavailable(kernel.value, torch.device("cuda")) is None:
            report, _, _ = start("cuda", kernel=kernel)
            assert {role["kernel"] for role in report.details["kernels"]["roles"].values()} == {kernel.value}


CODED = StreamOffloadConfig(name="stream", vram_gib=1.0, codec=Codec.substitute, resident_layers=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft", ["subspec", "none"])
def test_a_second_coded_start_reads_and_codes_nothing(monkeypatch, tmp_path, device, draft):
    """What the link carries is bit for bit what it was, and the text is the first start's."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    settings = config(offload=CODED)
    if draft == "none":
        settings = replace(settings, draft=NoDraftConfig(name="none"))
    device = torch.device(device)
    results = []
    for _ in range(2):
        notes = []
        source = open_source(settings.target, torch.bfloat16, device, note=lambda text: None)
        layers = source.config.num_hidden_layers
        plan = plan_run(settings, source.config, link_gb_per_s=25.0, host_free=None, device_total=None)
        assembly = assemble_streamed(settings, source, plan, device, note=notes.append)
        decoding, streamer = assembly.decoder.decoding, assembly.decoder.streamer
        flats = [*decoding.resident.values(), *streamer.layers]
        text = None
        if device.type == "cuda":  # the interpreter of a CPU takes seconds a level
            text = assembly.engine.generate(PROMPT, max_new_tokens=40).token_ids
        report = assembly.streamed.coded.report()
        assert Loaded(None, assembly, plan).facts()["coded_cache"] == report
        results.append((text, [flat.cpu().clone() for flat in flats], report["read"], report["coded"]))
        assembly.close()
        # Whatever would read, quantize or code from now on ends the test.
        monkeypatch.setattr(type(source), "layer", lambda *_: pytest.fail("an exact layer was read"))
        monkeypatch.setattr(HqqCodes, "codes", lambda *_: pytest.fail("quantized again"))
        monkeypatch.setattr("subspec.codec.coded_load.encode_layer", lambda *_: pytest.fail("coded again"))
    (text, flats, *first), (same_text, same_flats, *second) = results
    assert (first, second) == ([0, layers], [layers, 0])
    assert notes == []
    assert same_text == text
    assert len(flats) == layers
    assert all(map(torch.equal, flats, same_flats))
    assert len([path for path in (tmp_path / "substitutes").iterdir() if path.is_dir()]) == 2


def test_what_is_not_to_be_cached_is_coded_at_every_start(monkeypatch, tmp_path):
    """A substitute in a folder of its own has its coded layers in the cache; ``quant.cache=off`` keeps none."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    cpu, quiet = torch.device("cpu"), lambda text: None

    def coded(**options):
        settings = config(offload=CODED, **options)
        source = open_source(settings.target, torch.bfloat16, cpu, note=quiet)
        plan = plan_run(settings, source.config, link_gb_per_s=25.0, host_free=None, device_total=None)
        assembly = assemble_streamed(settings, source, plan, cpu, note=quiet)
        assembly.close()
        return assembly.streamed.coded.report()

    mine = {"folder": str(tmp_path / "mine")}
    assert coded(cache=Cache.off, **mine)["trouble"] == "quant.cache=off"
    assert not (tmp_path / "cache" / "substitutes").exists()
    assert coded(**mine)["coded"] == 3
    assert coded(**mine)["read"] == 3
    assert coded(seed=1)["read"] == 0


@pytest.mark.parametrize("quant", [HqqConfig, HiggsConfig])
def test_plain_decoding_of_a_coded_target_codes_every_layer(monkeypatch, tmp_path, quant):
    """Layers that a draft would keep exact cannot be coded; without a draft there is nothing to keep them for."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    offload = StreamOffloadConfig(name="stream", vram_gib=1.0, codec=Codec.substitute, resident_layers=1)
    own = quant(name={HqqConfig: "hqq", HiggsConfig: "higgs"}[quant], skip_layers=[0])
    settings = replace(config(offload=offload), quant=own, draft=NoDraftConfig(name="none"))
    cpu, quiet = torch.device("cpu"), lambda text: None
    source = open_source(settings.target, torch.bfloat16, cpu, note=quiet)
    plan = plan_run(settings, source.config, link_gb_per_s=25.0, host_free=None, device_total=None)
    assembly = assemble_streamed(settings, source, plan, cpu, note=quiet)
    assert sorted(assembly.decoder.decoding.layers) == list(range(source.config.num_hidden_layers))
    assert len(assembly.decoder.decoding.resident) == 1
    assembly.close()
