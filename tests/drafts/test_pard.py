"""PARD and PARD-2 against one pass of transformers per block, against plain decoding, and as checkpoints and plans."""

from dataclasses import replace

import pytest
import torch

from subspec import build_engine
from subspec.config.schema import Eagle2TreeConfig, PardDraftConfig, to_config
from subspec.decoding.audit import Auditor
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.tree_policy import Beam
from subspec.drafts.check_config import check_config
from subspec.drafts.pard import WARP
from subspec.errors import ConfigError
from subspec.session import weights_identity
from tests.config.test_config import composed
from tests.helpers.assembled import streamed, streamed_settings
from tests.helpers.drafts import hf_greedy
from tests.helpers.eagle import drafted_paths
from tests.helpers.taught import PARD_LEVELS, PARD_TOKEN, PARDS, POLICIES, PROMPT, draft_engine, pard_model, projection
from tests.helpers.tiny import edit_config, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
PARD2 = {"pard2": True, "pard2_target_layers": [-1, -4, 2], "pard2_target_dim": 192, "pard2_scale": 0.5}
"""As the shape of ``PARDS["pard2"]``."""


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", layers=8)


@pytest.fixture(scope="module")
def text(model):
    return PROMPT + hf_greedy(model, PROMPT, 36)


@pytest.mark.parametrize(("kind", "policy"), [("pard", "eagle2"), ("pard2", "beam"), ("pard2", "chain")])
@torch.no_grad()
def test_every_block_is_one_causal_pass_over_the_whole_text(model, text, kind, policy):
    engine, small = draft_engine(model, POLICIES[policy](), kind, future=text), pard_model()
    for seen, paths in drafted_paths(engine, PROMPT):
        assert max(len(path) for path, _ in paths) == PARD_LEVELS
        ids = torch.tensor([[*seen, paths[0][0][0]] + [PARD_TOKEN] * (PARD_LEVELS - 1)])
        embeddings = small.get_input_embeddings()(ids)
        if kind == "pard2":
            hidden = model.model(torch.tensor([seen]), output_hidden_states=True).hidden_states
            states = torch.cat([hidden[-1], hidden[-4], hidden[2]], dim=-1)[0]
            rows = torch.cat([torch.zeros(1, 192), states, states[-1:].expand(PARD_LEVELS - 1, -1)])
            embeddings = embeddings + 0.5 * (rows @ projection().T)
        logits = small(inputs_embeds=embeddings).logits[0, -PARD_LEVELS:]
        for path, found in paths:
            torch.testing.assert_close(found, logits[len(path) - 1], rtol=1e-3, atol=1e-4)
    assert len(seen) > len(PROMPT) + 3  # more than the three roots


def test_a_text_may_fill_the_context(model):
    engine = draft_engine(model, Beam(8, 2), "pard2", max_length=40)
    engine.draft.cache.max_length = 40
    assert engine.generate(PROMPT).token_ids == hf_greedy(model, PROMPT, 40 - len(PROMPT))


# ---------------------------------------------------------------------------------------------- checkpoints


def published(folder, warp=None, **config):
    """A PARD checkpoint; of PARD-2 with ``warp``, the tensors of its second file."""
    tiny_checkpoint(folder, "llama", layers=2, hidden_size=32, seed=3)
    edit_config(folder, **{"pard_token": PARD_TOKEN} | (PARD2 if warp is not None else {}) | config)
    if warp:
        torch.save(warp, folder / WARP)
    return folder


@pytest.mark.parametrize("warp", [None, {"target_proj.weight": projection()}], ids=["PARD", "PARD-2"])
def test_published_models_load_and_run(tmp_path, capsys, model, text, warp):
    folder = published(tmp_path, warp)
    engine = build_engine(model, draft="pard", draft_path=folder, tree_policy=Eagle2(14, 3, 12), max_length=40)
    assert (engine.draft.levels, engine.draft.wants) == (12, PARDS["pard2" if warp else "pard"].wants)
    assert "tree.depth=14: a pass drafts draft.block=12 levels" in capsys.readouterr().err
    if warp:
        torch.testing.assert_close(engine.draft.model.projection, 0.5 * projection())
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == text[len(PROMPT) :][:12]


