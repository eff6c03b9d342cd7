"""Self-speculation: any choice of layers leaves the text alone; the kept layers see exact keys and values."""

import pytest
import torch
from transformers import DynamicCache

from subspec.config.schema import LayerSkipDraftConfig
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.drafts.layer_skip import chosen_layers, drafting_layers, skip_layers, usual_layers
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError
from subspec.utils.rounding import evenly
from tests.helpers.drafts import begin, hf_greedy
from tests.helpers.taught import ALL_POLICIES, PROMPT
from tests.helpers.tiny import FAMILIES, tiny_model


def engine_with(model, layers, policy, **options):
    draft = SubstituteDraft(skip_layers(model, layers), 1.0) if layers else None
    options = {"max_length": 256, "prefill_chunk": 4, **options}
    return Engine(TargetModel(model), draft, policy if layers else None, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=4, std=0.08)


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_greedy_text_is_transformers_own_for_every_tree(model, policy):
    engine = engine_with(model, (0, 1, 3), ALL_POLICIES[policy]())
    for prompt in (PROMPT, PROMPT[::-1]):
        assert engine.generate(prompt, max_new_tokens=25).token_ids == hf_greedy(model, prompt, 25)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers_own_for_every_family(family):
    model = tiny_model(family, layers=3, std=0.08)
    engine = engine_with(model, (0, 2), ALL_POLICIES["beam"]())
    assert engine.generate(PROMPT, max_new_tokens=15).token_ids == hf_greedy(model, PROMPT, 15)


def test_some_of_it_is_accepted_and_all_layers_are_a_perfect_draft(model):
    iterations = {}
    for layers in ((0, 1, 3), (0, 1, 2, 3)):
        result = engine_with(model, layers, ALL_POLICIES["chain"]()).generate(PROMPT, max_new_tokens=1 + 28)
        iterations[len(layers)] = result.stats.iterations
    assert iterations[4] == 4  # depth 6: seven tokens a pass
    assert 4 < iterations[3] < 28


def test_samples_are_those_of_plain_decoding(model):
    sampling = Sampling(0.8, 20, 0.9)
    plain = engine_with(model, None, None, sampling=sampling)
    engine = engine_with(model, (0, 3), ALL_POLICIES["beam"](), sampling=sampling)
    for seed in range(2):
        expected = plain.generate(PROMPT, max_new_tokens=20, seed=seed).token_ids
        assert engine.generate(PROMPT, max_new_tokens=20, seed=seed).token_ids == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_layer_uses_the_cache_rows_of_its_own_number(family):
    """The reference: transformers' own model, its skipped layers made to do nothing, on the target's exact cache."""
    model, layers = tiny_model(family, layers=4), (0, 2, 3)
    engine = engine_with(model, layers, ALL_POLICIES["chain"]())
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        logits = engine.draft.expand(engine.tree, engine.tree.plant(root))
        cache = DynamicCache(config=model.config)
        model(torch.tensor([PROMPT]), past_key_values=cache)
        for index in {0, 1, 2, 3} - set(layers):
            layer = model.model.layers[index]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # nothing is added to the residual
                linear.weight.zero_()
        expected = model(root[None], past_key_values=cache).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_copied_and_the_target_keeps_its_layers():
    model = tiny_model("qwen2", layers=4)
    skipping = skip_layers(model, (0, 3))
    assert {id(p) for p in skipping.parameters()} <= {id(p) for p in model.parameters()}
    assert len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in skipping.model.layers] == [0, 3]


def test_layers_are_spread_with_the_first_and_the_last():
    assert evenly(8, 4) == (0, 2, 5, 7)
    assert evenly(8, 8) == tuple(range(8))
    assert evenly(5, 1) == evenly(1, 1) == (0,)
    assert usual_layers(8) == (0, 2, 5, 7)
    assert usual_layers(1) == (0,)
    for layers in range(2, 40):
        for keep in range(2, layers + 1):
            chosen = evenly(layers, keep)
            assert len(set(chosen)) == keep
            assert (chosen[0], chosen[-1]) == (0, layers - 1)


@pytest.mark.parametrize(
    ("settings", "chosen"), [({}, None), ({"layers": [3, 0]}, (0, 3)), ({"keep": 3}, (0, 2, 4)), ({"keep": 1}, (0,))]
)
def test_what_the_configuration_chooses(settings, chosen):
    assert chosen_layers(LayerSkipDraftConfig(name="layer_skip", **settings), 5) == chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, 5]}, r"draft\.layers: no layer 5 in a target with layers 0\.\.4"),
        ({"layers": []}, r"draft\.layers is empty"),
        ({"layers": [1, 1]}, r"names a layer twice"),
        ({"keep": 6}, r"draft\.keep=6: the target has 5 layers"),
        ({"keep": 0}, r"draft\.keep=0"),
        ({"keep": 2, "layers": [1]}, r"draft\.layers and draft\.keep both"),
    ],
)
def test_layers_that_are_not_there_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        chosen_layers(LayerSkipDraftConfig(name="layer_skip", **settings), 5)


def test_streamed_the_resident_layers_draft_unless_all_are():
    free = LayerSkipDraftConfig(name="layer_skip")
    assert drafting_layers(free, (0, 4, 2), 5) == (0, 2, 4)
    assert drafting_layers(free, range(5), 5) == usual_layers(5)
    assert drafting_layers(LayerSkipDraftConfig(name="layer_skip", layers=[1]), (0, 1, 4), 5) == (1,)
