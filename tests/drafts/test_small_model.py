"""The small model: whose tokens it must know, how it is loaded, and that a plan counts what is really there."""

import json
import re

import pytest
import torch

from subspec.config.schema import HqqConfig, LayerSkipDraftConfig, PlantedTargetConfig, SmallModelDraftConfig
from subspec.decoding.target_model import TargetModel
from subspec.drafts import small_checkpoint
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.small_checkpoint import load_small_config, open_small_model
from subspec.drafts.small_model import (
    Vocabulary,
    check_shipped,
    check_small_model,
    check_vocabularies,
    load_small_model,
)
from subspec.errors import ConfigError, SubspecError
from subspec.targets.planted import planted_config
from tests.helpers.assembled import planned_here, streamed, streamed_settings
from tests.helpers.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SILENT = lambda text: None  # noqa: E731


def small(path=None, **settings):
    return streamed_settings(SmallModelDraftConfig(name="small_model", path=path and str(path), **settings))


# ------------------------------------------------------------------------------------------------ vocabulary


def test_the_same_tokens_padded_otherwise_will_do():
    tokenizer = tiny_tokenizer(320)
    check_vocabularies(Vocabulary("small", 352, tokenizer), Vocabulary("large", 384, tokenizer))
    added = tiny_tokenizer(320)
    added.add_tokens(["<|extra|>"])
    check_vocabularies(Vocabulary("small", 352, added), Vocabulary("large", 384, tokenizer))
    check_vocabularies(Vocabulary("small", 320, None), Vocabulary("large", 320, tokenizer))


def test_other_vocabularies_are_refused_with_both_names_sizes_and_the_remedy():
    tokenizer, swapped = tiny_tokenizer(320), tiny_tokenizer(320)
    text = json.loads(swapped.backend_tokenizer.to_str())
    vocab = text["model"]["vocab"]
    first, second = (token for token, number in vocab.items() if number in (300, 301))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(text))
    large = Vocabulary("large", 384, tokenizer)
    with pytest.raises(ConfigError) as refusal:
        check_vocabularies(Vocabulary("small", 320, swapped), large)
    assert (
        "draft.path=small (320 tokens) and target large (384 tokens) number their tokens differently "
        "(2 ids, for instance 300: "
    ) in str(refusal.value)
    assert str(refusal.value).endswith("set draft.path to a model with the target's tokenizer")
    with pytest.raises(ConfigError, match=r"different vocabularies \(\d+ tokens that only one has\)"):
        check_vocabularies(Vocabulary("small", 300, tiny_tokenizer(300)), large)
    with pytest.raises(ConfigError, match=r"small \(320 tokens\) and target large \(384 tokens\) have different"):
        check_vocabularies(Vocabulary("small", 320, None), large)


# --------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("vocab", "target_vocab"), [(320, 320), (320, 333), (333, 320)])
def test_a_loaded_small_model_knows_every_token_of_the_target(tmp_path, tie, vocab, target_vocab):
    folder = tiny_checkpoint(tmp_path / "small", "qwen2", vocab_size=vocab, tie=tie)
    source = open_small_model(small(folder), torch.float32, CPU, SILENT)
    model = load_small_model(source, target_vocab, CPU)
    reference = tiny_model("qwen2", vocab_size=vocab, tie=tie)
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert table.shape[0] == max(vocab, target_vocab)
    assert torch.equal(table[:vocab], reference.model.embed_tokens.weight)
    assert torch.equal(head, reference.lm_head.weight[:target_vocab])
    assert (head.data_ptr() == table.data_ptr()) == tie
    tokens = torch.tensor([3, min(vocab, target_vocab) - 1, 7])
    decoder = TargetModel(model)
    cache = decoder.new_cache(max_length=8, draft_rows=0, target_rows=8)
    logits = decoder.logits(decoder.append(tokens, cache).final)
    torch.testing.assert_close(logits, reference(tokens[None]).logits[0, :, :target_vocab], rtol=1e-4, atol=1e-5)
    if target_vocab > vocab:
        decoder.append(torch.tensor([target_vocab - 1]), cache)


def test_a_folder_needs_no_tokenizer(tmp_path):
    folder = tiny_checkpoint(tmp_path / "small")
    for file in folder.glob("*token*"):
        file.unlink()
    assert open_small_model(small(folder), torch.float32, CPU, SILENT).tokenizer is None


