"""Block heads against their papers, written out slot by slot, and against plain decoding."""

import math
from dataclasses import replace

import pytest
import torch

from subspec import build_engine
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, IterationOutcome, level_mass
from subspec.drafts.block_head import MARKOV, BlockHead
from subspec.drafts.eagle_checkpoint import load_head, locate_head, sort_tensors
from subspec.errors import ConfigError
from tests.drafts.test_eagle3 import rms, rotated
from tests.helpers.blocks import BLOCKS, published_block
from tests.helpers.drafts import begin, grow, hf_greedy
from tests.helpers.eagle import drafted_paths, random_head
from tests.helpers.taught import POLICIES, PROMPT, draft_engine
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", layers=8)


@pytest.fixture(scope="module")
def text(model):
    return PROMPT + hf_greedy(model, PROMPT, 36)


# ------------------------------------------------------------------------------------------------ the papers


def plain_block(w, shape, model, text, root):
    """Normed hidden states of every slot behind ``text`` and ``root``, one slot and one head at a time."""
    hidden = model.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    states = [hidden[layer + 1][0] for layer in shape.layers]
    features = [
        rms(w["fc.weight"] @ torch.cat([s[i] for s in states]), w["hidden_norm.weight"], shape.eps)
        for i in range(len(text))
    ]
    table = w.get("embed_tokens.weight", model.get_input_embeddings().weight)
    slots = [table[root]] + [table[shape.mask_id]] * (shape.block - 1)
    for number in range(shape.decoder_layers):

        def own(name, x, number=number):
            key = f"layers.{number}.{name}"
            return w[f"{key}.weight"] @ x + w.get(f"{key}.bias", 0)

        def heads(kind, x, position, number=number):
            found = list(own(f"self_attn.{kind}_proj", x).split(shape.head_dim))
            if kind == "v":
                return found
            norm = w[f"layers.{number}.self_attn.{kind}_norm.weight"]
            return [rotated(rms(head, norm, shape.eps), position, shape.rope["rope_theta"]) for head in found]

        normed = [rms(x, w[f"layers.{number}.input_layernorm.weight"], shape.eps) for x in slots]
        sources = features + normed
        keys, values = ([heads(kind, x, i) for i, x in enumerate(sources)] for kind in "kv")
        after = []
        for slot, x in enumerate(slots):
            seen = len(text) + (slot + 1 if shape.causal else shape.block)
            attended = []
            for head, query in enumerate(heads("q", normed[slot], len(text) + slot)):
                group = head * shape.kv_heads // shape.heads
                scores = torch.stack([query @ key[group] / math.sqrt(shape.head_dim) for key in keys[:seen]])
                weights = scores.softmax(0)
                attended.append(sum(a * value[group] for a, value in zip(weights, values, strict=False)))
            middle = x + own("self_attn.o_proj", torch.cat(attended))
            x = rms(middle, w[f"layers.{number}.post_attention_layernorm.weight"], shape.eps)
            gated = torch.nn.functional.silu(own("mlp.gate_proj", x)) * own("mlp.up_proj", x)
            after.append(middle + own("mlp.down_proj", gated))
        slots = after
    return [rms(x, w["norm.weight"], shape.eps) for x in slots]


def plain_logits(w, shape, model, slots, path):
    """Logits behind ``path``, which begins with the root."""
    hidden = slots[len(path) - 1 + (not shape.shifted)]
    logits = w.get("lm_head.weight", model.lm_head.weight) @ hidden
    if shape.markov:
        logits = logits + w["markov_head.markov_w2.weight"] @ w["markov_head.markov_w1.weight"][path[-1]]
    return logits


