"""``draft=eagle2`` and ``tree=eagle2`` from the command line: composed, checked, run, audited, recorded."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

from subspec.config.schema import to_config
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.from_config import build_tree_policy
from subspec.drafts.check_config import check_against_target, check_config
from subspec.drafts.eagle_head import EagleShape
from subspec.errors import ConfigError
from subspec.targets.planted import SHAPES as MODELS
from tests.config.test_config import composed, large_model
from tests.helpers.cli import cli, records_of, summary_of, tiny_run
from tests.helpers.eagle import QWEN2_BIASES, SHAPES, published
from tests.helpers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("eagle")
    tiny_checkpoint(root / "target", "qwen2", max_positions=4096)
    published(root / "head", SHAPES["qwen2"], binary=True)
    published(root / "other", SHAPES["llama3"], extra={"norm.weight": torch.ones(64)})
    published(root / "narrow", replace(SHAPES["wide heads"], hidden=48))
    return root


@pytest.fixture(scope="module")
def plain(places, tmp_path_factory):
    """Tokens of plain decoding, once for each way of decoding."""

    @cache
    def run(decoding):
        folder = tmp_path_factory.mktemp("plain")
        ran = cli(*tiny_run(places / "target", folder), f"decoding={decoding}", "draft=none")
        assert ran.code == 0, ran.err
        return [record["token_ids"] for record in records_of(folder)]

    return run


@pytest.mark.parametrize(
    ("draft", "tree", "decoding"),
    [
        *(("eagle2", tree, "greedy") for tree in ("eagle2", "beam", "adaptive", "chain")),
        *(("eagle2", tree, "sampling") for tree in ("eagle2", "adaptive")),
        ("subspec", "eagle2", "greedy"),
        ("subspec", "eagle2", "sampling"),
    ],
)
def test_a_run_passes_the_audit_and_emits_what_plain_decoding_does(places, plain, tmp_path, draft, tree, decoding):
    options = [f"decoding={decoding}", f"draft={draft}", f"tree={tree}", "audit=true"]
    if draft == "eagle2":
        options.append(f"draft.path={places / 'head'}")
    ran = cli(*tiny_run(places / "target", tmp_path / "run"), *options)
    assert ran.code == 0, ran.err
    assert [record["token_ids"] for record in records_of(tmp_path / "run")] == plain(decoding)
    if draft == "eagle2":
        facts = json.loads((tmp_path / "run" / "facts.json").read_text())
        assert facts["draft"]["head"] == str(places / "head")
        assert facts["draft"]["kv_heads"] == 4
        assert facts["draft"]["dropped"] == ["embed_tokens.weight"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["draft=eagle2"],
            r"embedded default target only: for target=.*target set draft\.path to the folder or hub id",
        ),
        (["draft=eagle2", "draft.path=' '"], r"draft\.path is empty"),
        (["draft=eagle2", "draft.path=planted"], r"for planted targets only: for target=.*target set draft\.path"),
        (["draft=eagle2", "draft.path={root}/nowhere"], r"draft\.path=.*nowhere: no such folder"),
        (["draft=eagle2", "draft.path={root}/narrow"], r"hidden size 48, and .*/target has 64: set draft\.path"),
        (["draft=eagle2", "draft.path={root}/other"], r"surplus norm\.weight: set draft\.path"),
        (["tree=eagle2", "tree.total_tokens=1"], r"tree\.total_tokens=1 must be at least 2"),
        (
            ["tree=eagle2", "tree.depth=2", "tree.width=3"],
            r"tree\.total_tokens=60, but tree\.depth=2 levels of tree\.width=3 draft 13 nodes: lower .* at most 13",
        ),
        (["tree=eagle2", "tree.width=321"], r"tree\.width=321 is wider than the target's vocabulary of 320"),
        (["draft=eagle2", "draft.path={root}/head", "draft.temperature=0"], r"draft\.temperature=0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(places, tmp_path, options, line):
    options = [option.format(root=places) for option in options]
    ran = cli(*tiny_run(places / "target", tmp_path / "run"), *options)
    ran.refused(2, line)
    assert not (tmp_path / "run" / "records.jsonl").exists()  # before anything was begun


@pytest.mark.parametrize("draft", ["subspec", "layer_skip"])
def test_captured_levels_do_not_grow_eagle2s_tree(draft):
    config = to_config(composed("tree=eagle2", "offload=stream", f"draft={draft}"))
    with pytest.raises(ConfigError, match=rf"draft={draft} with offload=stream drafts whole levels .* tree=beam"):
        check_config(config)
    check_config(to_config(composed("tree=eagle2", "offload=stream", "draft=eagle2")))
    check_config(to_config(composed("tree=eagle2", f"draft={draft}")))


def test_the_published_settings_are_the_defaults():
    config = to_config(composed("draft=eagle2", "tree=eagle2"))
    check_against_target(config, large_model())
    policy = build_tree_policy(config.tree)
    assert isinstance(policy, Eagle2)
    assert (policy.max_depth, policy.width, policy.total_tokens) == (6, 10, 60)
    assert (policy.capacity, policy.pass_nodes, policy.draft_rows) == (511, 60, 51)
    assert (config.draft.temperature, config.draft.path) == (1.0, None)


@pytest.mark.gpu
@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
@pytest.mark.parametrize("tree", ["eagle2", "beam", "adaptive"])
@pytest.mark.parametrize("offload", ["none", "stream"])
def test_on_a_gpu_a_run_passes_the_audit_within_its_budget(tmp_path, offload, tree, decoding):
    model = MODELS["tiny"]()
    heads, width = model.num_attention_heads, model.hidden_size
    shape = EagleShape(width, heads, heads, width // heads, 2 * width, QWEN2_BIASES)
    published(tmp_path / "head", shape, vocab_size=model.vocab_size, binary=True, std=0.02)
    folder = tmp_path / "run"
    streaming = ["offload.vram_gib=0.5", "offload.resident_layers=2"] if offload == "stream" else []
    torch.cuda.set_per_process_memory_fraction(1.0)
    ran = cli(
        *["target=planted_tiny", "device=cuda", "logger=none", "benchmark.source=sample", "benchmark.max_samples=2"],
        *["draft=eagle2", f"draft.path={tmp_path / 'head'}", f"tree={tree}", f"decoding={decoding}", "audit=true"],
        *["decoding.max_new_tokens=40", "decoding.max_length=1024", f"offload={offload}", *streaming],
        f"run_dir={folder}",
    )
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    assert summary["audit"]["mismatch"] == 0
    assert summary["audit"]["exact"] > 60
    if offload == "stream":
        assert 0 < summary["peak_vram_gib"] <= 0.5
        assert summary["totals"]["bytes_streamed"] > 0
