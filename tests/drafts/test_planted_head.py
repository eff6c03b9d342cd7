"""``draft.path=planted``: a head out of nothing for a planted target, planned, run and marked like any other."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from subspec.config.schema import (
    BlockHeadDraftConfig,
    Eagle2DraftConfig,
    Eagle2TreeConfig,
    Eagle3DraftConfig,
    EmbeddedTargetConfig,
    HubTargetConfig,
    PlantedTargetConfig,
    to_config,
)
from subspec.decoding.audit import Auditor
from subspec.drafts.check_config import check_config
from subspec.drafts.eagle3_head import Eagle3Head, Eagle3Shape
from subspec.drafts.eagle_checkpoint import head_identity, head_shape, load_head, locate_for
from subspec.drafts.eagle_head import EagleShape
from subspec.drafts.planted_head import PlantedHead
from subspec.errors import ConfigError
from subspec.records.summary_table import PLANTED_DRAFT
from subspec.report.baseline import make_rows
from subspec.report.run_data import collect
from tests.config.test_config import composed
from tests.helpers.assembled import TINY, planned_here, streamed, streamed_settings
from tests.helpers.cli import cli, records_of, summary_of
from tests.helpers.eagle import LLAMA3_ROPE, QWEN2_BIASES

CPU = torch.device("cpu")
PATH = Eagle2DraftConfig(name="eagle2", path="planted")


def located(shape="tiny", seed=0):
    return locate_for(PATH, PlantedTargetConfig(name="planted", shape=shape, seed=seed), pytest.fail)


def loaded(seed=0, dtype=torch.float32):
    return load_head(located(seed=seed), hidden=256, target="planted_tiny", dtype=dtype, device=CPU)


# ---------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "qwen2_5_7b",
            EagleShape(
                3584, 28, 28, 128, 18944, QWEN2_BIASES, 1e-6, {"rope_type": "default", "rope_theta": 1e6}, 32768
            ),
        ),
        ("llama3_1_8b", EagleShape(4096, 32, 8, 128, 14336, frozenset(), 1e-5, LLAMA3_ROPE, 131072)),
    ],
)
def test_it_has_the_shape_of_the_published_head_of_the_family(target, expected):
    """As many KV heads as heads and three biases for Qwen2.5; the target's KV heads and no bias for Llama-3.1."""
    assert head_shape(located(target), expected.hidden, target) == expected


def test_an_eagle3_head_has_the_shape_of_the_published_one_and_ids_over_the_whole_vocabulary():
    target = PlantedTargetConfig(name="planted", shape="llama3_1_8b")
    head = locate_for(Eagle3DraftConfig(name="eagle3", path="planted"), target, pytest.fail)
    expected = Eagle3Shape(
        4096, 32, 8, 128, 14336, frozenset(), 1e-5, LLAMA3_ROPE, 131072,
        fc_inputs=3 * 4096, draft_vocab=32000, mapped=True,
    )  # fmt: skip
    assert head_shape(head, 4096, "planted", Eagle3Head) == expected
    small = replace(head, target_shape="tiny")
    tensors = small.tensors(torch.float32, CPU)
    assert tensors["d2t"].dtype == torch.int64
    ids = tensors["d2t"] + torch.arange(2048)
    assert (ids.diff() == 2).all()
    assert ids[-1] == 4094
    assert torch.equal(tensors["layers.0.hidden_norm.weight"], torch.ones(256))
    assert head_identity(small) != head_identity(located())


def test_its_numbers_follow_from_the_targets_seed():
    first, again, other = (loaded(seed).head.state_dict() for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("layernorm.weight"):
            assert torch.equal(tensor, torch.ones(256))
        else:
            assert not torch.equal(tensor, other[name])
            assert tensor.std() == pytest.approx(0.02, rel=0.2)
    half = loaded(dtype=torch.bfloat16)
    assert half.planted
    assert {tensor.dtype for tensor in half.head.state_dict().values()} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "target", [EmbeddedTargetConfig(name="smollm2_135m"), HubTargetConfig(name="qwen2_5_7b", path="a/b")]
)
def test_a_real_target_is_not_drafted_for_by_noise(target):
    line = rf"^draft\.path=planted is .* planted targets only: for target={target.name} set draft\.path[^\n]*$"
    with pytest.raises(ConfigError, match=line):
        locate_for(PATH, target, pytest.fail)
    with pytest.raises(ConfigError, match=line):  # and at once, before the target is looked for
        check_config(to_config(composed(f"target={target.name}", "draft=eagle2", "draft.path=planted")))


def test_a_folder_of_that_name_is_written_with_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted").mkdir()
    assert isinstance(locate_for(PATH, TINY, pytest.fail), PlantedHead)
    with pytest.raises(ConfigError, match=r"\./planted has no config\.json"):
        locate_for(Eagle2DraftConfig(name="eagle2", path="./planted"), TINY, pytest.fail)


# ------------------------------------------------------------------------------------------------------ runs

