"""Whole runs on a GPU: streamed, inside an enforced budget, audited, resumed; nothing is left behind."""

import gc
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from subspec.kernels import launch
from subspec.offload import disk
from subspec.planning import plan
from subspec.report.compare import compare
from subspec.runs import loading
from tests.helpers.cli import cli, command, records_of, summary_of

pytestmark = pytest.mark.gpu

WITH_HEAD = "quant.modules=[attention,mlp,lm_head]"

TINY = [
    "target=planted_tiny",
    "benchmark.source=sample",
    "benchmark.max_samples=2",
    "decoding.max_new_tokens=60",
    "decoding.max_length=1024",
    "tree.depth=8",
    "logger=none",
    "device=cuda",
]


def streamed(folder, extra, layers):
    """The summary of a streamed run with ``layers`` resident ones, which kept its budget and passed its audit."""
    budget = 0.5
    limits = ["decoding.max_new_tokens=60", "decoding.max_length=1024", "tree.depth=8"]
    ran = cli(*TINY, *extra, *limits, "offload=stream", f"offload.vram_gib={budget}",
              f"offload.resident_layers={layers}", "audit=true", f"run_dir={folder}")  # fmt: skip
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    passed_bit_for_bit(summary)
    assert summary["audit"]["exact"] > 100
    assert 0 < summary["peak_vram_gib"] <= budget
    assert summary["totals"]["bytes_streamed"] > 0
    return summary


def passed_bit_for_bit(summary):
    assert summary["run"]["bitwise"]["on"], summary["run"]["bitwise"]
    audit = summary["audit"]
    assert (audit["near_tie"], audit["mismatch"], audit["errors"]) == (0, 0, 0), audit
    assert audit["bitwise"] == audit["turns"]
    assert audit["exact"] > 0


@pytest.fixture(autouse=True)
def _uncapped():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "extra",
    [["draft=none"], ["draft=subspec"], ["tree=adaptive", "tree.depth=8"], ["decoding=sampling"]],
    ids=["plain", "beam", "adaptive", "sampling"],
)
def test_streamed_runs_keep_their_budget_and_pass_the_audit(tmp_path, extra):
    summary = streamed(tmp_path / "run", extra, 2)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["device_bytes"] <= 0.5 * 2**30
    assert len(plan["resident_layers"]) == 2
    assert summary["run"]["offload"] == "stream"


def test_a_run_leaves_nothing_on_the_device(tmp_path):
    left = []
    for name in ("first", "second"):  # the first one leaves what libraries keep: cuBLAS's workspaces
        stream = ["draft.kernel=int4_mma", "offload=stream", "offload.vram_gib=0.5"]
        ran = cli(*TINY, *stream, f"run_dir={tmp_path / name}")
        assert ran.code == 0, ran.err
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] <= left[0] + 2**20
    assert left[0] < 192 * 2**20  # cuBLAS's, 32 MiB for each of a handful of streams


