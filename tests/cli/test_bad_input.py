"""What a user can get wrong: one line that names the key and the remedy, a status, and no traceback."""

import copy
import errno
import os
import re
import shutil
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import subspec.runs.loading
import subspec.runs.runner
from subspec.config.help_text import GROUPS
from subspec.config.schema import register_schemas
from subspec.errors import ConfigError
from subspec.utils.paths import conf_dir
from tests.helpers.cli import cli, done, records_of, summary_of, tiny_run
from tests.helpers.tiny import edit_config, tiny_checkpoint


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a good checkpoint and everything that the table below needs to be wrong."""
    root = tmp_path_factory.mktemp("places")
    tiny_checkpoint(root / "tiny", max_positions=4096)
    tiny_checkpoint(root / "window", "mistral", max_positions=4096)
    edit_config(root / "window", sliding_window=64)
    shutil.copytree(root / "tiny", root / "no_weights")
    (root / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(root / "tiny", root / "cut")
    os.truncate(root / "cut" / "model.safetensors", 5000)
    (root / "nothing").mkdir()
    (root / "norecords").mkdir()
    (root / "norecords" / "records.jsonl").touch()
    (root / "file").write_text("no folder")
    (root / "cut.gguf").write_bytes(b"GGUF")
    (root / "wrong.gguf").touch()
    os.truncate(root / "wrong.gguf", 98_362_432)  # the right size, and nothing in it
    rows = {
        "field": '{"question": "How many?"}',
        "broken": '{"question": ',
        "list": "[1]",
        "empty": "",
        "blank": '{"turns": ["Hello", ""]}',
    }
    for name, text in rows.items():
        (root / f"{name}.jsonl").write_text(text)
    return root


PLANS = [
    ("draft.unpack=always", r"draft\.unpack=always is for single modules, .*leave draft\.unpack at auto"),
    ("offload.codec=substitute draft=none quant=higgs quant.kernel=lut_mma", r"quant\.kernel=lut_mma .*draft\.kernel"),
    ("draft.proposer=small_model offload.card=rtx4090", r"draft\.proposer=small_model: .*draft\.proposer=eagle2"),
    ("offload.card=RTX_409", r"offload\.card=RTX_409: unknown card; known are .*RTX 4090.* set offload\.vram_gib and"),
    (
        "offload.card=RTX_4060 offload.vram_gib=12",
        r"offload\.vram_gib=12 .*RTX 4060: .*offload\.vram_gib to at most 7\.1",
    ),
    (
        "offload.card=RTX_4090 offload.vram_gib=0.1",
        r"offload\.vram_gib=0\.1 cannot hold this run, which needs 0\.\d+ GiB: \w.* 0\.\d+ \+ .*"
        r"; raise offload\.vram_gib to at least 0\.\d+, ",
    ),
    ("offload.card=RTX_4090 offload.ram_gib=0.5", r"host memory .* raise offload\.ram_gib to at least"),
    ("offload.vram_gib=8GB", r"offload\.vram_gib=8GB must be positive, or auto"),
    ("offload.ring_slots=0", r"offload\.ring_slots=0 must be at least 1"),
    ("offload.resident_layers=-1", r"offload\.resident_layers=-1 must not be negative"),
    ("offload.resident_layers=3", r"offload\.resident_layers=3: the target has 2 layers"),
    ("offload.link_gb_per_s=0", r"offload\.link_gb_per_s=0\.0 must be positive"),
]
"""Plans of ``offload=stream`` that are refused."""

CHECKS = [
    *((f"plan_only=true offload=stream {arguments}", line) for arguments, line in PLANS),
    ("quant=none", r"draft=subspec without a quantizer .* quant=hqq, or draft=none"),
    ("tree.width=321", r"tree\.width=321 .* vocabulary of 320 .*lower tree\.width"),
    (
        "benchmark.max_prompt_tokens=2037",
        r"benchmark\.max_prompt_tokens=2037 .* raise decoding\.max_length to at least 2049",
    ),
    ("decoding.max_new_tokens=2048", r"decoding\.max_new_tokens=2048 leaves no room for a prompt .*max_length"),
    ("decoding.max_length=4097", r"decoding\.max_length=4097 exceeds the 4096 positions"),
    ("target.path={root}/window", r"decoding\.max_length=2048 exceeds .* of 64 .*decoding\.max_length to 64"),
    ("quant.bits=5", r"quant\.bits=5: HQQ here has 8, 4, 3, 2 bits"),
    ("quant.bits_by.mlp=7", r"quant\.bits_by\.mlp=7: use 8, 4, 3, 2 bits"),
    ("quant.bits_by.mpl=3", r"quant\.bits_by\.mpl: no such key; quant\.bits_by has attention"),
    ("quant.bits_by.lm_head=8", r"lm_head stays exact: add it to quant\.modules"),
    ("quant.axis=2", r"quant\.axis=2: use 1"),
    ("quant.group_size=7", r"quant\.group_size=7: use a multiple of 8"),
    ("quant.modules=[head]", r"quant\.modules: unknown module 'head'; use attention, mlp"),
    ("quant.modules=[]", r"quant\.modules is empty"),
    ("quant.skip_layers=[2]", r"quant\.skip_layers: no layer 2 in a target with layers 0\.\.1"),
    ("tree.depth=0", r"tree\.depth=0 must be at least 1"),
    ("tree.width=0", r"tree\.width=0 must be at least 1"),
    ("tree=adaptive tree.min_depth=17", r"tree\.min_depth=17 exceeds tree\.depth=16: lower the former"),
    ("tree=adaptive tree.min_depth=-1", r"tree\.min_depth=-1 must not be negative"),
    ("draft.overlap_launches=false", r"draft\.overlap_launches=false is for .*offload=stream: set that"),
    ("draft.proposed=65", r"draft\.proposed=65 must lie in 1\.\.64"),
    (
        "draft.proposer=prompt_lookup draft.proposer_path=HERE",
        r"draft\.proposer_path=HERE: .*prompt_lookup has no weights",
    ),
    ("draft.proposer_path=HERE", r"draft\.proposer_path=HERE: draft\.proposer=none has"),
    ("seed=-1", r"seed=-1 must not be negative"),
    ("warmup=-1", r"warmup=-1 must not be negative"),
    ("decoding=sampling decoding.top_p=2", r"decoding\.top_p=2\.0 must lie in \(0, 1\]"),
    ("decoding=sampling decoding.temperature=0", r"decoding\.temperature=0\.0 .*decoding=greedy"),
    ("draft.temperature=nan", r"draft\.temperature=nan must be positive"),
    ("benchmark.max_samples=0", r"benchmark\.max_samples=0 must be at least 1 \(null: all\)"),
    ("decoding.stop=['']", r"decoding\.stop=\[''\] holds an empty string: leave it out"),
    ("run_dir=", r"run_dir= names no folder"),
    ("target.path=???", r"target\.path is not set: give it as target\.path=VALUE"),
    ("benchmark.source=file", r"benchmark\.source=file needs benchmark\.path=FILE"),
    ("benchmark.path=x.jsonl", r"benchmark\.path is set but benchmark\.source=sample"),
    ("plan_only=true", r"plan_only=true plans offload=stream, not offload=none"),
    ("plan_only=true offload=accelerate", r"plan_only=true plans offload=stream, not offload=accelerate"),
    ("offload=stream offload.card=RTX_4090", r"offload\.card=RTX_4090 is for planning: add plan_only=true"),
    ("offload=accelerate", r"offload=accelerate is a baseline of plain decoding: set draft=none"),
    ("offload=accelerate draft=none", r"offload=accelerate needs a CUDA device, .* on the cpu: set offload=none"),
    ("plan_only=true offload=stream offload.vram_gib=nan", r"offload\.vram_gib=nan must be positive"),
    ("profile=flame", r"profile=flame: choose one of none, timeline"),
    ("resume=true run_dir=", r"resume=true needs the folder to continue: run_dir=FOLDER"),
]
"""Refused by the run before anything is loaded."""

THROUGH_THE_COMMAND_LINE = (
    "quant=none",
    "quant.bits_by.mpl=3",
    "run_dir=",
    "target.path=???",
    "plan_only=true offload=stream offload.vram_gib=nan",
    "profile=flame",
    "resume=true run_dir=",
)
"""Cases of which the command line has a part, and one of each kind."""

FILES = [
    ("benchmark.path={root}/none.jsonl", r"benchmark\.path=.*none\.jsonl does not exist; give the path"),
    ("benchmark.path={root}/nothing", r"benchmark\.path=.*nothing is a folder; give a file"),
    ("benchmark.path={root}/field.jsonl", r"line 1: the row has no field 'answer'; rename the column"),
    ("benchmark.path={root}/broken.jsonl", r"line 1 is not JSON .*readable: JSON Lines"),
    ("benchmark.path={root}/list.jsonl", r"row 1 is not a JSON object"),
    ("benchmark.path={root}/empty.jsonl", r"empty\.jsonl holds no rows"),
    ("benchmark=mt_bench benchmark.path={root}/blank.jsonl", r"field 'turns' must be a list of non-empty"),
]
"""Files of ``benchmark.source=file``."""

TARGETS = [
    ("target.path={root}/none", 2, r"target\.path=.*none: no such folder, and not a hub id"),
    ("target.path={root}/file", 2, r"target\.path=.*file is a file; pass the checkpoint folder"),
    ("target.path={root}/nothing", 2, r"target: .*nothing has no config\.json"),
    ("target.path={root}/no_weights", 2, r"target: .*holds no weights: .*target\.path=FOLDER"),
    ("target.path={root}/cut", 1, r"target: .*model\.safetensors is (cut off|damaged).*copy it again"),
    (
        "target=smollm2_135m target.path={root}/cut.gguf",
        2,
        r"target\.path: .*cut\.gguf has 4 bytes instead of 98362432",
    ),
    ("target=smollm2_135m target.path={root}/wrong.gguf", 2, r"target\.path: .*wrong\.gguf has SHA-256 .*damaged"),
]
"""Checkpoints that are none."""

ELSEWHERE = [
    ("baseline={root}/nothing", 1, r"baseline: cannot read .*records\.jsonl: .*give the folder"),
    ("baseline={root}/norecords", 1, r"baseline=.*norecords holds no records: give the folder"),
    ("run_dir={root}/file/run", 1, r"cannot write .*file/run: a part of the path is a file.*run_dir="),
    ("run_dir={root}/file", 1, r"cannot write .*file: a file is in its place; .*run_dir="),
    ("logger=wandb logger.mode=online", 2, r"logger\.mode=online, but no W&B key found: .*offline"),
]
"""Folders and services."""


def refused(places, run_dir, arguments, code, line):
    """Run with ``arguments`` after those of a good run: they must be refused with ``line``."""
    more = arguments.replace("{root}", str(places)).split()
    cli(*tiny_run(places / "tiny", run_dir), *more).refused(code, line)


@pytest.fixture(scope="module")
def composed(places):
    """``composed(groups)``: the configuration of a good run with these options of groups; composed once each."""
    register_schemas()

    @cache
    def compose_once(groups):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", [*tiny_run(places / "tiny", "unused"), *groups])

    return lambda groups: copy.deepcopy(compose_once(groups))


@pytest.mark.parametrize(("arguments", "line"), [row for row in CHECKS if row[0] not in THROUGH_THE_COMMAND_LINE])
def test_checks(places, composed, tmp_path, monkeypatch, arguments, line):
    """Refused by the runner, before the target is loaded. The command line would take most of the time."""
    monkeypatch.setattr(subspec.runs.runner, "load", Mock(side_effect=AssertionError))
    texts = arguments.replace("{root}", str(places)).split()
    groups = tuple(text for text in texts if text.partition("=")[0] in GROUPS)
    cfg = composed(groups)
    for key, _, value in (text.partition("=") for text in texts if text not in groups):
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    with pytest.raises(ConfigError, match=line) as caught:
        subspec.runs.runner.run(cfg, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "line"), [row for row in CHECKS if row[0] in THROUGH_THE_COMMAND_LINE])
def test_checks_through_the_command_line(places, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    refused(places, tmp_path / "run", arguments, 2, line)


@pytest.mark.parametrize(("arguments", "code", "line"), [*TARGETS, *ELSEWHERE])
def test_files_folders_and_services(places, tmp_path, monkeypatch, arguments, code, line):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no converted target there
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    refused(places, tmp_path / "run", arguments, code, line)


@pytest.mark.parametrize(("arguments", "line"), FILES)
def test_benchmark_files(places, tmp_path, arguments, line):
    refused(places, tmp_path / "run", f"benchmark.source=file {arguments}", 2, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(places, tmp_path):
    line = r"device=cuda but no CUDA device: .*; run with device=cpu"
    refused(places, tmp_path / "run", "device=cuda", 2, line)


def test_a_folder_without_a_run_is_not_resumed(places):
    line = r"run_dir=\S+ holds no run to continue: correct the folder, or leave resume out"
    for folder in (places / "nothing", places / "none"):
        cli(f"run_dir={folder}", "resume=true").refused(2, line)
    assert not (places / "none").exists()


def test_a_disk_that_refuses_the_folder(places, tmp_path, monkeypatch):
    """As root, permissions stop nobody: the refusal is put in place of the system's."""
    mkdir = Path.mkdir

    def refuse(self, *arguments, **options):
        if self.name == "run":
            raise OSError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = r"cannot write .*run: no permission to write; choose another folder with run_dir="
    refused(places, tmp_path / "run", "", 1, line)