@pytest.mark.parametrize(
    ("shape", "policy"), [*((shape, "eagle2") for shape in BLOCKS), ("dflash", "chain"), ("dspark", "beam")]
)
@torch.inference_mode()
def test_every_level_is_the_papers_before_and_after_acceptance(model, text, shape, policy):
    engine = draft_engine(model, POLICIES[policy](), shape, future=text)
    w, shape = engine.draft.head.state_dict(), BLOCKS[shape]
    for seen, paths in drafted_paths(engine, PROMPT):
        assert max(len(path) for path, _ in paths) == min(shape.levels, engine.policy.max_depth)
        slots = plain_block(w, shape, model, seen, paths[0][0][0])
        for path, logits in paths:
            expected = plain_logits(w, shape, model, slots, path)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert len(seen) > len(PROMPT) + 3  # more than the three roots


@torch.inference_mode()
def test_the_confidence_heads_estimate_stops_an_adaptive_tree(model):
    """Of each level: the mean over its parents by their probability, times that of the levels above."""
    for name in ("dspark", "bare dspark"):
        engine = draft_engine(model, Beam(4, 3), name)
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        tree, head, shape = engine.tree, engine.draft.head, BLOCKS[name]
        w = head.state_dict()
        slots, expected = plain_block(w, shape, model, PROMPT, int(root)), 1.0
        for level in range(4):
            parents = torch.arange(tree.size)[tree.depths[: tree.size] == level]
            share, total = tree.scores[parents].softmax(0), 0.0
            for node, weight in zip(parents.tolist(), share, strict=True):
                features = [slots[level]]
                if shape.confidence > shape.hidden:
                    features.append(w["markov_head.markov_w1.weight"][tree.tokens[node]])
                logit = w["confidence_head.proj.weight"] @ torch.cat(features)
                total += float(weight * (logit + w["confidence_head.proj.bias"]).sigmoid())
            expected *= total
        assert float(level_mass(tree)) == pytest.approx(expected, rel=1e-4)
        assert Tree(4, torch.device("cpu")).confidence is None
    depths = []
    for bias in (9.0, -9.0):  # sure of all, sure of nothing
        adaptive = Adaptive(4, 3, level_cost=0.2, check_every=1, min_depth=1)
        adaptive.learn(IterationOutcome(4, 13, (3,), 0.0, 1.0))
        engine = draft_engine(model, adaptive, "dspark")
        engine.draft.head.confidence_head["proj"].bias.fill_(bias)
        grow(engine, begin(engine, PROMPT), 10)
        depths.append(engine.tree.levels)
    assert depths == [4, 1]


# ---------------------------------------------------------------------------------------------- checkpoints


def read(folder):
    files = locate_head(str(folder), print)
    options = {"hidden": 64, "target": "it", "kind": BlockHead}
    return load_head(files, dtype=torch.float32, device=torch.device("cpu"), **options)


@pytest.mark.parametrize(("name", "method"), zip(BLOCKS, ("DFlash", "JetSpec", "DSpark", "DSpark"), strict=True))
def test_published_heads_are_told_apart_load_and_run(tmp_path, capsys, model, text, name, method):
    folder = published_block(tmp_path, name)
    loaded = read(folder)
    assert loaded.head.shape == replace(BLOCKS[name], max_positions=40960)
    assert loaded.head.shape.method == method
    for key, tensor in random_head(BLOCKS[name], std=0.1).state_dict().items():
        assert torch.equal(loaded.head.state_dict()[key], tensor.bfloat16().float())
    # Its own config.json and tensors are read back as the same head.
    again = BlockHead.from_tensors(loaded.head.state_dict(), loaded.head.shape.config())
    assert again.shape == loaded.head.shape
    engine = build_engine(model, draft="block_head", draft_path=folder, tree_policy=Eagle2(9, 3, 12), max_length=40)
    assert engine.draft.wants.layers == (1, 4, 6)
    assert f"tree.depth=9: the {method} head drafts {BLOCKS[name].levels} levels" in capsys.readouterr().err
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == text[len(PROMPT) :][:12]


