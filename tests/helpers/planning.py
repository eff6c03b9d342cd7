"""Configurations to plan with: the dataclasses that Hydra would have composed."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PretrainedConfig

from subspec.config.enums import Codec
from subspec.config.schema import (
    BeamTreeConfig,
    BenchmarkConfig,
    Config,
    DecodingConfig,
    HiggsConfig,
    HqqConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    NoLoggerConfig,
    PlantedTargetConfig,
    PromptLookupDraftConfig,
    SamplingConfig,
    SmallModelDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.planning.plan import Plan, plan_run
from subspec.targets.planted import SHAPES

DRAFTS = {
    "none": NoDraftConfig(name="none"),
    "subspec": SubstituteDraftConfig(name="subspec"),
    "small_model": SmallModelDraftConfig(name="small_model", path="planted:qwen2_5_1_5b"),
    "layer_skip": LayerSkipDraftConfig(name="layer_skip"),
    "prompt_lookup": PromptLookupDraftConfig(name="prompt_lookup"),
}


def settings(
    vram_gib: float = 8.0,
    draft: str = "subspec",
    *,
    tree: tuple[int, int] = (48, 6),
    sampling: dict[str, Any] | None = None,
    quant: dict[str, Any] | None = None,
    decoding: dict[str, Any] | None = None,
    **offload: Any,
) -> Config:
    """The paper's settings (tree 48 x 6, 4 bits, 2048 tokens, weights streamed as they are) but for what is said."""
    offload.setdefault("codec", Codec.none)
    lengths = decoding or {}
    return Config(
        target=PlantedTargetConfig(name="planted"),
        draft=DRAFTS[draft],
        quant=HqqConfig(name="hqq", **(quant or {})),
        tree=BeamTreeConfig(name="beam", depth=tree[0], width=tree[1]),
        decoding=DecodingConfig(name="greedy", **lengths)
        if sampling is None
        else SamplingConfig(name="sampling", **sampling, **lengths),
        offload=StreamOffloadConfig(name="stream", vram_gib=vram_gib, **offload),
        benchmark=BenchmarkConfig(name="mt_bench"),
        logger=NoLoggerConfig(name="none"),
    )


def with_higgs(config: Config) -> Config:
    """The same with the other quantizer."""
    return replace(config, quant=HiggsConfig(name="higgs"))


def planned(config: Config, shape: str = "qwen2_5_7b", **machine: Any) -> Plan:
    """The plan for a published shape on a machine of which nothing is known but what is said."""
    known = {"link_gb_per_s": None, "host_free": None, "device": None, **machine}
    return plan_run(config, SHAPES[shape](), **known)


def fewer_layers(monkeypatch: pytest.MonkeyPatch, shape: str, layers: int, **changes: Any) -> None:
    """Makes a planted shape smaller, and changes other keys of its configuration."""
    whole = SHAPES[shape]

    def smaller() -> PretrainedConfig:
        config = whole()
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        for key, value in {"num_hidden_layers": layers, **changes}.items():
            setattr(config, key, value)
        return config

    monkeypatch.setitem(SHAPES, shape, smaller)