def test_what_is_not_there_is_refused_in_the_drafts_own_words(tmp_path):
    with pytest.raises(ConfigError, match=r"^draft\.path=nowhere: no such folder, and not a hub id"):
        open_small_model(small("nowhere"), torch.float32, CPU, SILENT)
    with pytest.raises(ConfigError, match=r"draft\.path=planted:huge: no such planted shape"):
        load_small_config(small("planted:huge"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SubspecError, match=r"^draft\.path: .* has no config\.json"):
        load_small_config(small(tmp_path / "empty"))


def test_a_window_or_too_few_positions_are_refused(tmp_path):
    short = tiny_model("llama", max_positions=100).config
    with pytest.raises(ConfigError, match=r"max_length=128 exceeds the 100 .* planted:tiny_draft"):
        check_small_model(small("planted:tiny_draft"), short)
    moving = tiny_model("llama").config
    moving.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match="dynamic rotary embeddings"):
        check_small_model(small("planted:tiny_draft"), moving)


def test_a_quantized_head_that_the_target_cuts_is_kept_for_that_vocabulary_alone(tmp_path, monkeypatch):
    """Else two targets would take turns to throw away what the other kept, and ``quant.folder`` would refuse."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    folder = tiny_checkpoint(tmp_path / "small", "qwen2", vocab_size=333)
    quant = HqqConfig(name="hqq", group_size=32, modules=["mlp", "lm_head"])
    found = []
    for vocab in (333, 320, 333, 320):
        source = open_small_model(small(folder), torch.float32, CPU, SILENT)
        model = load_small_model(source, vocab, CPU, flat=False)
        report = quantize_draft(
            model, quant, identity=source.identity, dtype=source.dtype, device=CPU, unpack=True, note=pytest.fail
        )
        found.append(report.details["cache"])
    count = found[0]["quantized"]
    assert [(each["read"], each["quantized"]) for each in found] == [(0, count)] * 2 + [(count, 0)] * 2
    assert found[0]["folder"] == found[2]["folder"] != found[1]["folder"] == found[3]["folder"]


# -------------------------------------------------------------------------------------------------- shipped


def test_without_a_path_the_shipped_model_is_taken():
    source = open_small_model(small(), torch.float32, CPU, SILENT)
    assert re.fullmatch(r"shipped with subspec \(sha256 [0-9a-f]{12}\)", source.source)
    assert (source.tokenizer, source.config.vocab_size) == (None, 49152)
    load_small_model(source, 49152, CPU)


def test_the_shipped_model_is_refused_before_anything_is_loaded_where_it_does_not_fit(monkeypatch, tmp_path):
    tiny = planted_config(PlantedTargetConfig(name="planted_tiny", shape="tiny"))
    line = r"^[^\n]*49152 tokens, and target planted_tiny has 4096: set draft\.path[^\n]*$"
    with pytest.raises(ConfigError, match=line):
        check_shipped(small(), tiny)
    check_shipped(small("planted:tiny_draft"), tiny)
    monkeypatch.setattr(small_checkpoint, "SHIPPED", tmp_path / "nowhere")
    line = r"^[^\n]*not in this installation[^\n]*set draft\.path[^\n]*$"
    with pytest.raises(ConfigError, match=line):
        load_small_config(small())


# -------------------------------------------------------------------------------------------------- streamed


def storage_bytes(tensors):
    """Bytes of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("path", ["planted:tiny_draft", "planted:tiny"])
