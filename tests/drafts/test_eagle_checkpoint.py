"""Heads in the published format: read, run, refused in words."""

import json
import re
import sys

import convert_eagle
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from subspec.config.schema import (
    BlockHeadDraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    EmbeddedTargetConfig,
    HubTargetConfig,
    to_config,
)
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.drafts import shipped
from subspec.drafts.check_config import check_config
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.eagle_checkpoint import head_shape, load_head, locate_for, locate_head
from subspec.drafts.eagle_head import ATTENTION, MLP, NORM
from subspec.errors import ConfigError, SubspecError
from tests.config.test_config import composed
from tests.helpers.drafts import hf_greedy
from tests.helpers.eagle import SHAPES, published, random_head
from tests.helpers.fake_hub import COMMIT, FakeHub
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
PROMPT = [5, 17, 33, 99, 4]


def loaded(folder, hidden=64, dtype=torch.float32, notes=None):
    files = locate_head(str(folder), (notes if notes is not None else []).append)
    return load_head(files, hidden=hidden, target="the target", dtype=dtype, device=CPU)


def refused(words, *arguments, error=ConfigError, **options):
    with pytest.raises(error, match=words) as caught:
        loaded(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "shape", "options"),
    [
        ("qwen2", "qwen2", {"binary": True}),
        ("llama", "llama3", {}),
        ("llama", "llama3", {"prefix": "module.ea_layer.", "binary": True}),
    ],
    ids=["qwen2 .bin", "llama 3.1 safetensors", "prefixed"],
)
def test_published_heads_load_and_run(tmp_path, family, shape, options):
    head = loaded(published(tmp_path / "head", SHAPES[shape], seed=3, **options))
    assert head.dropped == [options.get("prefix", "") + "embed_tokens.weight"]
    assert head.head.shape == SHAPES[shape]
    for name, tensor in random_head(SHAPES[shape], 3).state_dict().items():
        assert torch.equal(head.head.state_dict()[name], tensor.bfloat16().float())
    model = tiny_model(family, layers=2)
    policy = Eagle2(4, 3, 20)
    decoder = TargetModel(model)
    assert head.head.shape.kv_heads == (4 if shape == "qwen2" else 2)
    assert decoder.num_kv_heads == 2
    engine = Engine(decoder, EagleDraft(head.head, decoder, policy), policy, max_length=64, prefill_chunk=2)
    assert engine.generate(PROMPT, max_new_tokens=20).token_ids == hf_greedy(model, PROMPT, 20)


@pytest.mark.parametrize("binary", [False, True])
def test_sizes_are_read_without_the_weights(tmp_path, binary):
    folder = published(tmp_path / "head", SHAPES["qwen2"], binary=binary)
    assert head_shape(locate_head(str(folder), print), 64, "the target") == SHAPES["qwen2"]


def test_safetensors_are_preferred_and_stored_frequencies_dropped(tmp_path):
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folder = published(tmp_path / "head", SHAPES["qwen2"], extra=extra)
    (folder / "pytorch_model.bin").write_bytes(b"rubbish")
    assert loaded(folder).dropped == ["embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq"]


OTHER_NORM = {"norm.weight": torch.ones(64)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"drop": ("layers.0.mlp.up_proj.weight", NORM), "extra": OTHER_NORM | {"o.weight": torch.ones(4, 64)}},
            r"no EAGLE-1 or EAGLE-2 head: missing layers\.0\.mlp\.up_proj\.weight, "
            r"layers\.0\.post_attention_layernorm\.weight; surplus norm\.weight, o\.weight: set draft\.path",
        ),
        (
            {"extra": {f"layers.{i}.self_attn.q_proj.weight": torch.zeros(64, 64) for i in range(1, 9)}},
            r"surplus layers\.1\..*layers\.6\.self_attn\.q_proj\.weight and 2 more",
        ),
        ({"drop": ("fc.weight",)}, r"missing fc\.weight"),
        # Heads of another kind.
        ({"extra": {"d2t": torch.zeros(9), "midlayer.mlp.up_proj.weight": torch.zeros(2, 2)}}, "is an EAGLE-3 head"),
        ({"extra": OTHER_NORM, "architectures": ["LlamaForCausalLMEagle3"]}, "is an EAGLE-3 head"),
        ({"extra": OTHER_NORM, "speculators_model_type": "eagle"}, "layout of the speculators library"),
        ({"extra": {"0.0.linear.weight": torch.ones(4, 4)}}, "Medusa"),
        # Wrong shapes and types.
        ({"extra": {"fc.weight": torch.zeros(64, 192)}}, r"fc\.weight as \[64, 192\], not as \[H, 2 H\].*EAGLE-3"),
        ({"extra": {f"{MLP}down_proj.weight": torch.zeros(64, 9)}}, r"down_proj\.weight as \[64, 9\] where \[64, 128"),
        ({"extra": {f"{ATTENTION}v_proj.weight": torch.zeros(9, 64)}}, r"v_proj\.weight as \[9, 64\] where \[64, 64\]"),
        ({"extra": {f"{ATTENTION}q_proj.weight": torch.zeros(65, 64)}}, r"q_proj and k_proj have 65 and 64 outputs"),
        ({"extra": {"fc.weight": torch.zeros(64, 128, dtype=torch.int8)}}, r"fc\.weight as torch\.int8"),
        ({"extra": {"fc.weight": torch.zeros(64, 128).to(torch.float8_e4m3fn)}}, r"fc\.weight as torch\.float8_e4m3fn"),
        # Invalid configurations.
        ({"rms_norm_eps": "x"}, r"config\.json is not valid"),
        ({"max_position_embeddings": None}, r"config\.json is not valid"),
        ({"rope_parameters": [1]}, r"config\.json is not valid"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"config\.json is not valid"),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_one_line(tmp_path, options, words):
    refused(words, published(tmp_path / "head", SHAPES["qwen2"], **options))