def test_memory_that_does_not_suffice(places, tmp_path, monkeypatch):
    errors = {
        MemoryError(): "host",
        torch.OutOfMemoryError(): "device",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"): "host",
        RuntimeError("Storage size calculation overflowed with sizes=[9]"): "host",
        TypeError("zeros(): ... Overflow when unpacking long long"): "host",
        RuntimeError("CUDA error: out of memory"): "device",
    }
    for index, (error, kind) in enumerate(errors.items()):
        monkeypatch.setattr(subspec.runs.loading, "assemble", Mock(side_effect=error))
        line = rf"out of {kind} memory: lower decoding\.max_length or the tree"
        refused(places, tmp_path / str(index), "", 1, line)


def test_prompts_longer_than_the_cache_are_skipped_and_counted(places, tmp_path):
    rows, long = tmp_path / "rows.jsonl", "How many? " * 200
    questions = "How many?", long, "Why?", long
    rows.write_text("".join(f'{{"question": "{text}", "answer": "#### 7"}}\n' for text in questions))
    file = ["benchmark.source=file", f"benchmark.path={rows}", "benchmark.max_samples=null"]
    arguments = [*tiny_run(places / "tiny", tmp_path / "run"), *file, "decoding.max_length=400"]
    ran = done(*arguments)
    assert re.search(r"samples +2, turns 2; skipped prompts: prompt_too_long 2", ran.out)
    assert summary_of(tmp_path / "run")["counts"]["skipped"] == {"prompt_too_long": 2}
    skipped = [record["skipped"] for record in records_of(tmp_path / "run") if record.get("skipped")]
    assert [skip["limit"] for skip in skipped] == [388, 388]
    assert all(skip["prompt_tokens"] > 388 for skip in skipped)

    none = done(*arguments, "benchmark.max_prompt_tokens=3", f"run_dir={tmp_path / 'none'}")
    assert re.search(r"samples +0, turns 0; skipped prompts: prompt_too_long 4", none.out)
    assert summary_of(tmp_path / "none")["totals"]["tokens_per_s"] is None


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False)])
def test_debugging_shows_the_traceback(places, tmp_path, monkeypatch, value, shown):
    monkeypatch.setenv("SUBSPEC_DEBUG", value)
    for wrong in ("tree.dept=3", "quant=none"):
        ran = cli(*tiny_run(places / "tiny", tmp_path / "run"), wrong)
        assert ran.code == 2
        assert ("Traceback" in ran.err) == shown
        assert ran.err.splitlines()[-1].startswith("error: ")


def test_a_bug_keeps_its_traceback(places, tmp_path, monkeypatch):
    monkeypatch.setattr(subspec.runs.runner, "load", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli(*tiny_run(places / "tiny", tmp_path / "run"))
