"""Whole runs of ``offload=stream`` with ``device=cpu``: the tokens of plain decoding, a plan that holds, one-line refusals."""

import json
import os

import psutil
import pytest

from subspec.offload import disk
from tests.helpers.cli import cli, records_of, summary_of, tiny_run
from tests.helpers.tiny import tiny_checkpoint

PLANTED = ["target=planted_tiny", "benchmark.source=sample", "benchmark.max_samples=1", "warmup=0", "logger=none"]
PLANTED += ["decoding.max_new_tokens=12", "decoding.max_length=1024", "tree.depth=4", "device=cpu"]
STREAM = ["offload=stream", "offload.resident_layers=3"]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """Token ids of plain decoding with the whole target."""
    found = {}
    for decoding in ("greedy", "sampling"):
        folder = tmp_path_factory.mktemp("plain") / decoding
        assert cli(*PLANTED, "draft=none", f"decoding={decoding}", f"run_dir={folder}").code == 0
        found[decoding] = [record["token_ids"] for record in records_of(folder)]
    return found


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
@pytest.mark.parametrize(
    "draft",
    [
        ["draft=none"],
        ["draft=subspec", "tree=adaptive"],
        ["draft=subspec", "quant.skip_layers=[1]", "quant.modules=[mlp]", "tree=eagle2", "tree.total_tokens=20"],
        ["draft=prompt_lookup"],
        ["draft=eagle2", "draft.path=planted"],
    ],
    ids=lambda draft: " ".join(draft[:2]),
)
def test_every_draft_emits_plain_decodings_tokens(tmp_path, plainly, draft, decoding):
    ran = cli(*PLANTED, *STREAM, *draft, f"decoding={decoding}", "audit=true", f"run_dir={tmp_path / 'run'}")
    assert ran.code == 0, ran.err
    assert [record["token_ids"] for record in records_of(tmp_path / "run")] == plainly[decoding]
    summary = summary_of(tmp_path / "run")
    totals, facts = summary["totals"], summary["run"]
    assert summary["audit"]["mismatch"] == 0
    assert facts["disk"].keys() == {"direct", "file_system", "files", "file"}
    assert facts["streamed_bytes_per_pass"] == totals["bytes_per_pass"] == facts["plan"]["streamed_bytes_per_pass"]
    assert totals["link_gb_per_s"] == facts["link_gb_per_s"] > 0
    assert totals["roofline_share"] > 0
    assert "no link to hide behind" not in ran.out
    if draft[0] == "draft=subspec":
        assert totals["tau"] > 2


def test_a_checkpoint_is_read_in_place_within_its_budget(tmp_path):
    folder = tiny_checkpoint(tmp_path / "ck", "llama", layers=6, max_positions=4096)
    own = psutil.Process().memory_info().rss / 2**30
    plain = ["draft=none", "quant=none"]
    texts = []
    for name, offload in {
        "whole": ["offload=none"],
        "none": ["offload=stream", "offload.resident_layers=0"],
        "all": ["offload=stream", f"offload.ram_gib={own + 1:.3f}"],
        "bfloat16": ["offload=stream", "offload.resident_layers=1", "target.dtype=bfloat16"],
    }.items():
        run_dir = tmp_path / name
        ran = cli(*tiny_run(folder, run_dir, samples=1), *plain, *offload)
        assert ran.code == 0, ran.err
        texts.append([record["token_ids"] for record in records_of(run_dir)])
        facts = summary_of(run_dir)["run"]
        if name == "none":
            assert facts["disk"]["file"] == str(folder / "model.safetensors")
        if name == "all":
            assert (facts["resident_layers"], facts.get("disk")) == ([0, 1, 2, 3, 4, 5], None)
            assert "every layer fits in memory" in ran.out
        if name == "bfloat16":
            assert facts["disk"]["file"].endswith(".bin")
    assert texts[0] == texts[1] == texts[2]