RUN = [
    *["target=planted_tiny", "benchmark.source=sample", "benchmark.max_samples=1", "warmup=0", "device=cpu"],
    *["decoding.max_new_tokens=10", "logger=none", "benchmark.max_prompt_tokens=400"],
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Tokens of plain decoding, once for each way of decoding."""

    @cache
    def run(decoding):
        folder = tmp_path_factory.mktemp("plain")
        ran = cli(*RUN, "draft=none", f"decoding={decoding}", f"run_dir={folder}")
        assert ran.code == 0, ran.err
        return [record["token_ids"] for record in records_of(folder)]

    return run


@pytest.mark.parametrize(
    ("kind", "tree", "decoding"),
    [
        (0, "eagle2", "greedy"),
        (0, "beam", "greedy"),
        (1, "adaptive", "sampling"),
        (2, "eagle2", "sampling"),
        (2, "adaptive", "greedy"),
    ],
)
def test_a_run_emits_what_plain_decoding_does_and_says_that_the_head_is_made_up(plain, tmp_path, kind, tree, decoding):
    small = ["tree.depth=3", "tree.width=4"] + (["tree.total_tokens=10"] if tree == "eagle2" else [])
    draft = ("eagle2", "eagle3", "block_head")[kind]
    options = [f"draft={draft}", "draft.path=planted", f"tree={tree}", *small, "audit=true"]
    ran = cli(*RUN, *options, f"decoding={decoding}", f"run_dir={tmp_path / 'run'}")
    assert ran.code == 0, ran.err
    assert [record["token_ids"] for record in records_of(tmp_path / "run")] == plain(decoding)
    summary = summary_of(tmp_path / "run")
    assert summary["audit"]["mismatch"] == 0
    assert summary["totals"]["tau"] < 1.5
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())["draft"]
    head = f"planted, random weights in the shape of {['a', 'an EAGLE-3', 'a DFlash'][kind]} head for tiny, seed 0"
    assert facts.items() >= {"head": head, "planted": True, "dropped": []}.items()
    assert facts["kv_heads"] == [8, 2, 2][kind]
    assert facts.get("feature_layers") == [None, [1, 3, 4], [1, 2, 3, 4, 5]][kind]
    assert (facts.get("method"), facts.get("block")) == ((None, None), (None, None), ("DFlash", 15))[kind]
    assert f"head {head}, {[0.8, 1.4, 3.1][kind]} M parameters, float32" in ran.out
    assert PLANTED_DRAFT in ran.out
    assert summary["context"]["planted"] is True
    (row,), _ = make_rows(collect([tmp_path / "run"]))
    assert row.planted


# -------------------------------------------------------------------------------------------------- streamed


def planted_settings(path, draft):
    tree = Eagle2TreeConfig(name="eagle2", depth=3, width=3, total_tokens=10)
    return replace(streamed_settings(draft(name="eagle", path=str(path)), resident_layers=2), tree=tree)


@pytest.mark.parametrize("kind", [Eagle2DraftConfig, Eagle3DraftConfig, BlockHeadDraftConfig])
def test_it_is_planned_like_the_same_head_from_a_file(tmp_path, kind):
    head = locate_for(kind(name="eagle", path="planted"), TINY, pytest.fail)
    save_file(head.tensors(torch.bfloat16, CPU), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(head.shape().config()))
    ours, theirs = (planned_here(planted_settings(path, kind)) for path in ("planted", tmp_path))
    assert [(item.name, item.bytes, item.place) for item in ours.items] == [
        (item.name, item.bytes, item.place) for item in theirs.items
    ]
    assert (ours.resident_layers, ours.level_read_bytes) == (theirs.resident_layers, theirs.level_read_bytes)
    notes = [next(i.note for i in plan.items if i.name.endswith(" head")) for plan in (ours, theirs)]
    layers = "5 layers" if kind is BlockHeadDraftConfig else "one layer"
    number = head.shape().kv_heads
    assert notes == [f"{layers}, {number} KV heads, random weights", f"{layers}, {number} KV heads"]


@pytest.mark.parametrize("kind", [Eagle2DraftConfig, Eagle3DraftConfig, BlockHeadDraftConfig])
def test_a_streamed_target_takes_what_was_planned_and_passes_the_audit(kind):
    with streamed(planted_settings("planted", kind), pytest.fail) as (plan, assembly):
        draft = assembly.engine.draft
        found = {item.name: item.bytes for item in plan.items}
        name = "block" if kind is BlockHeadDraftConfig else "EAGLE"
        assert found[f"{name} head"] == sum(tensor.nbytes for tensor in draft.head.state_dict().values())
        prompt = [5, 17, 33, 99]
        result = assembly.engine.generate(prompt, max_new_tokens=6)
        audit = Auditor(assembly.target, assembly.sampling).audit(prompt, result.token_ids)
        assert audit.mismatch == 0
        assert found[f"{name} KV cache"] == draft.cache.nbytes
        assert assembly.draft_facts["planted"]
        assert "head planted, random weights" in assembly.draft_summary
