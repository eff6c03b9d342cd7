"""Whole runs of ``offload=stream`` with ``device=cpu``: the tokens of plain decoding, and one-line refusals."""

import json
import os
from dataclasses import replace

import psutil
import pytest
import torch
import yaml

from subspec.config.schema import Config, Device, NoDraftConfig, StreamOffloadConfig
from subspec.errors import ConfigError
from subspec.offload import disk
from subspec.records.method import method_label
from subspec.session import check_offload
from tests.helpers.cli import cli, records_of, summary_of, tiny_run
from tests.helpers.tiny import tiny_checkpoint

PLANTED = ["target=planted_tiny", "benchmark.source=sample", "benchmark.max_samples=1", "warmup=0", "logger=none"]
PLANTED += ["decoding.max_new_tokens=12", "decoding.max_length=1024", "tree.depth=4", "device=cpu"]
STREAM = ["offload=stream", "offload.resident_layers=3", "offload.ram_gib=30"]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """Token ids of plain decoding with the whole target."""
    found = {}
    for decoding in ("greedy", "sampling"):
        folder = tmp_path_factory.mktemp("plain") / decoding
        assert cli(*PLANTED, "draft=none", f"decoding={decoding}", f"run_dir={folder}").code == 0
        found[decoding] = [record["token_ids"] for record in records_of(folder)]
    return found


PARTS = "quant.skip_layers=[1] quant.modules=[mlp] tree=eagle2 tree.total_tokens=20"
RUNS = [
    ("draft=none", "greedy"),
    ("draft=subspec tree=adaptive", "sampling"),
    (f"draft=subspec {PARTS}", "greedy"),
    ("draft=prompt_lookup", "sampling"),
    ("draft=subspec draft.vocab=2000", "greedy"),
    ("draft=eagle2 draft.path=planted", "sampling"),
    ("draft=block_head draft.path=planted", "greedy"),
]
OTHERS = [(draft, "greedy" if decoding == "sampling" else "sampling") for draft, decoding in RUNS]


@pytest.mark.parametrize(("draft", "decoding"), RUNS + [pytest.param(*run, marks=pytest.mark.slow) for run in OTHERS])
def test_every_draft_emits_plain_decodings_tokens(tmp_path, plainly, draft, decoding):
    options = [*draft.split(), f"decoding={decoding}", "audit=true", f"run_dir={tmp_path / 'run'}"]
    ran = cli(*PLANTED, *STREAM, *options)
    assert ran.code == 0, ran.err
    assert [record["token_ids"] for record in records_of(tmp_path / "run")] == plainly[decoding]
    summary = summary_of(tmp_path / "run")
    totals, facts = summary["totals"], summary["run"]
    assert summary["audit"]["mismatch"] == 0
    assert facts["disk"].keys() == {
        "layers", "bytes_per_pass", "gb_per_s", "direct", "file_system", "files", "file",
    }  # fmt: skip
    assert facts["disk"]["gb_per_s"] == facts["link_gb_per_s"]
    assert facts["disk"]["bytes_per_pass"] == facts["streamed_bytes_per_pass"]
    assert facts["streamed_bytes_per_pass"] == totals["bytes_per_pass"] == facts["plan"]["streamed_bytes_per_pass"]
    assert totals["link_gb_per_s"] == facts["link_gb_per_s"] > 0
    assert totals["roofline_share"] > 0
    assert "no link to hide behind" not in ran.out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "disk 30 GiB" in method_label(config, facts)
    if "subspec" in draft and "vocab" not in draft:
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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["offload.ram_gib=0.1"], r"offload\.ram_gib=0\.1 cannot hold this run, which needs [\d.]+ GiB: process"),
        (["offload.resident_layers=9"], r"offload\.resident_layers=9: the target has 8 layers"),
        (["offload.codec=substitute"], r"offload\.codec=substitute is for a GPU"),
        (["quant=higgs"], r"draft=subspec with offload=stream and device=cpu .* quant=hqq"),
        (["quant.axis=0"], r"fused levels on a CPU take quant=hqq with quant\.axis=1"),
        (["draft=layer_skip"], r"draft=layer_skip runs beside a target that streams to a GPU"),
        (["draft=pard", "draft.path=planted:tiny_draft"], r"draft=pard .* offload=none"),
        (["draft=small_model", "draft.path=planted:tiny_draft"], r"draft=small_model .* offload=none"),
        (["draft.kernel=int4_mma"], r"draft\.kernel=int4_mma chooses the kernel of offload=stream"),
        (["draft.unpack=always"], r"draft\.unpack=always"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_stream_from_a_disk_is_refused(tmp_path, overrides, line):
    cli(*PLANTED, "offload=stream", *overrides, f"run_dir={tmp_path / 'run'}").refused(2, line)


def test_a_plan_alone_loads_nothing(tmp_path):
    ran = cli(*PLANTED, "offload=stream", "plan_only=true", f"run_dir={tmp_path}")
    assert ran.code == 0, ran.err
    assert "host memory" in ran.out
    assert "on the device" not in ran.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["resident_layers"] == list(range(8))
    assert plan["link"] is None


def test_without_a_gpu_streaming_wants_to_be_asked_for():
    """A missing driver must not turn a GPU run into a slow one."""
    config = Config(offload=StreamOffloadConfig(name="stream"), draft=NoDraftConfig(name="none"))
    with pytest.raises(ConfigError, match=r"offload=stream needs a CUDA device, .* on the cpu: .* device=cpu"):
        check_offload(config, torch.device("cpu"))
    check_offload(replace(config, device=Device.cpu), torch.device("cpu"))
