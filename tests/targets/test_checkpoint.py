"""Local folders: every family loads and computes as saved; every broken folder is one clear line."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subspec import build_engine
from subspec.config.schema import Dtype, HubTargetConfig, TargetConfig
from subspec.errors import ConfigError, SubspecError
from subspec.targets import load_target, load_target_config, open_source
from subspec.targets.checkpoint import checkpoint_identity, rounded_type
from subspec.targets.identity import folder_identity
from subspec.targets.weight_files import INDEX
from tests.helpers.tiny import END_ID, FAMILIES, edit_config, edit_weights, shard_weights, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")


def load(path, note=lambda text: None, **config):
    return load_target(HubTargetConfig(name="mine", path=str(path), **config), CPU, note=note)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_folder_loads_as_saved(tmp_path, family, tie, notes):
    target = load(tiny_checkpoint(tmp_path / "t", family, tie=tie), notes.append)
    ids = torch.tensor([[1, 50, 99, 200]])
    assert torch.equal(target.model(ids).logits, tiny_model(family, tie=tie)(ids).logits)
    head, table = target.model.get_output_embeddings().weight, target.model.get_input_embeddings().weight
    assert (target.model.config.model_type, head is table, target.eos_token_ids) == (family, tie, (END_ID,))
    assert target.source == str(tmp_path / "t")
    assert (target.dtype, target.device, target.planted) == (torch.float32, CPU, False)
    assert not target.model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert target.model.config._attn_implementation == "sdpa"
    assert notes == [] == list(target.notes)


def test_sharded_weights(tmp_path):
    index = shard_weights(tiny_checkpoint(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, ConfigError, rf"2 shards \(model-00001-of-00002.safetensors, ...\) without .*{INDEX}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    ids = torch.tensor([[1, 50, 99]])
    assert torch.equal(load(tmp_path).model(ids).logits, tiny_model()(ids).logits)
    (shard := sorted(tmp_path.glob("model-*.safetensors"))[1]).unlink()
    refused(tmp_path, SubspecError, f"lacks {shard.name}")


def test_the_configuration_alone(tmp_path):
    tiny_checkpoint(tmp_path, "qwen3", layers=3)
    (tmp_path / "model.safetensors").unlink()
    config = load_target_config(HubTargetConfig(name="mine", path=str(tmp_path)))
    assert (config.model_type, config.num_hidden_layers) == ("qwen3", 3)


def unending(folder):
    (folder / "generation_config.json").write_text("{}")
    edit_config(folder, eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda folder: None, {"dtype": Dtype.bfloat16}, "float32 are rounded to bfloat16"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), {}, "no chat template"),
        (unending, {}, "length limit only"),
    ],
)
def test_what_a_reader_must_know_is_noted(tmp_path, notes, change, options, words):
    change(tiny_checkpoint(tmp_path))
    target = load(tmp_path, notes.append, **options)
    assert target.dtype is getattr(torch, options.get("dtype", Dtype.float32).value)
    assert (target.eos_token_ids == ()) == (words == "length limit only")
    assert notes == list(target.notes)
    assert len(notes) == 1
    assert words in notes[0]


@pytest.mark.parametrize(
    ("stored", "dtype", "lost"),
    [
        ({"BF16", "F16"}, torch.float32, None),
        ({"BF16"}, torch.bfloat16, None),
        ({"BF16"}, torch.float16, "BF16"),
        ({"F16"}, torch.bfloat16, "F16"),
        ({"BF16", "F32"}, torch.bfloat16, "F32"),
        ({"F64"}, torch.float32, "F64"),
    ],
)
def test_which_conversions_round(stored, dtype, lost):
    assert rounded_type(stored, dtype) == lost


# ------------------------------------------------------------------------------------- broken folders


def refused(path, error, words, **config):
    with pytest.raises(error, match=words) as caught:
        load(path, **config)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_and_a_configuration_that_is_none(tmp_path):
    for path in (tmp_path / "absent", "./absent", "absent"):
        refused(path, ConfigError, "no such folder, and not a hub id")
    refused(tmp_path, ConfigError, "no config.json")
    file = tiny_checkpoint(tmp_path) / "config.json"
    refused(file, ConfigError, "is a file; pass the checkpoint folder")
    refused(tmp_path, ConfigError, "revision is for hub ids", revision="main")
    for text, words in (("{ not json", "cannot be read"), ("[]", "cannot be read"), ("{}", "type None")):
        file.write_text(text)
        refused(tmp_path, ConfigError, words)


OLD_ROPE = {"rope_parameters": None, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "wide"}, "not a valid llama configuration"),
        ({"model_type": "gpt2"}, "'gpt2'.*: llama, mistral, qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized weights \(awq\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_act": "nope"}, "not a valid llama configuration .*nope"),
        ({"sliding_window": "x"}, "not a valid llama configuration"),
        ({"layer_types": ["chunked_attention"] * 2}, "layers of type chunked_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
        (OLD_ROPE | {"rope_theta": "x"}, "not a valid llama configuration"),
        (OLD_ROPE | {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope type su is not supported"),
        (OLD_ROPE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic rotary embeddings"),
        (OLD_ROPE | {"rope_scaling": {"type": None, "factor": 2.0}}, "not a valid llama configuration"),
    ],
)
def test_models_that_are_not_supported(tmp_path, change, words):
    edit_config(tiny_checkpoint(tmp_path), **change)
    refused(tmp_path, ConfigError, words)


def tensors(change):
    return lambda folder: edit_weights(folder, change)


def written(file, text):
    return lambda folder: (folder / file).write_text(text)


def indexed(text):
    """Instead of the weights an index."""
    return lambda folder: (folder / "model.safetensors").rename(folder / INDEX).write_text(text)


def moved(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def named_elsewhere(folder):
    moved("model.fp16.safetensors")(folder)
    edit_config(folder, transformers_weights="model.fp16.safetensors")


UP, LFS = (
    "model.layers.0.mlp.up_proj.",
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n",
)
SETTINGS = ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((written(file, LFS), rf"{file} is a Git LFS pointer.*`git lfs pull`") for file in SETTINGS),
        (indexed(LFS), rf"{INDEX} is a Git LFS pointer.*`git lfs pull`"),
        *((indexed(t), "index.json cannot be read") for t in ("{}", "[]", "{", '{"weight_map": {"a": 1}}')),
        (indexed('{"weight_map": {}}'), "index.json cannot be read"),
        (moved("pytorch_model.bin"), r"no model.safetensors or \S+ \(it has .bin\).*save_pretrained.*target\.path"),
        (moved("weights"), "holds no weights"),
        (moved("model.fp16.safetensors"), r"\(it has model.fp16.safetensors\)"),
        (named_elsewhere, "keeps its weights in model.fp16.safetensors"),
        (written("adapter_config.json", "{}"), "holds an adapter"),
        (written("tokenizer.json", "{}"), "tokenizer of mine cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (tensors(lambda t: t.update({UP + "weight": t[UP + "weight"].to(torch.uint8)})), "holds U8 weights"),
        (tensors(lambda t: t.update({UP + "qweight": t.pop(UP + "weight").int()})), "holds I32 weights"),
        (tensors(lambda t: t.pop("lm_head.weight")), "lacks weights of a llama language model: lm_head"),
        (lambda folder: edit_config(folder, intermediate_size=96), r"\[128, 64\], its config.json says \[96, 64\]"),
        (lambda folder: tiny_model(vocab_size=300).save_pretrained(folder), "id 319, .* vocabulary ends at 299"),
    ],
)  # fmt: skip
def test_damaged_and_incomplete_folders(tmp_path, change, words):
    change(tiny_checkpoint(tmp_path))
    refused(tmp_path, SubspecError, words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", r"holds an adapter .*merge_and_unload.*target\.path=FOLDER"),
        ("model.q4.gguf", "GGUF file is not read"),
        ("snapshots/1234/config.json", r"target\.path=\S+/snapshots/1234"),
        ("checkpoint-500/config.json", r"target\.path=\S+/checkpoint-500"),
    ],
)
def test_folders_of_another_kind(tmp_path, file, words):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    refused(tmp_path, ConfigError, words)


def test_of_two_sets_of_weights_transformers_own_choice_is_read(tmp_path, notes):
    """By every reader: whole, layer by layer, and digests."""
    norm = "model.norm.weight"
    expected = load_file(tiny_checkpoint(tmp_path) / "model.safetensors")
    before = folder_identity(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(shard_weights(tmp_path, **{norm: expected[norm] + 1})))
    config = HubTargetConfig(name="mine", path=str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).model.norm.weight
    target = load(tmp_path, notes.append)
    streamed = open_source(config, torch.float32, CPU, note=notes.append).shared(CPU)[norm]
    assert torch.equal(whole, expected[norm])
    assert torch.equal(target.model.model.norm.weight, whole)
    assert torch.equal(streamed, whole)
    assert folder_identity(tmp_path) == before
    assert "the shards beside it are not" in notes[0]


def test_surplus_buffers_are_ignored(tmp_path, notes):
    """Neither refused as quantized nor named as rounded."""
    state = load_file(tiny_checkpoint(tmp_path) / "model.safetensors")
    expected = load(tmp_path).model(torch.tensor([[1, 50]])).logits
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    state["model.position_ids"] = torch.arange(9)[None]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = load(tmp_path, notes.append, dtype=Dtype.bfloat16)
    assert notes == []
    assert torch.allclose(target.model(torch.tensor([[1, 50]])).logits.float(), expected, atol=0.1, rtol=0.1)


def test_added_tokens_beyond_the_vocabulary(tmp_path, notes):
    tokenizer = load(tiny_checkpoint(tmp_path)).tokenizer
    tokenizer.add_tokens(["[PAD]"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    target = load(tmp_path, notes.append)
    assert "no prompt may hold [PAD]" in notes[0]
    assert max(target.chat_ids([{"role": "user", "content": "hi"}])) < 320
    engine = build_engine(target.model, tokenizer=target.tokenizer, draft="none")
    with pytest.raises(SubspecError, match="outside the target's vocabulary of 320"):
        engine.generate(target.chat_ids([{"role": "user", "content": "a [PAD]"}]))


@pytest.mark.parametrize(
    ("template", "words"), [("{{ messages[0].content + 1 }}", "fails"), ("{# nothing #}", "an empty prompt")]
)
def test_a_chat_template_that_fails_is_refused_before_weights_are_read(tmp_path, monkeypatch, template, words):
    (tiny_checkpoint(tmp_path) / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("subspec.targets.load.build_model", None)
    refused(tmp_path, ConfigError, f"chat template of mine.*{words}")


def test_code_beside_a_tokenizer_is_not_run_and_not_asked_about(tmp_path, capsys):
    settings = {"auto_map": {"AutoTokenizer": ["tokens.Own", None]}, "tokenizer_class": "Own"}
    (tiny_checkpoint(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(tmp_path, ConfigError, "tokenizer of mine cannot be read")
    assert "run the custom code" not in capsys.readouterr().out


def test_damaged_weights(tmp_path):
    file = tiny_checkpoint(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    other = struct.pack("<Q", 12) + b"not a header" + bytes(50)
    for content in (b"", whole[:4], whole[:100], whole[:-1000], whole + b"more", other):
        file.write_bytes(content)
        refused(tmp_path, SubspecError, r"model\.safetensors is damaged")


def test_an_unknown_kind_of_target():
    with pytest.raises(ConfigError, match="no kind of target"):
        load_target(TargetConfig(name="odd"), CPU)


def test_a_folder_is_known_by_its_place_and_dates_and_a_commit_by_its_name(tmp_path, monkeypatch):
    """However the folder was spelled: two that are called the same from two places are two."""
    for place in ("a", "b"):
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "model" / "model.safetensors").write_bytes(b"12345678")
    found = []
    for place in ("a", "b"):
        monkeypatch.chdir(tmp_path / place)
        found.append(checkpoint_identity(Path("model"), "model"))
    assert found[0] != found[1] == checkpoint_identity(tmp_path / "b" / "model", str(tmp_path / "b" / "model"))
    file = tmp_path / "b" / "model" / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"7654321\0"[: before.st_size])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been written
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size
    assert checkpoint_identity(Path("model"), "model") != found[1]
    found[1] = checkpoint_identity(Path("model"), "model")
    os.utime(file, ns=(1, 1))
    assert checkpoint_identity(Path("model"), "model") != found[1]
    assert checkpoint_identity(Path("model"), "org/model@1234") == "org/model@1234\nmodel.safetensors 8"
