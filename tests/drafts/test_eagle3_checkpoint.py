"""EAGLE-3 heads in every published format: read, run, planned, converted, refused in one line."""

import json
import sys
from dataclasses import replace

import convert_eagle
import pytest
import torch
from safetensors.torch import load_file

from subspec import build_engine
from subspec.decoding.eagle2 import Eagle2
from subspec.drafts.eagle3_head import Eagle3Head
from subspec.drafts.eagle_checkpoint import head_shape, load_head, locate_head
from subspec.errors import ConfigError
from tests.helpers.blocks import published_block
from tests.helpers.drafts import hf_greedy
from tests.helpers.eagle import SHAPES, SHAPES3, published, published3, random_head
from tests.helpers.tiny import tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
PROMPT = [5, 17, 33, 99, 4]
TARGET = tiny_model("llama", layers=8)


def shape_in(folder, hidden=64):
    return head_shape(locate_head(str(folder), print), hidden, "the target", Eagle3Head)


def loaded(folder):
    files = locate_head(str(folder), print)
    return load_head(files, hidden=64, target="it", dtype=torch.float32, device=CPU, kind=Eagle3Head)


def feature_layers(folder, target=TARGET):
    return shape_in(folder).wants(target.config).layers


@pytest.mark.parametrize(
    ("name", "layout", "dropped", "layers"),
    [
        ("official", "official", ["t2d"], (1, 3, 4)),
        ("official", "renamed", ["t2d"], (1, 3, 4)),
        ("speculators", "speculators", ["t2d"], (1, 3, 4)),
        ("deepspec", "deepspec", [], (1, 2, 3, 4, 5)),
        ("narrow", "official", [], (4,)),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_published_heads_load_and_run(tmp_path, family, name, layout, dropped, layers):
    folder = published3(tmp_path, name, layout=layout)
    head, model = loaded(folder), tiny_model(family, layers=8)
    assert head.dropped == dropped
    assert head.head.shape == SHAPES3[name]
    for key, tensor in random_head(SHAPES3[name]).state_dict().items():
        assert torch.equal(head.head.state_dict()[key], tensor if key == "d2t" else tensor.bfloat16().float())
    engine = build_engine(model, draft="eagle3", draft_path=folder, tree_policy=Eagle2(3, 3, 8), max_length=40)
    assert engine.draft.wants.layers == layers
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == hf_greedy(model, PROMPT, 12)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, (1, 3, 4)),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, (1, 3, 7)),  # vLLM: the layer that is entered
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 7]}}, (0, 3, 7)),  # SGLang: that is left
        ({"target_layer_ids": [0, 3, 7]}, (0, 3, 7)),  # DeepSpec: that is left
    ],
)
def test_feature_layers_are_those_of_the_configuration(tmp_path, config, layers):
    assert feature_layers(published3(tmp_path, "official", **config)) == layers


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_configuration_may_be_nested_twice(tmp_path, wrapped):
    config = json.loads((published3(tmp_path, "speculators") / "config.json").read_text())
    if wrapped:
        config["speculators_config"]["transformer_layer_config"] = config.pop("transformer_layer_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_in(tmp_path) == SHAPES3["speculators"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "official",
            {"drop": ("midlayer.hidden_norm.weight",), "extra": {"a.b": torch.ones(2)}},
            r"no EAGLE-3 head: missing layers\.0\.hidden_norm\.weight; surplus a\.b: set draft",
        ),
        ("official", {"drop": ("d2t",)}, "lacks d2t"),
        ("official", {"drop": ("lm_head.weight",)}, r"lacks lm_head\.weight"),
        ("official", {"extra": {"d2t": torch.arange(160.0)}}, "d2t does not hold the offset"),
        ("official", {"extra": {"d2t": -torch.arange(160) - 1}}, "d2t does not hold the offset"),
        ("official", {"extra": {"d2t": torch.full((160,), 400)}}, r"ids up to 559, .* vocabulary has 320"),
        ("official", {"extra": {"d2t": torch.zeros(9, dtype=torch.int64)}}, r"d2t as \[9\] where \[160\]"),
        ("deepspec", {"drop": ("layers.0.self_attn.k_norm.weight",)}, r"k_norm\.weight as \[\] where \[24\]"),
        ("narrow", {"drop": ("embed_tokens.weight",)}, r"lacks embed_tokens\.weight.* hidden size 40"),
        ("official", {"extra": {"fc.weight": torch.ones(64, 200)}}, r"fc\.weight as \[64, 200\].*, 64"),
        ("official", {"eagle_aux_hidden_state_layer_ids": [2, 4]}, r"3 hidden states behind .* \[1, 3\]"),
        ("official", {"eagle_aux_hidden_state_layer_ids": [0, 4, 6]}, r"\[-1, 3, 5\] .* layers 0\.\.7"),
        ("official", {"target_layer_ids": [1, 4, 8]}, r"\[1, 4, 8\]"),
        ("speculators", {"norm_before_fc": True}, "norm_before_fc=true"),
        ("official", {"extra": {"fc.weight": torch.ones(64, 192).to(torch.int8)}}, r"fc\.weight as torch\.int8"),
        ("official", {"eagle_config": 3}, r"config\.json is not valid"),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_one_line(tmp_path, name, options, words):
    folder = published3(tmp_path, name, **options)
    with pytest.raises(ConfigError, match=words) as caught:
        build_engine(TARGET, draft="eagle3", draft_path=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "words", "drafts"),
    [
        (lambda to: published3(to, "official"), "is an EAGLE-3 head: set draft=eagle3", ("eagle2", "block_head")),
        (lambda to: published3(to, "official", layout="renamed"), "is an EAGLE-3 head: set draft=eagle3", ("eagle2",)),
        (
            lambda to: published(to, SHAPES["llama3"]),
            "is an EAGLE-1 or EAGLE-2 head: set draft=eagle2",
            ("eagle3", "block_head"),
        ),
        (lambda to: published_block(to, "dflash"), "is a block head: set draft=block_head", ("eagle2", "eagle3")),
        (tiny_checkpoint, r"whole language model.*draft=small_model", ("eagle2", "eagle3", "block_head")),
    ],
)
def test_the_draft_that_reads_a_head_of_another_kind_is_named(tmp_path, write, words, drafts):
    folder = write(tmp_path / "head")
    for draft in drafts:
        with pytest.raises(ConfigError, match=words):
            build_engine(TARGET, draft=draft, draft_path=folder)


@pytest.mark.parametrize("name", ["official", "speculators", "deepspec", "narrow"])
def test_the_script_converts_and_a_run_reads_the_same_head(tmp_path, capsys, monkeypatch, name):
    source = published3(tmp_path / "source", name)
    for target, options in (("out", []), ("shared", ["--share-tables"]))[: 1 + (name == "deepspec")]:
        arguments = ["convert_eagle.py", str(source), str(tmp_path / target), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        assert convert_eagle.main() == 0, capsys.readouterr().err
    assert "read back bit for bit" in capsys.readouterr().out
    before, after = loaded(source), loaded(tmp_path / "out")
    assert after.head.shape == before.head.shape
    assert after.dropped == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in before.head.state_dict().items():
        assert torch.equal(stored[key].to(tensor.dtype), tensor)
        assert stored[key].dtype == (torch.int64 if key == "d2t" else torch.bfloat16)
    if name == "deepspec":
        shape = replace(before.head.shape, draft_vocab=0, embeddings=0)
        assert loaded(tmp_path / "shared").head.shape == shape