def test_a_copy_of_the_lm_head_and_vllms_nested_configuration_are_read(tmp_path):
    folder = published(tmp_path / "head", SHAPES["llama3"], extra={"lm_head.weight": torch.ones(4, 64)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "eagle", "model": config}))
    head = loaded(folder)
    assert head.dropped == ["embed_tokens.weight", "lm_head.weight"]
    assert head.head.shape == SHAPES["llama3"]


@pytest.mark.parametrize("binary", [False, True])
def test_git_lfs_pointers_are_named(tmp_path, binary):
    folder = published(tmp_path / "head", SHAPES["llama3"], binary=binary)
    for file in ("pytorch_model.bin" if binary else "model.safetensors", "config.json"):
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\n")
        refused(f"{file} is a Git LFS pointer", folder)


def test_a_head_for_another_hidden_size_is_refused_with_both(tmp_path):
    folder = published(tmp_path / "head", SHAPES["qwen2"])
    refused("hidden size 64, and the target has 96: set draft.path", folder, hidden=96)
    with pytest.raises(ConfigError, match="hidden size 64, and another has 96"):
        head_shape(locate_head(str(folder), print), 96, "another")


class Surprise:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_holds_more_than_tensors_is_not_executed(tmp_path, capsys):
    folder = published(tmp_path / "head", SHAPES["qwen2"], binary=True)
    torch.save({"fc.weight": Surprise()}, folder / "pytorch_model.bin")
    refused("is damaged or holds more than tensors", folder, error=SubspecError)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("binary", [False, True])
def test_damaged_files_are_refused(tmp_path, binary):
    folder = published(tmp_path / "head", SHAPES["qwen2"], binary=binary)
    file = folder / ("pytorch_model.bin" if binary else "model.safetensors")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"rubbish" * 9):
        file.write_bytes(content)
        refused(re.escape(str(file)), folder, error=SubspecError)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {3: torch.zeros(2)}, {"model": {"a": torch.zeros(2)}}])
def test_something_other_than_named_tensors_is_refused(tmp_path, content):
    folder = published(tmp_path / "head", SHAPES["qwen2"], binary=True)
    torch.save(content, folder / "pytorch_model.bin")
    refused("no state dict", folder, error=SubspecError)


def test_paths_that_are_no_heads_are_refused(tmp_path):
    folder = published(tmp_path / "head", SHAPES["qwen2"])
    refused("is a file; pass the folder", folder / "config.json")
    refused("no such folder, and not a hub id", tmp_path / "nowhere")
    (folder / "config.json").write_text("[]")
    refused(r"config\.json cannot be read", folder)
    (folder / "config.json").write_text("{")
    refused(r"config\.json cannot be read", folder)
    (folder / "config.json").unlink()
    refused(r"has no config\.json", folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    refused("holds no weights: no model.safetensors.*pytorch_model.bin; draft.path", empty)


# --------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize(
    ("draft", "script"),
    [
        (Eagle2DraftConfig("eagle2"), "train_eagle"),
        (Eagle3DraftConfig("eagle3"), "train_eagle"),
        (BlockHeadDraftConfig("block_head"), "train_block_head"),
    ],
)
def test_without_a_path_a_head_ships_for_the_default_target_alone(tmp_path, monkeypatch, draft, script):
    monkeypatch.setitem(shipped.HEADS, draft.name, tmp_path / "nowhere")
    check_config(to_config(composed(f"draft={draft.name}")))
    with pytest.raises(ConfigError, match=rf"not in this .*train one with scripts/{script}\.py and set draft\.path"):
        locate_for(draft, EmbeddedTargetConfig(name="smollm2_135m"), print)
    with pytest.raises(ConfigError, match=rf"draft={draft.name} .* target=qwen2_5_7b set draft\.path"):
        locate_for(draft, HubTargetConfig(name="qwen2_5_7b", path="ORG/NAME"), print)