def test_the_plan_counts_what_a_streamed_small_model_takes(path):
    pytest.importorskip("triton")
    with streamed(small(path)) as (plan, assembly):
        found, draft = {item.name: item for item in plan.items}, assembly.engine.draft
        assert found["small model"].bytes == storage_bytes(draft.model.model.parameters())
        assert found["small model's KV"].bytes == draft.cache.nbytes
        assert assembly.engine.cache.draft_rows == 0
        assert found["KV cache"].note.startswith("0 + 128 + ")
        looked_up = {"model.embed_tokens.weight", "model.norm.weight"}  # the table is untied: a level reads a few rows
        others = sum(p.nbytes for n, p in draft.model.model.named_parameters() if n in looked_up)
        assert plan.level_read_bytes == found["small model"].bytes - others
        # The fused levels read the very bytes that the prompt pass reads.
        known = {p.untyped_storage().data_ptr() for p in draft.model.model.parameters()}
        fused = draft.levels.model
        tensors = [fused.embedding, fused.head, fused.final_norm]
        for layer in fused.layers:
            tensors += [linear.weight for linear in layer.linears]
            tensors += [layer.qkv_bias, layer.input_norm, layer.post_norm]
        assert {t.untyped_storage().data_ptr() for t in tensors} == known
        assert assembly.quant is None
        assert assembly.draft_facts["levels"] == "fused, bfloat16"


def test_the_plan_makes_the_layers_that_draft_resident():
    def plan(draft=None, **offload):
        return planned_here(streamed_settings(LayerSkipDraftConfig(name="layer_skip", **(draft or {})), **offload))

    two = plan(resident_layers=2)
    assert two.resident_layers == (0, 7)
    assert {0, 7} < set(plan(resident_layers=5).resident_layers)
    assert plan(resident_layers=3, draft={"layers": [2, 3]}).resident_layers[:2] == (2, 3)
    assert plan(resident_layers=3, draft={"keep": 3}).resident_layers == (0, 4, 7)
    layer = next(item.bytes for item in two.items if item.name == "resident layers") / 2
    head = 4096 * 256 * 2
    assert two.level_read_bytes == pytest.approx(2 * layer + head, rel=1e-3)
    everything = plan()
    assert everything.streamed_layers == ()
    assert everything.level_read_bytes == pytest.approx(4 * layer + head, rel=1e-3)
    with pytest.raises(ConfigError, match=r"resident_layers=1, but draft=layer_skip drafts with 2 layers"):
        plan(resident_layers=1)


@pytest.mark.parametrize("chosen", [{}, {"layers": [1, 6]}])
def test_streamed_layers_draft_where_they_lie(chosen):
    pytest.importorskip("triton")
    config = streamed_settings(LayerSkipDraftConfig(name="layer_skip", **chosen), resident_layers=4)
    with streamed(config) as (plan, assembly):
        fused = assembly.engine.draft.model
        layers = [layer.cache_layer for layer in fused.layers]
        assert layers == (chosen["layers"] if chosen else list(plan.resident_layers))
        for layer in fused.layers:
            module = assembly.target.base.layers[layer.cache_layer]
            assert layer.qkv.weight.data_ptr() == module.self_attn.q_proj.weight.data_ptr()
            assert torch.equal(
                layer.qkv.weight, torch.cat([getattr(module.self_attn, f"{n}_proj").weight for n in "qkv"])
            )
            assert layer.gate_up.weight.data_ptr() == module.mlp.gate_proj.weight.data_ptr()
            assert torch.equal(layer.qkv_bias[-64:], module.self_attn.v_proj.bias)
        assert fused.embedding.data_ptr() == assembly.target.table.data_ptr()
        assert assembly.draft_facts["layers"] == layers


@pytest.mark.parametrize(
    ("draft", "sampling"),
    [
        (SmallModelDraftConfig(name="small_model", path="planted:tiny_draft"), False),
        (LayerSkipDraftConfig(name="layer_skip", layers=[0, 7]), True),
    ],
    ids=["small_model greedy", "layer_skip sampling"],
)
def test_a_streamed_run_with_fused_levels_passes_the_audit(draft, sampling):
    pytest.importorskip("triton")
    from subspec.decoding.audit import Auditor
    from subspec.levels.model import Attention

    sampled = {"temperature": 0.7} if sampling else None
    with streamed(streamed_settings(draft, (2, 2), resident_layers=3, sampling=sampled)) as (_, assembly):
        levels = getattr(assembly.engine.draft, "levels", assembly.engine.draft)
        levels.attention = Attention(splits=2)  # the interpreter runs one slice after the other
        result = assembly.engine.generate([5, 17, 33, 99], max_new_tokens=3, seed=3)
        audit = Auditor(assembly.target, assembly.sampling).audit([5, 17, 33, 99], result.token_ids, seed=3)
        assert audit.mismatch == 0
        assert result.stats.drafted_nodes > 0
