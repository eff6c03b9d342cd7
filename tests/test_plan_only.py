"""``plan_only=true``: a plan without weights, without a GPU, and as a file."""

import json

import pytest

import subspec.runs.runner
from tests.helpers.cli import cli

CARD = ["offload.card=RTX 4090", "offload.ram_gib=64"]


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("planning must not load a target")

    monkeypatch.setattr(subspec.runs.runner, "load", load)


def plan(folder, *overrides):
    ran = cli("plan_only=true", "offload=stream", f"run_dir={folder}", *overrides)
    assert ran.code == 0, ran.err
    assert not (folder / "records.jsonl").exists()
    return ran.out, json.loads((folder / "plan.json").read_text(encoding="utf-8"))


def test_a_large_target_on_a_card_that_is_not_here(tmp_path):
    out, written = plan(tmp_path / "run", "target=planted_qwen2_5_7b", "offload.card=RTX 4090")
    assert "plan: target planted_qwen2_5_7b, draft subspec, 8.00 GiB on RTX 4090" in out
    assert f"plan: {tmp_path / 'run' / 'plan.json'}" in out
    assert written["card"]["name"] == "RTX 4090"
    assert written["device_bytes"] <= written["budget"] == 8 * 2**30
    assert written["streamed_bytes_per_pass"] > 2**30
    assert written["ceiling_tokens_per_s"]["26"] > 26 * written["ceiling_tokens_per_s"]["1"] * 0.99


def test_without_a_card_and_without_a_gpu_the_link_is_not_known(tmp_path):
    out, written = plan(tmp_path / "run", "target=planted_tiny")
    assert written["card"] is None
    assert written["link"] is None
    assert "nothing is streamed" in out


def test_plain_decoding_has_a_plan_too(tmp_path):
    link = ["offload.link_gb_per_s=25", "offload.card=H200"]
    _, written = plan(tmp_path / "run", "target=planted_qwen2_5_7b", "draft=none", *link)
    assert written["draft"] == "none"
    assert written["link"] == {"gb_per_s": 25.0, "source": "offload.link_gb_per_s"}


@pytest.mark.parametrize(
    ("row", "head", "kv_heads"),
    [("qwen2_5_7b_eagle2", 2 * (3584 * (6 * 3584 + 3 * 18944) + 4 * 3584), 28), ("llama3_1_8b_eagle2", None, 8)],
)
def test_a_planted_head_is_planned_without_a_file(tmp_path, row, head, kv_heads):
    """fc, q, k, v and o, the MLP; three biases and the norm: by hand for the head with as many KV heads as heads."""
    out, written = plan(tmp_path / "run", f"experiment=planted/{row}", *CARD)
    assert f"one layer, {kv_heads} KV heads, random weights" in out
    assert written["device_bytes"] <= written["budget"]
    if head is not None:
        assert next(item["bytes"] for item in written["items"] if item["name"] == "EAGLE head") == head


def test_the_planted_small_sibling_of_llama_is_planned(tmp_path):
    out, _ = plan(tmp_path / "run", "experiment=planted/llama3_1_8b_small_model", *CARD)
    assert "16 layers, 128256 tokens, bfloat16" in out
