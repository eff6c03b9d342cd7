"""Planted targets: shapes of the real models, the same bits at every call, and a map that behaves like a text."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subspec.config.schema import Device, PlantedTargetConfig
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError, SubspecError
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import quantize_model
from subspec.targets import load_target, load_target_config, open_source, planted, resolve_device
from subspec.targets.meta_model import count_parameters, empty_model
from subspec.targets.planted import SHAPES, PlantedSource, Scales, layers_rms
from subspec.targets.planted_tokenizer import MIN_VOCAB, planted_tokenizer
from subspec.targets.source import build_model
from tests.targets.test_checkpoint_source import assert_same

CPU = torch.device("cpu")
META = torch.device("meta")
PUBLISHED = {
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "llama3_1_8b": 8_030_261_248,
    "qwen2_5_1_5b": 1_543_714_304,
    "llama3_2_1b": 1_235_814_400,
}
"""Numbers of parameters of the real models."""


def made(shape="tiny", dtype=torch.float32, device=CPU, **config):
    return PlantedSource(PlantedTargetConfig(name=f"planted_{shape}", shape=shape, **config), dtype, device)


# --------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", ["qwen2_5_7b", "llama3_1_8b", "tiny", "tiny_tied"])
def test_shapes_are_those_of_the_architecture(shape):
    source = made(shape, device=META)
    model = empty_model(SHAPES[shape](), torch.bfloat16, META)
    mine = dict(source._shared_shapes)
    for index in range(source.config.num_hidden_layers):
        mine |= {f"model.layers.{index}.{name}": size for name, size in source.layer_shapes(index).items()}
    assert mine == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert source.tokenizer.vocab_size == len(source.tokenizer) == source.config.vocab_size


def test_shapes_are_as_large_as_published():
    sizes = {name: count_parameters(SHAPES[name]()) for name in SHAPES}
    assert sizes.items() >= PUBLISHED.items()
    for name in ("qwen2_5_1_5b", "llama3_2_1b"):
        assert SHAPES[name]().tie_word_embeddings
        assert not SHAPES[f"{name}_untied"]().tie_word_embeddings


@pytest.mark.parametrize(
    ("shape", "theta", "eps", "positions"),
    [("qwen2_5_7b", 1e6, 1e-6, 32768), ("qwen2_5_32b", 1e6, 1e-6, 32768), ("llama3_1_8b", 5e5, 1e-5, 131072)],
)
def test_what_shapes_do_not_show(shape, theta, eps, positions):
    config = SHAPES[shape]()
    rope = config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"]) == (theta, "llama3" if "llama" in shape else "default")
    assert (config.rms_norm_eps, config.max_position_embeddings, config.initializer_range) == (eps, positions, 0.02)
    assert (config.tie_word_embeddings, config.eos_token_id) == (False, None)


# --------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["tiny", "tiny_tied"])
def test_the_same_bits_at_every_call(shape, dtype):
    first, second = made(shape, dtype), made(shape, dtype)
    second.layer(0, CPU)  # the order of the calls must not matter
    for ask in (lambda source: source.layer(2, CPU), lambda source: source.shared(CPU)):
        again, other = ask(first), ask(second)
        for name, tensor in ask(first).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, again[name])
            assert torch.equal(tensor, other[name])
            assert tensor.data_ptr() != again[name].data_ptr()  # nothing is kept


def test_every_tensor_is_its_own():
    source = made()
    one, two = source.layer(0, CPU), source.layer(1, CPU)
    assert not torch.equal(one["mlp.up_proj.weight"], two["mlp.up_proj.weight"])
    assert not torch.equal(one["mlp.up_proj.weight"], one["mlp.gate_proj.weight"])
    other = made(seed=1)
    assert not torch.equal(one["mlp.up_proj.weight"], other.layer(0, CPU)["mlp.up_proj.weight"])
    assert not torch.equal(source.successor, other.successor)
    std = source.config.initializer_range
    assert one["mlp.up_proj.weight"].std() == pytest.approx(std, rel=0.02)
    assert one["self_attn.q_proj.bias"].std() == pytest.approx(std, rel=0.2)
    assert (one["input_layernorm.weight"] == 1).all()
    with pytest.raises(IndexError, match="no layer 8"):
        source.layer(8, CPU)


def test_a_sample_tells_other_draws_apart(monkeypatch):
    """What the name of a shape stands for may change, and a GPU of the same name may draw other numbers."""
    mine = made("tiny_tied", torch.bfloat16)
    for index in range(2):
        sample, whole = mine.sample(index), mine.layer(index, CPU)
        assert sample
        assert {name for name, tensor in whole.items() if tensor.dim() == 1} < sample.keys()
        for name, tensor in sample.items():
            assert torch.equal(tensor, whole[name] if tensor.dim() == 1 else whole[name][:1])
    shape = SHAPES["tiny_tied"]

    def wider():
        config = shape()
        config.initializer_range *= 2
        return config

    monkeypatch.setitem(SHAPES, "tiny_tied", wider)
    other = made("tiny_tied", torch.bfloat16)
    assert other.identity == mine.identity
    assert any(not torch.equal(other.sample(0)[name], tensor) for name, tensor in mine.sample(0).items())


def test_tables_are_never_whole_in_float32(monkeypatch):
    """A bf16 head of 152064 rows must not pass through a float32 copy: only a few rows at a time may."""
    source, largest = made(dtype=torch.bfloat16), 0
    whole = source.shared(CPU)["lm_head.weight"]
    monkeypatch.setattr(planted, "CHUNK_ROWS", 100)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.element_size() > 2:
                largest = max(largest, result.numel())
            return result

    with Watch():
        head = source.shared(CPU)["lm_head.weight"]
        source.layer(0, CPU)
    assert 0 < largest <= 100 * source.config.hidden_size
    assert torch.equal(head, whole)


# ---------------------------------------------------------------------------------------------------- the map


def test_the_map_is_one_cycle_with_the_asked_share_of_hard_tokens():
    source = made(hard_share=0.25)
    token, seen = 0, set()
    for _ in range(source.config.vocab_size):
        token = int(source.successor[token])
        seen.add(token)
    assert token == 0
    assert len(seen) == source.config.vocab_size
    assert int(source.hard.sum()) == round(0.25 * source.config.vocab_size)


def test_head_rows_are_the_embeddings_of_their_predecessors():
    source = made()
    shared = source.shared(CPU)
    embedding, head = shared["model.embed_tokens.weight"], shared["lm_head.weight"][source.successor]
    cosine = torch.nn.functional.cosine_similarity(embedding, head, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    norms, scales = head.norm(dim=1), source.scales
    torch.testing.assert_close(norms[~source.hard], torch.full_like(norms[~source.hard], scales.row))
    torch.testing.assert_close(norms[source.hard], torch.full_like(norms[source.hard], scales.hard_row))


def test_the_scales_of_the_large_shapes_are_the_measured_ones():
    """A quarter, and 0.3, give the acceptance of real text on a 7B shape."""
    scales = Scales(SHAPES["qwen2_5_7b"]())
    assert scales.ratio == pytest.approx(0.25)
    assert scales.hard_row / scales.row == pytest.approx(0.30, abs=0.005)
    for shape in ("qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "llama3_1_8b"):
        scales = Scales(SHAPES[shape]())
        assert scales.ratio == pytest.approx(0.25)
        assert scales.hard_row / scales.row * scales.easy == pytest.approx(scales.rival)
        assert scales.easy > scales.rival + 9
        assert 25 < scales.easy * scales.row < 35


@pytest.fixture(scope="module")
def tiny():
    """The shipped tiny target and its 4-bit substitute, and a text of 160 tokens."""
    source = made(hard_share=0.15)
    model = build_model(source, CPU)
    substitute = share_parameters(model)
    quantizer = HqqQuantizer(compute_dtype=torch.float32, device=CPU, unpack=True)
    quantize_model(substitute, quantizer, modules=["attention", "mlp"], skip_layers=[])
    prompt = torch.randint(0, 4096, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = Engine(TargetModel(model), SubstituteDraft(substitute), Beam(16, 4), max_length=1024)
    result = engine.generate(prompt, max_new_tokens=160)
    return source, model, substitute, prompt, result


@torch.inference_mode()
def test_the_text_follows_the_map_and_the_substitute_mostly_agrees(tiny):
    source, model, substitute, prompt, result = tiny
    text = torch.tensor([prompt + result.token_ids])
    logits, guessed = (graph(text).logits[0, 63:-1] for graph in (model, substitute))
    token = text[0, 63:-1]
    chosen, hard = logits.argmax(-1), source.hard[token]
    follows = chosen == source.successor[token]
    assert follows[~hard].float().mean() > 0.99
    assert 0.2 < follows[hard].float().mean() < 0.8
    agrees = (guessed.argmax(-1) == chosen).float().mean()
    within = (guessed.topk(6).indices == chosen[:, None]).any(-1).float().mean()
    assert 0.88 < agrees < 0.98
    assert agrees + 0.01 < within < 1
    assert len(set(result.token_ids)) > 120  # no loop


def test_acceptance_is_like_that_of_a_real_text_and_a_deep_tree_is_not_wasted(tiny):
    _, model, substitute, prompt, result = tiny
    assert 10 < result.stats.verified_tokens / result.stats.iterations < 16.5
    engine = Engine(TargetModel(model), SubstituteDraft(substitute), Beam(48, 6), max_length=512)
    deep = engine.generate(prompt, max_new_tokens=70)
    assert deep.token_ids == result.token_ids[:70]  # lossless for any tree
    assert 15 < deep.stats.verified_tokens / deep.stats.iterations < 35


@torch.inference_mode()
def test_the_layers_matter(tiny):
    """The embedding is the smaller part of what the LM head sees, and its size is as derived from the shape."""
    source, model, _, prompt, _ = tiny
    seen, ids = [], torch.tensor([prompt])
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(ids).logits
    added = seen.pop() - model.model.embed_tokens(ids)
    rms = float(added.square().mean().sqrt())
    assert rms == pytest.approx(layers_rms(source.config), rel=0.1)
    assert source.scales.embedding / rms == pytest.approx(source.scales.ratio, rel=0.1)
    handle.remove()
    other = build_model(made(seed=9), CPU)
    disturbed = share_parameters(model)
    disturbed.model.layers = other.model.layers
    changed = disturbed(ids).logits
    assert (changed.argmax(-1) == logits.argmax(-1)).float().mean() < 0.95
    assert torch.corrcoef(torch.stack([logits.flatten(), changed.flatten()]))[0, 1] < 0.5


@pytest.mark.parametrize("vocab", [2048, 8192])
@torch.inference_mode()
def test_the_rule_transfers_to_another_width_and_depth(monkeypatch, vocab):
    config = SHAPES["tiny"]()
    config.update({"hidden_size": 512, "intermediate_size": 1536, "vocab_size": vocab})
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    config.head_dim, config.initializer_range = 64, 0.05
    monkeypatch.setitem(SHAPES, "other", lambda: config)
    source = made("other", hard_share=0.5)
    ids = torch.randint(0, vocab, (1, 256), generator=torch.Generator().manual_seed(0))
    follows = build_model(source, CPU)(ids).logits[0].argmax(-1) == source.successor[ids[0]]
    hard = source.hard[ids[0]]
    assert follows[~hard].float().mean() > 0.98
    assert 0.3 < follows[hard].float().mean() < 0.8


def test_tied_embeddings_have_no_map():
    source = made("tiny_tied")
    assert not source.hard.any()
    assert torch.equal(source.successor, torch.arange(source.config.vocab_size))
    assert list(source.shared(CPU)) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert "acceptance means nothing" in source.notes[0]


# -------------------------------------------------------------------------------------------------- tokenizer


def test_text_and_ids_go_both_ways():
    tokenizer = made().tokenizer
    text = "Naïve\n  12 × <b> 漢字 <7> 🙂"
    ids = tokenizer(text).input_ids
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1234, 72, 4095, 300]) == "<1234>H<4095><300>"
    assert tokenizer("<1234>H<4095><300>").input_ids == [1234, 72, 4095, 300]
    assert max(tokenizer("<4096><99999>").input_ids) < 256  # no such ids: plain text
    assert all(isinstance(tokenizer.decode([token], skip_special_tokens=True), str) for token in range(MIN_VOCAB + 9))
    with pytest.raises(ValueError, match="259"):
        planted_tokenizer(MIN_VOCAB - 1, 512)


def test_the_chat_template():
    target = load_target(PlantedTargetConfig(name="p", shape="tiny"), CPU, note=lambda text: None)
    ids = target.chat_ids([{"role": "user", "content": "Hi"}])
    assert target.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert max(ids) < MIN_VOCAB


# --------------------------------------------------------------------------------------------------- as target


@pytest.mark.parametrize("shape", ["tiny", "tiny_tied"])
def test_the_whole_model_is_the_layers(shape):
    notes = []
    config = PlantedTargetConfig(name=f"planted_{shape}", shape=shape)
    target = load_target(config, resolve_device(Device.cpu), note=notes.append)
    source = open_source(config, torch.float32, CPU, note=notes.append)
    assert_same(source, target.model)
    assert (target.planted, target.source) == (source.planted, source.source) == (True, source.source)
    assert "planted" in target.source
    assert target.eos_token_ids == source.eos_token_ids == ()
    assert target.model.config.tie_word_embeddings == (shape == "tiny_tied")
    assert target.model.generation_config.eos_token_id is None
    assert notes == [*target.notes, *source.notes]
    assert "no language model" in notes[0]


MISTAKES = [("shape", "gpt5"), ("hard_share", 1.5), ("hard_share", float("nan")), ("seed", -1)]


@pytest.mark.parametrize(("key", "value"), MISTAKES)
def test_mistakes(key, value):
    config = PlantedTargetConfig(**{"name": "p", "shape": "tiny", key: value})
    for door in (load_target_config, lambda config: load_target(config, CPU)):
        with pytest.raises(ConfigError, match=f"target.{key}={value}: "):
            door(config)


def test_a_model_too_large_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("subspec.targets.device.free_memory", lambda where: 10 * 2**30)
    with pytest.raises(SubspecError, match=r"need 28\.4 GiB of memory and 10\.0 GiB are free"):
        load_target(PlantedTargetConfig(name="p", shape="qwen2_5_7b"), CPU)