def test_the_source_of_a_shipped_head_has_its_digest(tmp_path, monkeypatch):
    monkeypatch.setitem(shipped.HEADS, "eagle2", tmp_path / "eagle")
    published(tmp_path / "eagle", SHAPES["llama3"])
    draft = Eagle2DraftConfig("eagle2")
    files = locate_for(draft, EmbeddedTargetConfig(name="smollm2_135m"), print)
    assert re.fullmatch(r"shipped with subspec \(sha256 [0-9a-f]{12}\)", files.source)
    assert head_shape(files, 64, "the target") == SHAPES["llama3"]


# ------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with two heads, and an empty hub cache."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fake = FakeHub()
    fake.repositories["someone/EAGLE"] = published(tmp_path / "repository", SHAPES["qwen2"], binary=True)
    fake.repositories["someone/else"] = tmp_path / "other"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("nothing")
    (tmp_path / "repository" / "README.md").write_text("a head")
    with fake.serving():
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield fake


def test_a_hub_id_is_fetched_once_and_found_again_offline(hub, monkeypatch):
    notes = []
    head = loaded("someone/EAGLE", notes=notes)
    assert head.source == f"someone/EAGLE@{COMMIT}"
    assert "fetching someone/EAGLE@" in notes[0]
    fetched = {path.rsplit("/", 1)[-1] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", "pytorch_model.bin"}
    notes.clear()
    loaded("someone/EAGLE", notes=notes)
    assert notes == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert loaded("someone/EAGLE").source == head.source


def test_what_the_hub_does_not_have_is_refused(hub, monkeypatch):
    refused("has no config.json: pass the folder or hub id of a draft head", "someone/else")
    refused("draft.path=someone/nobody: no such folder, and no such model", "someone/nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("no complete copy in the hub cache, and the model hub is not used", "some/body", error=SubspecError)


# --------------------------------------------------------------------------------------------- convert


@pytest.fixture
def convert_here(capsys, monkeypatch):
    """The script without a process of its own: its exit status, what it printed, and its complaints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_eagle.py", *map(str, arguments)])
        return convert_eagle.main(), *capsys.readouterr()

    return run


def test_the_script_converts_and_a_run_reads_the_same_head(tmp_path, convert_here):
    source = published(tmp_path / "source", SHAPES["qwen2"], binary=True, prefix="model.", dtype=torch.float32)
    status, said, complaints = convert_here(source, tmp_path / "out")
    assert status == 0, complaints
    assert "dropped: model.embed_tokens.weight" in said
    assert "4 KV heads of 16" in said
    assert "rounded: nothing" in said
    assert "read back bit for bit" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    before = loaded(source)
    for name, tensor in before.head.state_dict().items():
        assert torch.equal(stored[name], tensor)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 4
    after = loaded(tmp_path / "out")
    assert after.dropped == []
    assert after.head.shape == before.head.shape

    status, _, complaints = convert_here(source, tmp_path / "out")
    assert status == 1
    assert "is not an empty folder" in complaints
    assert len(complaints.splitlines()) == 1


def test_the_script_says_what_it_rounds_and_what_it_refuses(tmp_path, convert_here):
    source = published(tmp_path / "source", SHAPES["llama3"], dtype=torch.float32)
    status, said, _ = convert_here(source, tmp_path / "out", "--dtype", "bfloat16")
    assert status == 0
    assert "rounded: fc.weight" in said
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    broken = published(tmp_path / "broken", SHAPES["llama3"], drop=("fc.weight",))
    for path, words in ((broken, "missing fc.weight"), (tmp_path / "no where", "no such folder")):
        status, _, complaints = convert_here(path, tmp_path / "other")
        assert status == 2
        assert words in complaints
        assert len(complaints.splitlines()) == 1
        assert not (tmp_path / "other").exists()


def test_the_script_notices_a_disk_that_returns_something_else(tmp_path, convert_here, monkeypatch):
    source = published(tmp_path / "source", SHAPES["llama3"])

    def save_wrongly(tensors, file, metadata):
        save_file(tensors | {"fc.bias": -tensors["fc.bias"]}, file, metadata)

    monkeypatch.setattr(convert_eagle, "save_file", save_wrongly)
    status, said, complaints = convert_here(source, tmp_path / "out")
    assert (status, said) == (1, "")
    assert "fc.bias was not read back as written" in complaints