def test_a_file_cut_off_while_a_run_reads_it_ends_the_run_in_one_line(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "ck", "llama", layers=4, max_positions=4096)
    read, calls = os.preadv, iter(range(10_000))

    def cutting(fd, buffers, offset):
        if next(calls) == 60:
            os.truncate(folder / "model.safetensors", 4096)
        return read(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", cutting)
    ran = cli(*tiny_run(folder, tmp_path / "run"), "draft=none", "offload=stream", "offload.resident_layers=0")
    ran.refused(1, r"model\.safetensors .*(cut off|changed)")


# ----------------------------------------------------------------------------------------------- plans


def planned(tmp_path, *overrides):
    """The printed and the written plan."""
    run_dir = tmp_path / "plan"
    ran = cli(*PLANTED, "offload=stream", "plan_only=true", *overrides, f"run_dir={run_dir}")
    assert ran.code == 0, ran.err
    return ran.out, json.loads((run_dir / "plan.json").read_text())


def test_a_plan_holds_what_a_budget_allows(tmp_path):
    _, least = planned(tmp_path, "offload.ram_gib=100", "offload.resident_layers=0", "offload.link_gb_per_s=2")
    own = least["host_bytes"]
    layer, kept_free = least["layer_bytes"], 2**26
    assert least["streamed_layers"] == list(range(8))
    assert least["pass_seconds"] == 8 * layer / 2e9
    assert least["items"][0]["name"] == "process"
    assert {item["place"] for item in least["items"]} == {"host"}
    out, some = planned(tmp_path, f"offload.ram_gib={(own + kept_free + 4.7 * layer) / 2**30}")
    # The process grows a little from test to test.
    assert 2 <= len(some["resident_layers"]) <= 6
    assert some["host_bytes"] + some["headroom_bytes"] <= some["budget"]
    assert some["link"] is None
    assert "host memory" in out
    assert "on the device" not in out
    draft = least["host_bytes"] - planned(tmp_path, "draft=none", "offload.resident_layers=0")[1]["host_bytes"]
    assert draft > 8 * layer / 4 / 2


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["offload.ram_gib=0.1"],
            r"offload\.ram_gib=0\.1 cannot hold this run, which needs \d\.\d+ GiB: process \d.* \+ .*; "
            r"raise offload\.ram_gib to at least \d\.\d+, ",
        ),
        (["offload.resident_layers=9"], r"offload\.resident_layers=9: the target has 8 layers"),
        (["offload.codec=substitute"], r"offload\.codec=substitute is for a GPU"),
        (["quant=higgs"], r"draft=subspec with offload=stream and device=cpu .* quant=hqq"),
        (["quant.axis=0"], r"fused levels on a CPU take quant=hqq with quant\.axis=1"),
        (["draft=layer_skip"], r"draft=layer_skip runs beside a target that streams to a GPU"),
        (["draft=small_model", "draft.path=planted:tiny_draft"], r"draft=small_model .* offload=none"),
        (["draft.kernel=int4_mma"], r"draft\.kernel=int4_mma chooses the kernel of offload=stream"),
        (["draft.unpack=always"], r"draft\.unpack=always"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_stream_from_a_disk_is_refused(tmp_path, overrides, line):
    cli(*PLANTED, "offload=stream", *overrides, f"run_dir={tmp_path / 'run'}").refused(2, line)


def test_a_refusal_names_a_change_that_fits(tmp_path):
    _, least = planned(tmp_path, "offload.ring_slots=1", "offload.resident_layers=0", "decoding.max_length=256")
    short = (least["host_bytes"] + 2**26 + 2**22) / 2**30
    cli(
        *PLANTED, "offload=stream", "decoding.max_length=4096", f"offload.ram_gib={short}", f"run_dir={tmp_path}"
    ).refused(2, r"raise offload\.ram_gib to at least \d\.\d+, or ")