@pytest.mark.parametrize(
    "quant",
    [
        ["quant.bits=8"],
        ["quant.bits=2"],
        ["quant.bits=3"],
        ["quant.group_size=128"],
        ["quant.modules=[attention,mlp,lm_head]", "quant.bits_by.mlp=3", "quant.bits_by.lm_head=8"],
        ["quant.modules=[mlp]", "quant.skip_layers=[0]"],
    ],
    ids=["8", "2", "3", "groups of 128", "mixed with a head", "parts exact"],
)
def test_streamed_runs_of_every_format_keep_their_budget_and_pass_the_audit(tmp_path, quant):
    folder = tmp_path / "run"
    ran = cli(*TINY, *quant, "offload=stream", "offload.vram_gib=0.5", "offload.resident_layers=2", "audit=true",
              f"run_dir={folder}")  # fmt: skip
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    passed_bit_for_bit(summary)
    assert 0 < summary["peak_vram_gib"] <= 0.5
    substitute = summary["run"]["substitute"]
    chosen = {role["kernel"] for role in substitute["details"]["kernels"]["roles"].values()}
    assert chosen <= {"int4_mma", "gemlite"}
    plan = json.loads((folder / "plan.json").read_text())
    planned = next(item["bytes"] for item in plan["items"] if item["name"] == "substitute")
    # Our kernel fills its last block of outputs; gemlite takes fewer bytes for 8 and 2 bits.
    assert substitute["stored_bytes"] <= 1.02 * planned
    if "gemlite" not in chosen:
        assert substitute["stored_bytes"] == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize(
    "extra",
    [
        ["quant=higgs"],
        ["quant=higgs", "decoding=sampling"],
        ["quant=higgs", "offload.codec=substitute", "decoding=sampling"],
        ["quant.bits=8", "offload.codec=substitute"],
        ["quant.bits=3", "offload.codec=substitute"],
        ["offload.codec=substitute", "decoding=sampling"],
        [WITH_HEAD, "offload.codec=substitute"],
        [WITH_HEAD, "quant.bits_by.lm_head=8", "offload.codec=substitute", "decoding=sampling"],
        [WITH_HEAD, "quant=higgs", "offload.codec=substitute"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_streamed_runs_by_higgs_and_coded_ones_keep_their_budget_and_pass_the_audit(tmp_path, extra):
    summary = streamed(tmp_path / "run", extra, layers=2)
    assert summary["run"]["substitute"]["quantizer"] == ("higgs" if "quant=higgs" in extra else "hqq")
    assert ("coded_head_bits_per_weight" in summary["run"]) == (WITH_HEAD in extra or "quant=higgs" not in extra)


STREAM = ["offload=stream", "offload.vram_gib=0.5", "offload.resident_layers=2"]


@pytest.mark.parametrize("decoding", [[], ["decoding=sampling", "decoding.temperature=0.8", "decoding.top_p=0.95"]],
                         ids=["greedy", "sampling"])  # fmt: skip
def test_every_draft_and_tree_emits_plain_decodings_texts(tmp_path, decoding):
    plain = tmp_path / "plain"
    common = [*TINY, *decoding, "decoding.bitwise=true", "decoding.max_new_tokens=60", "decoding.max_length=1024"]
    assert cli(*common, "draft=none", f"run_dir={plain}").code == 0
    runs = {
        "plain streamed": ["draft=none", *STREAM],
        "plain in chunks": ["draft=none", "decoding.prefill_chunk=37"],
        "beam": ["draft=subspec", *STREAM],
        "beam, not coded": ["draft=subspec", *STREAM, "offload.codec=none"],
        "beam, coded head": ["draft=subspec", *STREAM, WITH_HEAD, "offload.codec=substitute"],
        "chain": ["tree=chain", *STREAM],
        "adaptive": ["tree=adaptive", *STREAM],
        "whole": ["draft=subspec"],
        "whole, eagle2": ["draft=subspec", "tree=eagle2"],
        "layer_skip": ["draft=layer_skip", "tree=adaptive", *STREAM[:2]],
        "small_model": ["draft=small_model", "draft.path=planted:tiny_draft", *STREAM],
        "eagle2": ["draft=eagle2", "draft.path=planted", "tree=eagle2", *STREAM],
        "block_head": ["draft=block_head", "draft.path=planted", "tree=eagle2", *STREAM],
        "prompt_lookup": ["draft=prompt_lookup", "tree=eagle2", *STREAM],
        "pard": ["draft=pard", "draft.path=planted:tiny_draft", *STREAM],
    }
    for name, extra in runs.items():
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        depth = [] if "tree=eagle2" not in extra else ["tree.depth=5"]
        ran = cli(*common, *extra, *depth, f"run_dir={folder}")
        assert ran.code == 0, f"{name}: {ran.err}"
        found = compare(plain, folder)
        assert len(found.turns["identical"]) == len(records_of(plain)), f"{name}: {found.differences}"
        assert not found.differences, name


@pytest.fixture
def on_disk(monkeypatch):
    """Every second streamed layer is read from the disk, as if host memory held no more of them."""

    def tiers(layout, decision, limit):
        return replace(decision, disk=(layout.spec.layers - decision.resident) // 2, in_files=True)

    monkeypatch.setattr(plan, "with_tiers", tiers)


@pytest.mark.parametrize(
    "extra",
    [
        ["draft=none"],
        ["draft=subspec", "offload.codec=none"],
        ["draft=subspec", "offload.codec=substitute"],
        ["draft=subspec", "offload.codec=substitute", "quant=higgs", "tree=adaptive", "decoding=sampling"],
        ["draft=none", "offload.codec=substitute"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_layers_from_a_disk_change_no_token(tmp_path, monkeypatch, extra, on_disk):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    tiered = tmp_path / "tiered"
    for start in range(2):  # the second one finds the files
        folder = tiered if start else tmp_path / "first"
        ran = cli(*TINY, *STREAM, *extra, "offload.ram_gib=64", "audit=true", f"run_dir={folder}")
        assert ran.code == 0, ran.err
        summary = summary_of(folder)
        passed_bit_for_bit(summary)
        facts = summary["run"]
        assert len(facts["disk"]["layers"]) == 3
        assert facts["disk"]["gb_per_s"] > 0
        assert facts["slower_link"] in ("disk", "link")
        assert summary["totals"]["link_gb_per_s"] == facts["link_gb_per_s"]
    monkeypatch.undo()
    pinned = tmp_path / "pinned"
    assert cli(*TINY, *STREAM, *extra, f"run_dir={pinned}").code == 0
    found = compare(pinned, tiered)
    assert not found.differences
    assert len(found.turns["identical"]) == len(records_of(pinned)) > 0


@pytest.mark.parametrize("codec", ["none", "substitute"])
def test_a_file_cut_off_while_a_run_streams_it_ends_the_run_in_one_line(tmp_path, monkeypatch, on_disk, codec):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    read, calls = os.preadv, iter(range(10_000))

    def cutting(fd, buffers, offset):
        if next(calls) == 30:
            for kind in ("*.bin", "*.coded"):
                for file in (tmp_path / "cache").rglob(kind):
                    os.truncate(file, 4096)
        return read(fd, buffers, offset)

    monkeypatch.setattr(loading, "measure_disk", lambda layers, slots: 1.0)
    monkeypatch.setattr(disk.os, "preadv", cutting)
    ran = cli(*TINY, *STREAM, f"offload.codec={codec}", "offload.ram_gib=64", f"run_dir={tmp_path / 'run'}")
    ran.refused(1, r"layer_\d+\.\w+ .*(cut off|changed)")


def test_without_bitwise_the_devices_library_computes(tmp_path):
    folder = tmp_path / "run"
    ran = cli(*TINY, *STREAM, "decoding.bitwise=false", "audit=true", f"run_dir={folder}")
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    assert summary["run"]["bitwise"] == {"on": False, "reason": "decoding.bitwise=false", "kernels": {}}
    assert (summary["audit"]["bitwise"], summary["audit"]["mismatch"]) == (0, 0)


def test_what_is_not_covered_is_refused(tmp_path):
    for extra in (["target.dtype=float32"], ["draft=none", "offload=accelerate"]):
        ran = cli(*TINY, *extra, "decoding.bitwise=true", f"run_dir={tmp_path}")
        ran.refused(2, r"decoding\.bitwise=true")


def test_accelerates_offloading_runs_the_same_target(tmp_path):
    folder = tmp_path / "run"
    # The target has 13 MB, and 1.5 GiB are kept for everything else.
    own = ["draft=none", "offload=accelerate", "offload.vram_gib=1.505"]
    ran = cli(*TINY, *own, "audit=true", f"run_dir={folder}")
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    assert summary["audit"]["mismatch"] == 0
    assert not summary["run"]["bitwise"]["on"]
    assert summary["run"]["modules_offloaded"] > 0
    assert "drawn on cuda" in summary["run"]["target_source"]  # the same weights as every other run's


def test_an_interrupted_streamed_run_resumes(tmp_path):
    folder = tmp_path / "run"
    long = ["benchmark.max_samples=5", "decoding.max_new_tokens=600"]
    process = command(*TINY, *long, "offload=stream", "offload.vram_gib=0.5", f"run_dir={folder}")
    records = folder / "records.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_bytes().count(b"\n") >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert 1 <= len(records_of(folder)) < 5
    ran = cli(f"run_dir={folder}", "resume=true")
    assert ran.code == 0, ran.err
    assert len(records_of(folder)) == 5


def used_gib():
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers use the same device's memory")
@pytest.mark.parametrize(("counts", "asked"), [("allocator", 0.5), ("device", 1.5), ("device", "auto")])
def test_a_process_of_its_own_takes_no_more_than_its_plan_loading_included(tmp_path, counts, asked):
    folder, before, seen = tmp_path / "run", used_gib(), 0.0
    process = command(*TINY, "draft.kernel=int4_mma", "offload=stream", f"offload.vram_gib={asked}", "audit=true",
                      f"offload.vram_counts={counts}", "offload.resident_layers=2", f"run_dir={folder}")  # fmt: skip
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            _, err = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            seen = max(seen, used_gib() - before)
    assert process.returncode == 0, err
    summary, plan = summary_of(folder), json.loads((folder / "plan.json").read_text())
    run, planned, budget = summary["run"], plan["device_bytes"] / 2**30, plan["budget"] / 2**30
    assert budget == asked or budget > 0.9 * (torch.cuda.mem_get_info()[1] / 2**30 - before)
    assert planned <= budget
    assert 0 < summary["peak_vram_gib"] <= planned
    assert 0 < run["loading_peak_vram_gib"] <= planned
    assert run["reserved_vram_gib"] <= budget
    if counts == "device":
        assert 0 < seen <= budget
    if shutil.which("nvidia-smi"):  # without it, this process's memory is not told from the run's
        cuda, held = run["loading_cuda_vram_gib"], summary["device_vram_gib"]
        assert 0.1 < cuda <= plan["cuda_bytes"] / 2**30, "what CUDA takes is planned"
        assert held == pytest.approx(cuda + run["reserved_vram_gib"], abs=0.3)
        assert held - 0.1 < seen < held + 0.5, "as another process sees it, the probe of the link included"


def test_an_infeasible_budget_is_refused_before_loading(tmp_path):
    ran = cli(*TINY, "offload=stream", "offload.vram_gib=0.05", f"run_dir={tmp_path / 'run'}")
    ran.refused(2, r"offload\.vram_gib")


SMALL = ["draft=small_model", "draft.path=planted:tiny_draft"]
SKIP = ["draft=layer_skip"]


@pytest.mark.parametrize(
    "extra",
    [
        *(SMALL, [*SMALL, "tree=adaptive"], [*SMALL, "decoding=sampling"], SKIP, [*SKIP, "tree=adaptive"]),
        *([*SMALL, "tree=chain", "draft.overlap_launches=false"], [*SKIP, "draft.keep=3"]),
        [*SKIP, "decoding=sampling"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_streamed_drafts_without_a_substitute_keep_their_budget_and_pass_the_audit(tmp_path, extra):
    summary = streamed(tmp_path / "run", extra, layers=4)
    facts = summary["run"]
    assert facts["substitute"] is None  # nothing was quantized, whatever `quant` says
    assert facts["draft"]["levels"] == "fused, bfloat16"
    assert facts["graphs_captured"] >= 8
    in_order = "draft.overlap_launches=false" in extra
    assert facts["draft_launches"] == launch.how(torch.device("cuda"), False if in_order else None)
    assert summary["totals"]["tau"] > 1.2


@pytest.mark.parametrize("extra", [SMALL, [*SMALL, "draft.quantize=true"], SKIP], ids=lambda e: " ".join(e))
def test_drafts_without_a_substitute_run_on_a_gpu_without_offloading(tmp_path, extra):
    folder = tmp_path / "run"
    ran = cli(*TINY, *extra, "audit=true", f"run_dir={folder}")
    assert ran.code == 0, ran.err
    summary = summary_of(folder)
    passed_bit_for_bit(summary)
    assert summary["run"]["draft"]["levels"] == ("fused, bfloat16" if extra == SMALL else "modules")
    assert (summary["run"]["substitute"] is None) == ("draft.quantize=true" not in extra)