def test_the_identity_covers_the_projection(tmp_path):
    config = streamed_settings(PardDraftConfig(name="pard", path=str(tmp_path)))
    found = set()
    for scale in (None, 1.0, 2.0):
        published(tmp_path, {"target_proj.weight": scale * projection()} if scale else None, **PARD2)
        found.add(weights_identity(config, print)["draft"])
    assert len(found) == 3


@pytest.mark.parametrize(
    ("warp", "config", "words"),
    [
        (None, {"pard_token": None}, r"pard_token=None, .* draft=small_model"),
        (None, {"pard_token": 320}, r"pard_token=320"),
        ({}, {}, rf"lacks {WARP}"),
        ({"target_proj.weight": torch.ones(32, 64)}, {}, r"target_proj\.weight of \[32, 192\]"),
        ({"target_proj.weight": projection(), "a": torch.ones(1)}, {}, r"target_proj\.weight of"),
        ({}, {"pard2_target_layers": [-1, -9, 2]}, r"192 features .*\[-1, -9, 2\] \(pard2_target_layers\)"),
        ({}, {"pard2_target_layers": [2, -1, -4]}, r"pard2_target_layers"),  # the final states are not the first
        ({}, {"pard2_target_layers": None}, r"pard2_target_layers"),
        ({}, {"pard2_target_dim": 16384}, r"projects 16384 features .* hidden size 64"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_one_line(tmp_path, model, warp, config, words):
    folder = published(tmp_path, warp, **config)
    with pytest.raises(ConfigError, match=words) as caught:
        build_engine(model, draft="pard", draft_path=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], r"draft=pard ships no model: set draft\.path"),
        (["draft.path=a/b", "draft.block=0"], r"draft\.block=0 must be at least 1"),
        (["draft.path=a/b", "draft.quantize=true", "quant=none"], r"draft\.quantize=true needs a quantizer"),
        (["draft.path=a/b", "draft.quantize=true", "offload=stream"], r"draft\.quantize=true is not built"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        check_config(to_config(composed("draft=pard", *options)))
    check_config(to_config(composed("draft=pard", "draft.path=a/b", "tree=eagle2", "offload=stream")))


# -------------------------------------------------------------------------------------------------- streamed


@pytest.mark.parametrize("kind", ["planted", "pard2"])
@pytest.mark.parametrize("tree", ["beam", "eagle2"])
def test_a_streamed_target_takes_what_was_planned_and_passes_the_audit(tmp_path, kind, tree):
    path = "planted:tiny_draft"
    if kind == "pard2":
        path = tmp_path
        tiny_checkpoint(path, "llama", layers=2, hidden_size=32, vocab_size=4096)
        for file in path.glob("tokenizer*"):  # tokens as the planted target's
            file.unlink()
        edit_config(path, pard_token=5, **PARD2 | {"pard2_target_dim": 768})
        torch.save({"target_proj.weight": torch.randn(32, 768)}, path / WARP)
    config = streamed_settings(PardDraftConfig(name="pard", path=str(path), block=4), resident_layers=2)
    if tree == "eagle2":
        config = replace(config, tree=Eagle2TreeConfig(name="eagle2", depth=6, width=3, total_tokens=12))
    with streamed(config) as (plan, assembly):
        found = {item.name: item.bytes for item in plan.items}
        assert found["small model's KV"] == assembly.engine.draft.cache.nbytes
        assert ("projection" in found) == (kind == "pard2")
        prompt = [5, 17, 33, 99]
        result = assembly.engine.generate(prompt, max_new_tokens=12)
        audit = Auditor(assembly.target, assembly.sampling).audit(prompt, result.token_ids)
        assert audit.mismatch == 0
        assert assembly.draft_facts["method"] == ("PARD" if kind == "planted" else "PARD-2")
        assert assembly.draft_facts["block"] == (3 if tree == "beam" else 4)
