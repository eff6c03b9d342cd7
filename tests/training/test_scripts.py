"""The scripts one after another on a tiny target, as a user runs them."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.corpus import shard_path, write_shard
from transformers import AutoModelForCausalLM

from subspec import build_engine
from subspec.decoding.tree_policy import Beam
from subspec.drafts.block_head import BlockHead
from subspec.drafts.eagle3_head import Eagle3Head
from subspec.drafts.eagle_checkpoint import load_head, locate_head
from tests.helpers.drafts import hf_greedy
from tests.helpers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]


def script(name, *arguments, fails=False):
    """Output of a script run in this process: a fresh one would import torch for seconds."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    assert (status != 0) == fails, err.getvalue()
    return err.getvalue() if fails else out.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny target, the text it wrote, and the folder of both."""
    root = tmp_path_factory.mktemp("training")
    target = tiny_checkpoint(root / "target", "llama", hidden_size=64, std=0.2, max_positions=512)
    options = ("--target", target, "--device", "cpu")
    script("generate_text", *options, "--out", root / "text", "--rows", 8, "--shards", 2, "--length", 120)
    return root, options


def test_text_is_written_once_and_in_whole_shards(made):
    root, options = made
    files = sorted(path.name for path in (root / "text").iterdir())
    assert files == ["shard-0000.safetensors", "shard-0001.safetensors"]
    before = (root / "text" / files[0]).read_bytes()
    (root / "text" / files[0]).unlink()
    again = ("--out", root / "text", "--rows", 8, "--shards", 2, "--length", 120)
    printed = script("generate_text", *options, *again)
    assert f"{files[1]} exists" in printed
    assert (root / "text" / files[0]).read_bytes() == before
    # The last line of a budget that is spent: nothing new is begun.
    script("generate_text", *options, *again[:-3], 9, "--length", 120, "--minutes", 0)
    assert sorted(path.name for path in (root / "text").iterdir()) == files


def test_the_trained_head_is_an_eagle_checkpoint(made, tmp_path):
    root, options = made
    common = (*options, "--text", root / "text", "--held-out", 4, "--rows", 4)
    printed = script("train_eagle", *common, "--out", tmp_path / "whole", "--steps", 4)
    assert "held out: top1@1" in printed
    files = locate_head(str(tmp_path / "whole"), print)
    loaded = load_head(files, hidden=64, target="tiny", dtype=torch.float32, device=torch.device("cpu"))
    assert not loaded.dropped
    assert loaded.head.shape.kv_heads == 2
    card = (tmp_path / "whole" / "MODEL_CARD.md").read_text()
    assert "4 steps of 4 conversations" in card
    assert "apache-2.0" in card
    # A resumed run that is already at its end writes the same weights again.
    script("train_eagle", *common, "--out", tmp_path / "again", "--steps", 4, "--resume")
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "again", files.folder))
    assert again.read_bytes() == first.read_bytes()


DSPARK = ("--markov-rank", 8, "--mask-id", 2, "--block", 5, "--features", 2, "--anchors", 40)


@pytest.mark.parametrize(
    ("name", "draft", "kind", "options"),
    [
        ("train_eagle", "eagle3", Eagle3Head, ("--kind", "eagle3")),
        ("train_eagle", "eagle3", Eagle3Head, ("--kind", "eagle3", "--draft-vocab", 200)),
        ("train_block_head", "block_head", BlockHead, DSPARK),
    ],
)
def test_trained_heads_draft_for_their_target(made, tmp_path, name, draft, kind, options):
    """Losses, features and positions are those of drafting: a head that has learnt a text by heart drafts it."""
    root, target = made
    model = AutoModelForCausalLM.from_pretrained(root / "target", dtype=torch.float32).eval()
    prompts = torch.randint(3, 320, (6, 6), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([prompt + hf_greedy(model, prompt, 26) for prompt in prompts])
    learn = torch.ones(ids.shape, dtype=torch.bool)
    learn[:, :6] = False
    facts = {"seed": 0, "self_asked": 0, "greedy": 1, "temperature": 0}
    write_shard(shard_path(tmp_path, 0), ids, learn, facts)
    common = (*target, "--text", tmp_path, "--held-out", 1, "--rows", 5, "--lr", 1e-2, "--steps", 80)
    script(name, *common, *options, "--out", tmp_path / "head")
    files, place = locate_head(str(tmp_path / "head"), print), torch.device("cpu")
    loaded = load_head(files, hidden=64, target="tiny", dtype=torch.float32, device=place, kind=kind)
    assert loaded.dropped == ([] if loaded.head.d2t is None else ["t2d"])
    if draft == "block_head":
        assert (loaded.head.shape.method, loaded.head.shape.levels) == ("DSpark", 5)
    engine = build_engine(model, draft=draft, draft_path=files.folder, tree_policy=Beam(4, 1))
    found = [engine.generate(prompt, max_new_tokens=26) for prompt in prompts[1:]]
    assert [result.token_ids for result in found] == ids[1:, 6:].tolist()
    assert sum(r.stats.verified_tokens for r in found) > 1.3 * sum(r.stats.iterations for r in found)


def test_the_distilled_model_is_a_transformers_folder(made, tmp_path):
    root, options = made
    common = (*options, "--text", root / "text", "--held-out", 4, "--rows", 4)
    shape = ("--hidden", 16, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--intermediate", 24)
    script("distill_draft", *common, *shape, "--out", tmp_path, "--steps", 4)
    files = ["MODEL_CARD.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 320
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_mistakes_are_one_line(made, tmp_path):
    root, options = made
    end = script("train_eagle", *options, "--text", root / "text", "--out", tmp_path, fails=True)
    assert end.strip().splitlines()[-1].startswith("training needs an end")
    none = script("distill_draft", *options, "--text", tmp_path, "--steps", 1, fails=True)
    assert "no shard there" in none
