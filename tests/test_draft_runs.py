"""Whole runs with every draft, from the command line to the records: the same tokens, audited, as plain decoding.

An EAGLE head needs a checkpoint for the tiny target: its runs are in ``tests/drafts/test_eagle_run.py``.
"""

import pytest

from tests.helpers.cli import cli, records_of, summary_of, timeless, tiny_run
from tests.helpers.tiny import tiny_checkpoint, tiny_model

PLANTED = [
    "target=planted_tiny",
    "benchmark.source=sample",
    "benchmark.max_samples=1",
    "decoding.max_new_tokens=12",
    "tree.depth=4",
    "warmup=0",
    "logger=none",
    "device=cpu",
]
SMALL = ["draft=small_model", "draft.path=planted:tiny_draft"]
PLAN = ["offload=stream", "plan_only=true"]


def run(folder, *overrides):
    ran = cli(*PLANTED, *overrides, f"run_dir={folder}")
    assert ran.code == 0, ran.err
    return ran.out, records_of(folder), summary_of(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain") / "run", "draft=none")[1]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory, plain):
    """Records of plain decoding, greedy and sampled."""
    sampled = run(tmp_path_factory.mktemp("sampled") / "run", "draft=none", "decoding=sampling")[1]
    assert [record["token_ids"] for record in sampled] != [record["token_ids"] for record in plain]
    return {"greedy": plain, "sampling": sampled}


TREES = {"beam": ["tree=beam"], "adaptive": ["tree=adaptive"], "eagle2": ["tree=eagle2", "tree.total_tokens=30"]}
KINDS = {
    "hqq": ["draft=subspec", "quant=hqq"],
    "higgs": ["draft=subspec", "quant=higgs"],
    "small_model": SMALL,
    "pard": ["draft=pard", *SMALL[1:], "draft.block=3"],
    "layer_skip": ["draft=layer_skip"],
}


def every_run():
    """A greedy beam or a sampled EAGLE-2 tree for every draft, both for one; other combinations are slow tests."""
    for draft in KINDS:
        for tree in TREES:
            for decoding in ("greedy", "sampling"):
                default = (tree, decoding) == ("beam", "greedy") and draft in ("hqq", "small_model", "pard")
                default |= (tree, decoding) == ("eagle2", "sampling") and draft in ("hqq", "higgs", "layer_skip")
                default |= (draft, tree, decoding) == ("hqq", "adaptive", "greedy")
                yield pytest.param(draft, tree, decoding, marks=[] if default else [pytest.mark.slow])


@pytest.mark.parametrize(("draft", "tree", "decoding"), every_run())
def test_every_draft_with_every_tree_passes_the_audit(tmp_path, plainly, draft, tree, decoding):
    overrides = [*KINDS[draft], *TREES[tree], f"decoding={decoding}", "audit=true"]
    _, records, summary = run(tmp_path / "run", *overrides)
    expected = [record["token_ids"] for record in plainly[decoding]]
    assert [record["token_ids"] for record in records] == expected
    audit = summary["audit"]
    assert (audit["exact"], audit["near_tie"], audit["mismatch"]) == (sum(map(len, expected)), 0, 0)
    assert summary["totals"]["tau"] > 1


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        # A quantizer that would not fit does not concern a draft that is not quantized.
        (["draft=layer_skip", "quant.skip_layers=[77]"], {"layers": [0, 2, 5, 7], "target_layers": 8}),
        (["draft=layer_skip", "draft.layers=[1,3]", "quant=none"], {"layers": [1, 3]}),
        (["draft=layer_skip", "draft.keep=8", "tree=chain"], {"layers": list(range(8))}),
        (
            [*SMALL, "quant=none", "tree=adaptive"],
            {"layers": 2, "vocabulary": 4096, "planted": True, "dtype": "float32", "levels": "modules"},
        ),
        ([*SMALL, "draft.dtype=bfloat16", "quant.skip_layers=[77]"], {"dtype": "bfloat16"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_text_is_plain_decodings_and_the_record_says_what_drafted(tmp_path, plain, overrides, facts):
    out, records, summary = run(tmp_path / "run", *overrides, "audit=true")
    assert [record["token_ids"] for record in records] == [record["token_ids"] for record in plain]
    assert summary["run"]["draft"].items() >= facts.items()
    assert summary["run"]["substitute"] is None
    assert "substitute" not in out.split("planted weights:")[0]
    assert "means nothing" in out
    assert "no language model" in out
    assert records[0]["planted"] is True
    assert (records[0]["new_tokens"], records[0]["finish_reason"]) == (12, "length")
    assert "planted" in summary["run"]["target_source"]
    assert summary["totals"]["tau"] > 1


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
def test_a_proposer_saves_passes_of_the_substitute(tmp_path, plainly, decoding):
    proposer = ["draft.proposer=small_model", "draft.proposer_path=planted:tiny_draft", "tree=chain"]
    out, records, summary = run(tmp_path / "run", *proposer, f"decoding={decoding}", "audit=true")
    assert [record["token_ids"] for record in records] == [r["token_ids"] for r in plainly[decoding]]
    totals = summary["totals"]
    passes, levels = totals["draft_passes"], sum(totals["drafted_by_depth"])
    assert 0 < passes < levels
    assert f"{passes} for {levels} levels" in out
    assert summary["audit"]["mismatch"] == 0
    described = summary["run"]["draft"]["proposer"]
    assert (described["draft"], described["proposed"], described["planted"]) == ("small_model", 10, True)


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_quantized_small_model_is_kept_and_found_again(tmp_path, plain, monkeypatch, where):
    """In the cache by itself, in ``quant.folder`` when asked; the second start quantizes nothing."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    options = [*SMALL, "tree=beam", "draft.quantize=true", "quant.modules=[attention,mlp,lm_head]", "quant.bits=8"]
    options += [f"quant.folder={tmp_path / 'kept'}", "quant.cache=off"] if where == "folder" else []
    _, first, summary = run(tmp_path / "first", *options)
    made = summary["run"]["substitute"]["details"]["cache"]
    assert (made["read"], made["quantized"], made["trouble"]) == (0, 15, None)
    place = tmp_path / "kept" if where == "folder" else tmp_path / "cache" / "substitutes"
    assert made["folder"].startswith(str(place))

    def refuse(*arguments, **options):
        raise AssertionError("quantized again")

    monkeypatch.setattr("hqq.core.quantize.Quantizer.quantize", refuse)
    out, again, summary = run(tmp_path / "second", *options)
    found = summary["run"]["substitute"]["details"]["cache"]
    assert (found["read"], found["quantized"], found["folder"]) == (15, 0, made["folder"])
    assert f"15 read from {made['folder']} and 0 quantized" in out
    assert "draft small_model: 15 Linears at 9.00 bits per weight" in out
    assert summary["run"]["substitute"]["modules"] == 2 * 7 + 1
    assert timeless(again) == timeless(first)
    assert [record["token_ids"] for record in again] == [record["token_ids"] for record in plain]


def test_a_folder_of_another_quantized_model_is_refused(tmp_path):
    """Of another seed, and of the target itself: what lies there is never drafted with."""
    kept = f"quant.folder={tmp_path / 'kept'}"
    run(tmp_path / "first", *SMALL, "draft.quantize=true", kept)
    line = r"quant\.folder=.*kept cannot be used: its layer 0, .* was made from other weights; name a new folder"
    for name, other in (
        ("seed", [*SMALL, "draft.quantize=true", "target.seed=1"]),
        ("own", ["draft=subspec", "draft.unpack=always"]),
    ):
        ran = cli(*PLANTED, *other, kept, f"run_dir={tmp_path / name}")
        ran.refused(2, line)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all of it")
    full = [f"quant.folder={tmp_path / 'full'}", f"run_dir={tmp_path / 'x'}"]
    ran = cli(*PLANTED, *SMALL, "draft.quantize=true", *full)
    ran.refused(2, r"quant\.folder=.*full cannot be used: it holds other files")


def test_a_checkpoint_on_disk_drafts_for_another(tmp_path):
    target = tiny_checkpoint(tmp_path / "target", "qwen2", layers=3)
    small = tiny_checkpoint(tmp_path / "small", "llama", layers=1)
    texts = []
    for name, draft in (("plain", ["draft=none"]), ("small", ["draft=small_model", f"draft.path={small}"])):
        ran = cli(*tiny_run(target, tmp_path / name, samples=1), *draft, "decoding.max_length=500")
        assert ran.code == 0, ran.err
        texts.append([record["token_ids"] for record in records_of(tmp_path / name)])
    assert texts[0] == texts[1]
    assert summary_of(tmp_path / "small")["run"]["draft"]["source"] == str(small)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([*SMALL, "draft.quantize=true", "quant=none"], r"draft\.quantize=true .* quant=hqq"),
        (
            ["draft=small_model", "draft.path=planted:tiny_tied"],
            r"draft\.path=planted:tiny_tied \(1003 tokens\) and target planted_tiny \(4096 tokens\) have different",
        ),
        (["draft=small_model", "draft.path=planted:none"], r"draft\.path=planted:none: no such planted shape"),
        (["draft=small_model", "draft.path=nowhere"], r"draft\.path=nowhere: no such folder"),
        ([*SMALL, "draft.temperature=0"], r"draft\.temperature"),
        (["draft=layer_skip", "draft.layers=[0,8]"], r"draft\.layers: no layer 8 in a target with layers 0\.\.7"),
        (["draft=layer_skip", "draft.keep=9"], r"draft\.keep=9: the target has 8 layers"),
        ([*SMALL, "draft.quantize=true", *PLAN], r"draft\.quantize=true is not built for offload=stream"),
        ([*SMALL, "draft.dtype=float32", *PLAN], r"draft\.dtype=float32: offload=stream runs .* bfloat16"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_cannot_draft_is_refused_in_one_line(tmp_path, overrides, line):
    cli(*PLANTED, *overrides, f"run_dir={tmp_path / 'run'}").refused(2, line)


def test_a_draft_that_is_never_accepted_is_noted(tmp_path, monkeypatch):
    """A head of random weights, which proposes nothing that the target would say."""
    monkeypatch.setattr("subspec.runs.notes.ENOUGH_PASSES", 5)
    never = ["draft=eagle2", "draft.path=planted", "tree=chain"]
    out, _, summary = run(tmp_path / "never", *never)
    assert summary["totals"]["tau"] == 1
    assert "no drafted token was accepted in 11 passes" in out
    for other in ([*SMALL, "tree.depth=1", "tree.width=1"], ["draft=none"]):
        assert "no drafted token" not in run(tmp_path / other[0], *other)[0]


def test_logits_that_are_not_finite_end_the_run_in_one_line(tmp_path):
    model = tiny_model("llama", max_positions=4096)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    folder = tiny_checkpoint(tmp_path / "ck", "llama", max_positions=4096)
    model.save_pretrained(folder)
    for draft, line in (("none", r"not finite.*target\.dtype=float32"), ("subspec", r"target: .* not finite")):
        cli(*tiny_run(folder, tmp_path / draft), f"draft={draft}").refused(1, line)