@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        ((4096, 32, 8, 128, 12288, 151936, 36), {"dflash_config": {"mask_token_id": 151669}, "block_size": 16}),
        ((4096, 32, 8, 128, 14336, 128256, 32), {"dflash_config": {"mask_token_id": 128255}, "block_size": 10}),
        ((4096, 32, 8, 128, 12288, 151936, 36), {"markov_rank": 256, "mask_token_id": 151669, "block_size": 7}),
    ],
    ids=["DFlash for Qwen3-8B", "DFlash for Llama-3.1-8B", "DSpark for Qwen3-8B"],
)
def test_heads_of_published_sizes_are_built(sizes, own):
    hidden, heads, kv_heads, head_dim, intermediate, vocab, layers = sizes
    linears = {"q": (heads * head_dim, hidden), "k": (kv_heads * head_dim, hidden), "o": (hidden, heads * head_dim)}
    linears["v"] = linears["k"]
    shapes = {"fc.weight": (hidden, 5 * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for layer in (f"layers.{index}." for index in range(5)):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": size for name, size in linears.items()}
        shapes |= {f"{layer}self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if "markov_rank" in own:
        shapes |= dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), (vocab, hidden))
        shapes |= {f"markov_head.markov_w{number}.weight": (vocab, 256) for number in (1, 2)}
        shapes |= {"confidence_head.proj.weight": (1, hidden + 256), "confidence_head.proj.bias": (1,)}
    config = {
        "num_attention_heads": heads, "num_hidden_layers": 5, "num_target_layers": layers, "vocab_size": vocab,
        "target_layer_ids": [1, 9, 17, 25, layers - 3], "rope_theta": 1e6, **own,
    }  # fmt: skip
    tensors = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in shapes.items()}
    kept, dropped = sort_tensors(tensors, "it", config, BlockHead)
    assert (kept.keys(), dropped) == (tensors.keys(), [])
    shape = BlockHead.from_tensors(kept, config).shape
    assert shape.levels == (7 if shape.method == "DSpark" else own["block_size"] - 1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "dflash",
            {"drop": ("layers.2.self_attn.q_norm.weight",), "extra": {"a.b": torch.ones(2)}},
            r"no block head: missing layers\.2\.self_attn\.q_norm\.weight; surplus a\.b: set draft",
        ),
        ("dflash", {"num_hidden_layers": 2}, r"surplus layers\.2\.input_layernorm\.weight, .* more: set"),
        ("dflash", {"block_size": 1}, "block_size=1: .* at least 2"),
        ("dflash", {"dflash_config": {"mask_token_id": None}}, "mask_token_id=None"),
        ("dflash", {"dflash_config": {"mask_token_id": 320}}, r"mask_token_id=320 .* set draft_path"),
        ("dflash", {"dflash_config": {"target_layer_ids": None}}, "lacks target_layer_ids"),
        ("dflash", {"dflash_config": {"target_layer_ids": [1, 2]}}, r"3 hidden states behind .* \[1, 2\]"),
        ("dflash", {"num_target_layers": 36}, r"36 layers \(num_target_layers\), .* has 8"),
        ("dflash", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention in layer_types"),
        ("dflash", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
        ("dspark", {"markov_head_type": "rnn"}, "markov_head_type=rnn"),
        ("dspark", {"drop": ("markov_head.markov_w2.weight",)}, r"markov_w2\.weight as \[\] where \[320, 12\]"),
        (
            "dspark",
            {"extra": {name: torch.ones(300, 12) for name in MARKOV}},
            "Markov head knows 300 tokens",
        ),
        ("dspark", {"extra": {"confidence_head.proj.weight": torch.ones(1, 70)}}, r"\[1, 70\] where \[1, 76\]"),
        ("dspark", {"extra": {"layers.1.self_attn.q_proj.bias": torch.ones(64)}}, r"q_proj\.bias as \[64\] where \[\]"),
        ("dspark", {"extra": {"fc.weight": torch.ones(64, 200)}}, r"fc\.weight as \[64, 200\].*, 64"),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused_in_one_line(tmp_path, model, name, options, words):
    folder = published_block(tmp_path, name, **options)
    with pytest.raises(ConfigError, match=words) as caught:
        build_engine(model, draft="block_head", draft_path=folder)
    assert "\n" not in str(caught.value)
