"""The engine as a library: every draft from one call, refused in one line where it cannot be."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from subspec import build_engine, generate
from subspec.api import PATHS
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree_policy import Beam
from subspec.drafts.block_draft import BlockDraft
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.pard import PardDraft
from subspec.drafts.prompt_lookup import PromptLookupDraft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError, SubspecError
from subspec.quant.hqq import HqqQuantizer
from tests.helpers.blocks import published_block
from tests.helpers.drafts import hf_greedy
from tests.helpers.eagle import SHAPES, published, published3
from tests.helpers.tiny import edit_config, tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPT = [5, 17, 33, 99, 4, 250]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    tiny_checkpoint(root / "small_model", "qwen2", layers=1)
    edit_config(tiny_checkpoint(root / "pard", "llama", layers=1), pard_token=300)
    published(root / "eagle2", SHAPES["qwen2"])
    published3(root / "eagle3", "shared", target_layer_ids=[0, 1])
    ids = {"target_layer_ids": [0, 1, 2]}
    published_block(root / "block_head", "jetspec", num_target_layers=3, dflash_config=ids)
    published(root / "wide", replace(SHAPES["wide heads"], hidden=48))
    tiny_checkpoint(root / "other", "llama", vocab_size=300)
    return root


DRAFTS = {
    "subspec": SubstituteDraft,
    "small_model": SeparateCacheDraft,
    "eagle2": EagleDraft,
    "eagle3": EagleDraft,
    "block_head": BlockDraft,
    "pard": PardDraft,
    "layer_skip": SubstituteDraft,
    "prompt_lookup": PromptLookupDraft,
}


def path_of(places, draft):
    return places / draft if draft in PATHS else None


@pytest.mark.parametrize("tree_policy", [None, Eagle2(3, 4, 12)], ids=["usual", "eagle2"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_text_is_transformers_own_whatever_drafts(model, places, draft, tree_policy):
    options = {"draft": draft, "draft_path": path_of(places, draft), "tree_policy": tree_policy}
    engine = build_engine(model, tokenizer=tiny_tokenizer(), max_length=200, **options)
    assert isinstance(engine.draft, DRAFTS[draft])
    assert engine.draft.temperature == (0.2 if draft == "subspec" else 1.0)
    text = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True).token_ids
    assert text == hf_greedy(model, PROMPT, 24)


@pytest.mark.parametrize("draft", DRAFTS)
def test_samples_are_those_of_plain_decoding(model, places, draft):
    options = {"sampling": Sampling(1.0), "max_new_tokens": 24, "seed": 3, "max_length": 200}
    plain = generate(model, PROMPT, draft="none", **options)
    options |= {"draft_path": path_of(places, draft), "tree_policy": Beam(4, 3)}
    ours = generate(model, PROMPT, draft=draft, **options)
    assert ours.token_ids == plain.token_ids
    assert plain.stats.iterations == len(plain.token_ids) - 1


def test_half_of_the_layers_draft(model):
    engine = build_engine(model, draft="layer_skip", draft_temperature=0.5)
    assert len(engine.draft.model.base.layers) == 2
    assert engine.draft.temperature == 0.5
    assert len(model.model.layers) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "medusa"}, r"draft=medusa: .* use none, subspec, small_model, eagle2, eagle3, block_head, pard"),
        ({"draft": "subspec", "draft_path": "{root}/eagle2"}, r"draft=subspec has no weights of its own"),
        ({"draft": "none", "draft_path": "{root}/eagle2"}, r"draft=none has no weights of its own"),
        ({"draft": "eagle2", "draft_path": "{root}/nowhere"}, r"draft_path=.*nowhere: no such folder"),
        ({"draft": "eagle2", "draft_path": "{root}/wide"}, r"hidden size 48, and LlamaForCausalLM has 64"),
        ({"draft": "eagle2"}, r"the shipped EAGLE-1 or EAGLE-2 head is a head for targets of hidden size 576"),
        ({"draft": "small_model"}, r"small model \(49152 tokens\) and target LlamaForCausalLM \(320"),
        ({"draft": "small_model", "draft_path": "{root}/other"}, r"different vocabularies|number their tokens"),
        ({"draft": "small_model", "draft_path": "nowhere"}, r"nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_cannot_draft_is_refused_in_one_line(model, places, options, message):
    options = {key: value.format(root=places) for key, value in options.items()}
    with pytest.raises(SubspecError, match=message) as refused:
        build_engine(model, tokenizer=tiny_tokenizer(), **options)
    assert "\n" not in str(refused.value)


def test_a_quantizer_is_the_substitutes_alone(model):
    quantizer = HqqQuantizer(bits=3, group_size=32, compute_dtype=torch.float32, device=CPU, unpack=True)
    build_engine(model, quantizer=quantizer)
    with pytest.raises(ConfigError, match="a quantizer is for draft=subspec"):
        build_engine(model, draft="layer_skip", quantizer=quantizer)


# --------------------------------------------------------------------------------------------------- lengths


def test_without_a_length_it_is_2048_or_the_models_positions():
    assert build_engine(tiny_model("llama"), draft="none").max_length == 512
    assert build_engine(tiny_model("llama", max_positions=4096), draft="none").max_length == 2048
    with pytest.raises(ConfigError, match="max_length=513 exceeds the 512 positions"):
        build_engine(tiny_model("llama"), draft="none", max_length=513)


def test_a_small_model_of_fewer_positions_is_refused(model, tmp_path):
    folder = tiny_checkpoint(tmp_path, "qwen2", layers=1, max_positions=100)
    options = {"draft": "small_model", "draft_path": folder}
    with pytest.raises(ConfigError, match=r"max_length=200 .*100 positions of the small model"):
        build_engine(model, max_length=200, **options)
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"]}
    edit_config(folder, max_position_embeddings=4096, **window)
    with pytest.raises(ConfigError, match=r"max_length=200 .*window of 64 tokens of the small model"):
        build_engine(model, max_length=200, **options)


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_length", value) for value in (0, 1, -5, 64.0, True, "64")],
        *[("prefill_chunk", value) for value in (0, -1, 2.0, True, None)],
        *[("draft_temperature", value) for value in (0, -1.0, float("nan"), float("inf"), "1", True)],
        ("tree_policy", (4, 2)),
        ("tree_policy", Beam(2, 321)),
        *(("sampling", 0.7), ("sampling", {"temperature": 0.7}), ("tokenizer", "ORG/NAME"), ("quantizer", "hqq")),
        *(("draft_path", ""), ("draft", "Subspec"), ("draft", None)),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_by_name(model, name, value):
    options = {"draft": "eagle2"} if name == "draft_path" else {}
    with pytest.raises(ConfigError, match=name) as refused:
        build_engine(model, **options | {name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("prompt_ids", value) for value in ([], torch.tensor([[5, 6], [7, 8]]), [5.0, 6.0], [True], "the")),
        *(("stop", value) for value in ("", [5])),
        *(("seed", value) for value in (-1, 1.5, None)),
        *(("max_new_tokens", value) for value in (0, 4.0, True)),
    ],
)
def test_arguments_of_generate_are_checked_before_anything_is_built(model, monkeypatch, name, value):
    monkeypatch.setattr("subspec.api.build_engine", lambda *arguments, **options: pytest.fail("built"))
    options = {"prompt_ids": PROMPT, "tokenizer": tiny_tokenizer(), name: value}
    with pytest.raises(ValueError, match=name) as refused:
        generate(model, **options)
    assert isinstance(refused.value, ConfigError)


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(ConfigError, match=r"stop=.*tokenizer"):
        generate(model, PROMPT, stop="the")


def test_one_string_is_one_stop_string(model):
    options = {"tokenizer": tiny_tokenizer(), "draft": "layer_skip", "max_new_tokens": 16, "max_length": 200}
    whole = generate(model, PROMPT, **options).text
    stop = whole[5:8]
    for given in (stop, [stop]):
        result = generate(model, torch.tensor([PROMPT]), stop=given, **options)
        assert result.text == whole[: whole.index(stop)]
        assert result.finish_reason == "stop"


# ------------------------------------------------------------------------------------------ what is not applied


def test_generation_settings_that_are_not_applied_are_warned_of(model):
    asking, samples = copy.copy(model), {"do_sample": True, "temperature": 0.7, "top_k": 20}
    asking.generation_config = GenerationConfig(repetition_penalty=1.05, eos_token_id=[2, 7], **samples)
    said = r"repetition_penalty=1\.05.*do_sample=true with temperature=0\.7, top_k=20"
    with pytest.warns(UserWarning, match=said):
        engine = build_engine(asking, draft="none")
    assert engine.eos_token_ids == (2, 7)
    with pytest.warns(UserWarning, match=r"repetition_penalty=1\.05") as told:
        build_engine(asking, draft="none", sampling=Sampling(0.7))
    assert len(told) == 1
    assert "do_sample" not in str(told[0].message)


def test_defaults_are_not_warned_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_engine(model, draft="none")
        build_engine(model, draft="none", sampling=Sampling(1.0))
