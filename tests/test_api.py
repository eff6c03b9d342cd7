"""The engine as a library: every draft from one call, refused in one line where it cannot be."""

from dataclasses import replace

import pytest
import torch

from subspec import build_engine, generate
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.growth import Beam
from subspec.decoding.sampling import Sampling
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.own_cache import OwnCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError, SubspecError
from subspec.quant.hqq import HqqQuantizer
from tests.helpers.drafts import hf_greedy
from tests.helpers.eagle import SHAPES, published
from tests.helpers.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

PROMPT = [5, 17, 33, 99, 4, 250]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=3)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    tiny_checkpoint(root / "small_model", "qwen2", layers=1)
    published(root / "eagle2", SHAPES["qwen2"])
    published(root / "wide", replace(SHAPES["wide heads"], hidden=48))
    tiny_checkpoint(root / "other", "llama", vocab_size=300)
    return root


DRAFTS = {
    "subspec": SubstituteDraft,
    "small_model": OwnCacheDraft,
    "eagle2": EagleDraft,
    "layer_skip": SubstituteDraft,
}


def path_of(places, draft):
    return places / draft if draft in ("small_model", "eagle2") else None


@pytest.mark.parametrize("growth", [None, Beam(4, 1), Eagle2(3, 4, 12)], ids=["usual", "chain", "eagle2"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_text_is_transformers_own_whatever_drafts(model, places, draft, growth):
    options = {"draft": draft, "draft_path": path_of(places, draft), "growth": growth, "max_length": 200}
    engine = build_engine(model, tokenizer=tiny_tokenizer(), **options)
    assert isinstance(engine.draft, DRAFTS[draft])
    assert engine.draft.temperature == (0.2 if draft == "subspec" else 1.0)
    assert engine.generate(PROMPT, max_new_tokens=40, ignore_eos=True).token_ids == hf_greedy(
        model, PROMPT, 40
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_samples_are_those_of_plain_decoding(model, places, draft):
    options = {"sampling": Sampling(1.0), "max_new_tokens": 24, "seed": 3, "max_length": 200}
    plain = generate(model, PROMPT, draft="none", **options)
    ours = generate(
        model, PROMPT, draft=draft, draft_path=path_of(places, draft), growth=Beam(4, 3), **options
    )
    assert ours.token_ids == plain.token_ids
    assert plain.stats.iterations == len(plain.token_ids) - 1


def test_half_of_the_layers_draft(model):
    engine = build_engine(model, draft="layer_skip", draft_temperature=0.5)
    assert len(engine.draft.decoder.base.layers) == 2
    assert engine.draft.temperature == 0.5
    assert len(model.model.layers) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"draft": "medusa"},
            r"draft=medusa: no such draft; use none, subspec, small_model, eagle2, layer_skip",
        ),
        ({"draft": "subspec", "draft_path": "{root}/eagle2"}, r"draft=subspec has no weights of its own"),
        ({"draft": "none", "draft_path": "{root}/eagle2"}, r"draft=none has no weights of its own"),
        ({"draft": "eagle2", "draft_path": "{root}/nowhere"}, r"draft_path=.*nowhere: no such folder"),
        ({"draft": "eagle2", "draft_path": "{root}/wide"}, r"hidden size 48, and LlamaForCausalLM has 64"),
        ({"draft": "eagle2"}, r"the shipped EAGLE head is a head for targets of hidden size 576"),
        (
            {"draft": "small_model"},
            r"the shipped small model \(49152 tokens\) and target LlamaForCausalLM \(320",
        ),
        (
            {"draft": "small_model", "draft_path": "{root}/other"},
            r"different vocabularies|number their tokens",
        ),
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
