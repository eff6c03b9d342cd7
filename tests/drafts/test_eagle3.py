"""EAGLE-3 against the paper, written out token by token, and against plain decoding."""

import math

import pytest
import torch

from subspec.decoding.draft import Draft
from subspec.decoding.tree_policy import Beam
from subspec.drafts.eagle import EagleDraft
from tests.helpers.drafts import begin, grow, hf_greedy
from tests.helpers.eagle import SHAPES3, drafted_paths
from tests.helpers.taught import POLICIES, PROMPT, draft_engine
from tests.helpers.tiny import tiny_model

ENTERED = {"official": (2, 4, 5), "speculators": (2, 4, 5), "deepspec": (2, 3, 4, 5, 6), "narrow": (5,)}
"""The layers that the features enter, of eight; transformers numbers its hidden states so. ``shared``: see below."""


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", layers=8)


# ------------------------------------------------------------------------------------------------- the paper


def rms(x, weight, eps):
    return weight * x / (x.square().mean() + eps).sqrt()


def rotated(head, position, theta):
    first, second = head.chunk(2)
    angles = position / theta ** (torch.arange(len(first)) / len(first))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def plain_head(w, shape, model, text, branch):
    """Logits behind ``text`` and ``branch``: the text's features are the target's, the branch's the head's own."""
    hidden = model.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    name = next(name for name, known in SHAPES3.items() if known is shape)
    entered = ENTERED.get(name) or (8, 1)
    states = [behind_last_layer(model, text) if layer == 8 else hidden[layer][0] for layer in entered]
    table = w.get("embed_tokens.weight", model.get_input_embeddings().weight)
    features = [w["fc.weight"] @ torch.cat([s[i] for s in states]) + w.get("fc.bias", 0) for i in range(len(text))]
    keys, values = [], []
    for position, token in enumerate((text + branch)[1:]):
        feature = features[position]
        own = rms(feature, w["layers.0.hidden_norm.weight"], shape.eps)
        x = torch.cat([rms(table[token], w["layers.0.input_layernorm.weight"], shape.eps), own])
        heads = {}
        for kind in "qkv":
            projected = w[f"layers.0.self_attn.{kind}_proj.weight"] @ x
            projected = projected + w.get(f"layers.0.self_attn.{kind}_proj.bias", 0)
            heads[kind] = list(projected.split(shape.head_dim))
            if kind != "v":
                if shape.qk_norm:
                    norm = w[f"layers.0.self_attn.{kind}_norm.weight"]
                    heads[kind] = [rms(head, norm, shape.eps) for head in heads[kind]]
                heads[kind] = [rotated(head, position, shape.rope["rope_theta"]) for head in heads[kind]]
        keys.append(heads["k"])
        values.append(heads["v"])
        attended = []
        for number, query in enumerate(heads["q"]):
            group = number * shape.kv_heads // shape.heads
            scores = torch.stack([query @ key[group] / math.sqrt(shape.head_dim) for key in keys]).softmax(0)
            attended.append(sum(score * value[group] for score, value in zip(scores, values, strict=True)))
        out = w["layers.0.self_attn.o_proj.weight"] @ torch.cat(attended)
        residual = own if shape.norm_before_residual else feature
        middle = residual + out + w.get("layers.0.self_attn.o_proj.bias", 0)
        x = rms(middle, w["layers.0.post_attention_layernorm.weight"], shape.eps)
        gate, up, down = (w[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        feature = middle + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        if position >= len(text) - 1:
            features.append(feature)  # before the norm
    logits = w.get("lm_head.weight", model.lm_head.weight) @ rms(feature, w["norm.weight"], shape.eps)
    wide = torch.full((320,), -torch.inf)
    for number, value in enumerate(logits[:320]):
        wide[number + int(w["d2t"][number]) if "d2t" in w else number] = value
    return wide


def behind_last_layer(model, text):
    """The residual stream behind the last layer, which transformers does not return without the final norm."""
    seen = []
    hook = model.model.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    model.model(torch.tensor([text]))
    hook.remove()
    return seen[0][0] if seen[0].ndim == 3 else seen[0]


@pytest.mark.parametrize(
    ("shape", "policy"), [*((shape, "eagle2") for shape in SHAPES3), ("official", "beam"), ("deepspec", "chain")]
)
@torch.inference_mode()
def test_every_row_and_level_is_the_papers_before_and_after_acceptance(model, shape, policy):
    engine = draft_engine(model, POLICIES[policy](), shape, future=PROMPT + hf_greedy(model, PROMPT, 42), std=0.08)
    head = engine.draft.head
    for text, paths in drafted_paths(engine, PROMPT):
        for path, logits in paths[:: max(1, len(paths) // 3)]:
            expected = plain_head(head.state_dict(), head.shape, model, text, list(path))
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=3e-4)
    assert len(text) > len(PROMPT) + 3  # more than the three roots


@pytest.mark.parametrize("policy", POLICIES)
def test_choosing_among_the_heads_own_ids_gives_the_tree_of_the_targets_ids(model, policy):
    found = []
    for extend in (EagleDraft.extend, Draft.extend):
        engine = draft_engine(model, POLICIES[policy](), "official")
        engine.draft.extend = extend.__get__(engine.draft)
        with torch.inference_mode():
            grow(engine, begin(engine, PROMPT), 10)
        tree = engine.tree
        found.append([tree.tokens[: tree.size], tree.parents[: tree.size], tree.scores[: tree.size]])
    for own, wide in zip(*found, strict=True):
        torch.testing.assert_close(own, wide)
    head = engine.draft.head
    known = set((head.d2t + torch.arange(160)).tolist())
    assert set(found[0][0][1:].tolist()) <= known != set(range(160))


def test_a_tree_wider_than_the_heads_vocabulary_is_still_a_tree(model):
    engine = draft_engine(model, Beam(2, 200), "speculators")
    assert engine.generate(PROMPT, max_new_tokens=5).token_ids == hf_greedy(model, PROMPT, 5)
