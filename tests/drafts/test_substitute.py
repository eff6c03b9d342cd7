import pytest
import torch
from transformers import DynamicCache

from subspec.api import build_engine
from subspec.config.enums import Unpack
from subspec.config.schema import BitsByModule, HiggsConfig, HqqConfig
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.cpu_levels import CpuLevels
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import quantize_model
from tests.helpers.assembled import substitute_beside
from tests.helpers.drafts import begin, grow, hf_greedy, substitute_of
from tests.helpers.taught import POLICIES
from tests.helpers.tiny import FAMILIES, tiny_model

PROMPT = [5, 17, 33, 99, 4, 8, 77]


def test_only_the_decoders_linears_are_its_own():
    model = tiny_model("qwen2", layers=2, tie=True)
    substitute = substitute_of(model)
    theirs = {name: p.data_ptr() for name, p in model.named_parameters()}
    own = [name for name, p in substitute.named_parameters() if theirs[name] != p.data_ptr()]
    assert own
    assert all(name.endswith("_proj.weight") for name in own)
    assert substitute.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert substitute.model.layers[0].self_attn.q_proj.bias is model.model.layers[0].self_attn.q_proj.bias


def test_the_target_is_left_as_it_was():
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    substitute_of(model, bits=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: type(module) for name, module in model.named_modules()} == modules


def test_sharing_copies_no_weight():
    model = tiny_model("llama")
    twin = share_parameters(model)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_nodes_logits_are_those_of_its_own_branch_after_the_exact_prefix(family):
    """The reference: the substitute alone, on one branch, with the target's keys and values of the prompt."""
    model = tiny_model(family, layers=2)
    substitute = substitute_of(model)
    draft = SubstituteDraft(substitute)
    policy = Beam(4, 3)
    engine = Engine(TargetModel(model), draft, policy, max_length=64, prefill_chunk=4)
    seen = {}
    expand = draft.expand

    def remember(tree, frontier):
        logits = expand(tree, frontier)
        seen.update(zip(frontier.tolist(), logits, strict=True))
        return logits

    draft.expand = remember
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        tree = engine.tree
        assert len(seen) == 1 + 3 * 3  # the last level is not run through the draft
        for node, logits in seen.items():
            branch = tree.tokens[tree.ancestors[node].nonzero()[:, 0]]
            cache = DynamicCache(config=model.config)
            model(torch.tensor([PROMPT]), past_key_values=cache)
            expected = substitute(branch[None], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_draft_needs_a_positive_temperature():
    with pytest.raises(ValueError, match=r"draft\.temperature"):
        SubstituteDraft(tiny_model("llama"), temperature=0)


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_bits_by_module_and_a_quantized_head_change_no_token(unpack, tie):
    """float32, token for token; the exact LM head chooses, the draft's own only proposes."""
    model = tiny_model("qwen2", layers=2, tie=tie)
    exact = model.get_output_embeddings().weight.clone()
    substitute = share_parameters(model)
    quantizer = HqqQuantizer(
        bits=4,
        bits_by={"gate_proj": 3, "up_proj": 2, "v_proj": 8, "lm_head": 4},
        group_size=32,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        unpack=unpack,
    )
    report = quantize_model(substitute, quantizer, modules=["attention", "mlp", "lm_head"], skip_layers=[1])
    assert report.modules == 8
    assert report.bits | {"gate_proj": 0} == {
        "q_proj": 6.0, "k_proj": 6.0, "v_proj": 10.0, "o_proj": 6.0,
        "gate_proj": 0, "up_proj": 4.0, "down_proj": 6.0, "lm_head": 6.0,
    }  # fmt: skip
    draft = SubstituteDraft(substitute)
    engine = Engine(TargetModel(model), draft, Beam(4, 3), max_length=128, prefill_chunk=4)
    result = engine.generate(PROMPT, max_new_tokens=40)
    assert result.token_ids == hf_greedy(model, PROMPT, 40)
    assert result.stats.iterations < 39
    assert torch.equal(model.get_output_embeddings().weight, exact)
    with torch.inference_mode():
        x = torch.randn(2, model.config.hidden_size)
        assert not torch.equal(draft.model.logits(x), TargetModel(model).logits(x))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_p=0.95)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_levels_on_a_cpu_change_no_token(policy, sampling):
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=128, tie=True)
    engine = build_engine(model, tree_policy=POLICIES[policy](), sampling=sampling, max_length=96)
    plain = build_engine(model, draft="none", sampling=sampling, max_length=96)
    assert isinstance(engine.draft.model, CpuLevels)
    result = engine.generate(PROMPT, max_new_tokens=32, seed=3)
    assert result.token_ids == plain.generate(PROMPT, max_new_tokens=32, seed=3).token_ids
    assert result.stats.iterations < 31


@pytest.mark.parametrize(
    ("draft", "quant", "reason"),
    [
        ({}, HqqConfig(name="hqq"), None),
        ({}, HqqConfig(name="hqq", bits=3, group_size=32, modules=["mlp", "lm_head"], skip_layers=[1]), None),
        ({"unpack": Unpack.always}, HqqConfig(name="hqq"), "draft.unpack=always"),
        ({}, HqqConfig(name="hqq", axis=0, group_size=32), "quant.axis=1"),
        ({}, HqqConfig(name="hqq", bits_by=BitsByModule(k_proj=8)), "differently"),
        ({}, HiggsConfig(name="higgs", group_size=64, hadamard_size=64), "quant=hqq"),
    ],
)
def test_the_record_names_the_kernels_or_why_modules_run(draft, quant, reason):
    model = tiny_model("llama", hidden_size=128, intermediate_size=128)
    built = substitute_beside(model, quant, Beam(2, 2), **draft)
    facts = built.facts()["draft"]
    assert built.quant.modules > 0
    if reason is None:
        assert facts["levels"] == "fused, CPU"
        quantized = (
            {"gate_up", "down", "head"} if "lm_head" in (quant.modules or ()) else {"qkv", "out", "gate_up", "down"}
        )
        assert facts["kernel"].keys() == quantized | {"head"}
        assert "fused" in built.quant.backend
    else:
        assert facts["levels"] == "modules"
        assert reason in facts["reason"]
    tokens = built.engine.generate(PROMPT, max_new_tokens=12).token_ids
    assert tokens == hf_greedy(model, PROMPT, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_p=0.95)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("draft", "policy", "captured"),
    [("subspec", "beam", True), ("subspec", "adaptive", True), ("subspec", "eagle2", False)],
)
def test_beside_a_whole_target_on_a_gpu_levels_are_captured_and_change_no_token(draft, policy, captured, sampling):
    shape = {"hidden_size": 128, "intermediate_size": 256, "heads": 4, "kv_heads": 2}
    model = tiny_model("qwen2", **shape).to("cuda", torch.bfloat16)
    engine = build_engine(model, draft=draft, tree_policy=POLICIES[policy](), sampling=sampling, max_length=96)
    plain = build_engine(model, draft="none", sampling=sampling, max_length=96)
    assert isinstance(engine.draft, CapturedDraft) is captured
    for prompt in (PROMPT, PROMPT[:3]):
        result = engine.generate(prompt, max_new_tokens=60, seed=3)
        assert result.token_ids == plain.generate(prompt, max_new_tokens=60, seed=3).token_ids
        assert result.stats.iterations < 59
