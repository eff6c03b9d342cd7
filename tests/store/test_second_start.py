"""Assembling a streamed run twice: the second start quantizes, codes and measures nothing, and loads the same bits."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from subspec.codec import format
from subspec.config.enums import Codec
from subspec.config.schema import BitsByModule, Cache, Config, HiggsConfig, HqqConfig, PlantedTargetConfig
from subspec.errors import ConfigError
from subspec.planning.plan import plan_run
from subspec.quant.hqq import HqqFormat
from subspec.session import assemble_streamed
from subspec.targets.load import open_source
from tests.helpers.planning import fewer_layers, settings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99]
PLAIN, CODED = {"codec": Codec.none}, {"codec": Codec.substitute, "resident_layers": 1}
LAYERS = 2
MIXED = {"bits_by": BitsByModule(mlp=2, down_proj=3, lm_head=8), "modules": ["attention", "mlp", "lm_head"]}


def config(*, seed=0, offload=PLAIN, draft="subspec", quant=None, **options) -> Config:
    whole = settings(1.0, draft, tree=(3, 3), quant=options, decoding={"max_length": 128}, **offload)
    target = PlantedTargetConfig(name="planted_tiny_tied", shape="tiny_tied", seed=seed)
    return replace(whole, target=target, quant=quant or whole.quant)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Assemble a run; returns its quantization's report, facts, and the bytes of everything that was loaded."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    fewer_layers(monkeypatch, "tiny_tied", LAYERS)
    if not torch.cuda.is_available():  # the torch reference takes a step per weight of a chunk
        monkeypatch.setattr(format, "CHUNK", 16)

    def run(device="cpu", **options):
        whole, device = config(**options), torch.device(device)
        source = open_source(whole.target, torch.bfloat16, device, note=lambda text: None)
        plan = plan_run(whole, source.config, link_gb_per_s=25.0, host_free=None, device=None)
        run.notes.clear()
        assembly = assemble_streamed(whole, source, plan, device, note=run.notes.append)
        decoder, substitute = assembly.target, assembly.streamed.substitute
        loaded = list(decoder.streamer.layers) if decoder.streamer is not None else []
        if decoder.restorer is not None:
            loaded += decoder.restorer.resident.values()
        for layer in substitute.layers if substitute is not None else ():
            for linear in layer.linears:
                loaded += linear.tensors
        loaded = [tensor.cpu().clone().view(torch.uint8) for tensor in loaded]
        if device.type == "cuda":  # the interpreter of a CPU takes seconds a level
            loaded.append(torch.tensor(assembly.engine.generate(PROMPT, max_new_tokens=40).token_ids))
        facts = assembly.facts()
        if decoder.restorer is not None:
            assert sorted(decoder.restorer.layers) == list(range(LAYERS))
        assembly.close()
        return assembly.quant, facts, loaded

    run.notes = []
    return run


@pytest.fixture
def nothing_new(monkeypatch):
    """From now on, whatever would quantize, code or measure ends the test."""

    def arm():
        monkeypatch.setattr(HqqFormat, "quantize", lambda *_: pytest.fail("quantized again"))
        measure = "subspec.quant.kernel_times.variant_time"
        monkeypatch.setattr(measure, lambda *_, **__: pytest.fail("measured again"))
        monkeypatch.setattr("subspec.codec.coded_load.encode_layer", lambda *_: pytest.fail("coded again"))

    return arm


def folders(root):
    return len([path for path in (root / "substitutes").iterdir() if path.is_dir()])


@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_every_kind_are_kept_and_recorded(start, device, nothing_new, tmp_path):
    first, _, loaded = start(device, **MIXED)
    assert first.details["cache"]["quantized"] == first.modules == 7 * LAYERS + 1
    roles = first.details["kernels"]["roles"]
    assert {role: kept["format"] for role, kept in roles.items()} == first.details["formats"]
    nothing_new()
    second, _, again = start(device, **MIXED)
    folder = second.details["cache"].pop("folder")
    assert second.details["cache"] == {"read": 7 * LAYERS + 1, "quantized": 0, "trouble": None}
    assert folder.startswith(str(tmp_path / "cache" / "substitutes"))
    assert all(map(torch.equal, loaded, again))
    assert len(loaded) == len(again) > 0
    assert start.notes == []
    assert second.details["kernels"]["asked"] == "auto"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft", ["subspec", "none"])
def test_a_second_coded_start_reads_and_codes_nothing(start, device, draft, nothing_new, monkeypatch, tmp_path):
    """The bytes that cross the link are the same, and so is the text; no exact layer is read."""
    _, facts, loaded = start(device, offload=CODED, draft=draft)
    assert (facts["coded_cache"]["read"], facts["coded_cache"]["coded"]) == (0, LAYERS)
    nothing_new()
    layer = "subspec.targets.planted.PlantedSource.layer"
    monkeypatch.setattr(layer, lambda *_: pytest.fail("an exact layer was read"))
    _, facts, again = start(device, offload=CODED, draft=draft)
    assert (facts["coded_cache"]["read"], facts["coded_cache"]["coded"]) == (LAYERS, 0)
    assert start.notes == []
    assert all(map(torch.equal, loaded, again))
    assert len(loaded) == len(again) >= LAYERS
    assert folders(tmp_path / "cache") == 2


def test_a_folder_of_the_users_is_filled_and_read(start, nothing_new, tmp_path):
    """It holds the substitute; the coded layers are in the cache, unless ``quant.cache=off``."""
    mine = {"folder": str(tmp_path / "mine"), "offload": CODED}
    _, facts, _ = start(cache=Cache.off, **mine)
    assert facts["coded_cache"]["trouble"] == "quant.cache=off"
    assert not (tmp_path / "cache" / "substitutes").exists()
    with pytest.raises(ConfigError, match=r"quant\.folder=.* made with bits 4, this run has 3"):
        start(**mine, bits=3)
    with pytest.raises(ConfigError, match=r"quant\.folder=.* was made from other weights"):
        start(**mine, seed=1)
    report, facts, _ = start(**mine)
    assert report.details["cache"]["read"] == 7 * LAYERS
    assert facts["coded_cache"]["coded"] == LAYERS
    nothing_new()
    assert start(**mine)[1]["coded_cache"]["read"] == LAYERS


def test_other_weights_have_a_folder_of_their_own_and_off_keeps_nothing(start, tmp_path):
    report, _, _ = start(cache=Cache.off)
    assert report.details["cache"]["trouble"] == "quant.cache=off"
    assert not (tmp_path / "cache" / "substitutes").exists()
    start()
    start(seed=1)
    assert folders(tmp_path / "cache") == 2


def test_a_refusal_names_what_can_do_without_the_codec(start, monkeypatch):
    def none_there(*arguments, allowed=None, **options):
        raise ConfigError(f"no kernel: {', '.join(allowed or ['any'])}")

    monkeypatch.setattr("subspec.drafts.substitute.choose_kernels", none_there)
    for offload, end in ((CODED, r"lut_mma; offload\.codec=none takes other kernels, too$"), (PLAIN, "int4_mma$")):
        with pytest.raises(ConfigError, match=end):
            start(offload=offload)


@pytest.mark.parametrize("quant", [HqqConfig(name="hqq", skip_layers=[0]), HiggsConfig(name="higgs", skip_layers=[0])])
def test_plain_decoding_of_a_coded_target_codes_every_layer(start, quant):
    """Layers that a draft would keep exact cannot be coded; without a draft there is nothing to keep them for."""
    start(offload=CODED, draft="none", quant=replace(quant))
