"""What a user can get wrong: one line that names the key and the remedy, a status, and no traceback."""

import copy
import errno
import os
import re
import shutil
from functools import cache
from pathlib import Path

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
from tests.helpers.cli import cli, records_of, summary_of, tiny_run
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


CHECKS = {
    "nothing to quantize with": ("quant=none", r"draft=subspec without a quantizer .* quant=hqq, or draft=none"),
    "tree wider than the vocabulary": ("tree.width=321", r"tree\.width=321 .* vocabulary of 320 .*lower tree\.width"),
    "prompt budget larger than the cache": (
        "benchmark.max_prompt_tokens=2037",
        r"benchmark\.max_prompt_tokens=2037 \+ decoding\.max_new_tokens=12 exceed .* raise decoding\.max_length to at "
        r"least 2049 or lower",
    ),
    "answer as long as the cache": (
        "decoding.max_new_tokens=2048",
        r"decoding\.max_new_tokens=2048 leaves no room for a prompt .*lower the former or raise the latter",
    ),
    "more than the positions": ("decoding.max_length=4097", r"decoding\.max_length=4097 exceeds the 4096 positions"),
    "sliding window": (
        "target.path={root}/window",
        r"decoding\.max_length=2048 exceeds the attention window of 64 .*lower decoding\.max_length to 64",
    ),
    "bits": ("quant.bits=5", r"quant\.bits=5: HQQ here has 8, 4, 3, 2 bits"),
    "bits of a class": ("quant.bits_by.mlp=7", r"quant\.bits_by\.mlp=7: use 8, 4, 3, 2 bits"),
    "bits of no class": ("quant.bits_by.mpl=3", r"quant\.bits_by\.mpl: no such key; quant\.bits_by has attention"),
    "bits of what stays exact": ("quant.bits_by.lm_head=8", r"lm_head stays exact: add it to quant\.modules"),
    "axis": ("quant.axis=2", r"quant\.axis=2: use 1"),
    "group size": ("quant.group_size=7", r"quant\.group_size=7: use a multiple of 8"),
    "module": ("quant.modules=[head]", r"quant\.modules: unknown module 'head'; use attention, mlp"),
    "no module": ("quant.modules=[]", r"quant\.modules is empty"),
    "layer": ("quant.skip_layers=[2]", r"quant\.skip_layers: no layer 2 in a target with layers 0\.\.1"),
    "no levels": ("tree.depth=0", r"tree\.depth=0 must be at least 1"),
    "no nodes": ("tree.width=0", r"tree\.width=0 must be at least 1"),
    "more levels than there are": (
        "tree=adaptive tree.min_depth=17",
        r"tree\.min_depth=17 exceeds tree\.depth=16: lower the former",
    ),
    "negative least depth": ("tree=adaptive tree.min_depth=-1", r"tree\.min_depth=-1 must not be negative"),
    "unpacked and streamed": (
        "plan_only=true offload=stream draft.unpack=always",
        r"draft\.unpack=always is for single modules, .*leave draft\.unpack at auto",
    ),
    "kernel of modules for what only decodes": (
        "plan_only=true offload=stream offload.codec=substitute draft=none quant=higgs quant.kernel=lut_mma",
        r"quant\.kernel=lut_mma is for single modules: with offload=stream set draft\.kernel",
    ),
    "launches of levels that are not captured": (
        "draft.overlap_launches=false",
        r"draft\.overlap_launches=false is for the captured levels of offload=stream: set that",
    ),
    "guesses of a pass": ("draft.proposed=65", r"draft\.proposed=65 must lie in 1\.\.64"),
    "weights of a proposer that has none": (
        "draft.proposer=prompt_lookup draft.proposer_path=HERE",
        r"draft\.proposer_path=HERE: draft\.proposer=prompt_lookup has no weights: leave it at null",
    ),
    "weights of no proposer": ("draft.proposer_path=HERE", r"draft\.proposer_path=HERE: draft\.proposer=none has"),
    "a proposer and whole levels": (
        "plan_only=true offload=stream draft.proposer=small_model offload.card=rtx4090",
        r"draft\.proposer=small_model: .*set draft\.proposer=eagle2, .*or offload=none",
    ),
    "negative seed": ("seed=-1", r"seed=-1 must not be negative"),
    "negative warm-up": ("warmup=-1", r"warmup=-1 must not be negative"),
    "probability above one": ("decoding=sampling decoding.top_p=2", r"decoding\.top_p=2\.0 must lie in \(0, 1\]"),
    "zero temperature": ("decoding=sampling decoding.temperature=0", r"decoding\.temperature=0\.0 .*decoding=greedy"),
    "no number": ("draft.temperature=nan", r"draft\.temperature=nan must be positive"),
    "no samples": ("benchmark.max_samples=0", r"benchmark\.max_samples=0 must be at least 1 \(null: all\)"),
    "empty stop string": ("decoding.stop=['']", r"decoding\.stop=\[''\] holds an empty string: leave it out"),
    "empty folder name": ("run_dir=", r"run_dir= names no folder"),
    "no path": ("target.path=???", r"target\.path is not set: give it as target\.path=VALUE"),
    "source without file": ("benchmark.source=file", r"benchmark\.source=file needs benchmark\.path=FILE"),
    "file without source": ("benchmark.path=x.jsonl", r"benchmark\.path is set but benchmark\.source=sample"),
    "plan of no streaming": ("plan_only=true", r"plan_only=true plans offload=stream, not offload=none"),
    "plan of accelerate": (
        "plan_only=true offload=accelerate",
        r"plan_only=true plans offload=stream, not offload=accelerate",
    ),
    "card without plan": (
        "offload=stream offload.card=RTX_4090",
        r"offload\.card=RTX_4090 is for planning: add plan_only=true, or leave it out",
    ),
    "accelerate with a draft": (
        "offload=accelerate",
        r"offload=accelerate is a baseline of plain decoding: set draft=none",
    ),
    "accelerate without a GPU": (
        "offload=accelerate draft=none",
        r"offload=accelerate needs a CUDA device, .* on the cpu: set offload=none",
    ),
    "no such card": (
        "plan_only=true offload=stream offload.card=RTX_409",
        r"offload\.card=RTX_409: unknown card; known are .*RTX 4090.* set offload\.vram_gib and",
    ),
    "budget larger than the card": (
        "plan_only=true offload=stream offload.card=RTX_4060 offload.vram_gib=12",
        r"offload\.vram_gib=12 .* more than the 8 GiB free on RTX 4060: set offload\.vram_gib to at most 7\.1",
    ),
    "budget too small": (
        "plan_only=true offload=stream offload.card=RTX_4090 offload.vram_gib=0.1",
        r"offload\.vram_gib=0\.1 cannot hold this run, which needs 0\.\d+ GiB: \w.* 0\.\d+ \+ .*"
        r"; raise offload\.vram_gib to at least 0\.\d+, ",
    ),
    "host memory too small": (
        "plan_only=true offload=stream offload.card=RTX_4090 offload.ram_gib=0.5",
        r"host memory cannot hold this run, .* raise offload\.ram_gib to at least",
    ),
    "no budget": ("plan_only=true offload=stream offload.vram_gib=nan", r"offload\.vram_gib=nan must be positive"),
    "budget that is no number": (
        "plan_only=true offload=stream offload.vram_gib=8GB",
        r"offload\.vram_gib=8GB must be positive, or auto",
    ),
    "no ring": ("plan_only=true offload=stream offload.ring_slots=0", r"offload\.ring_slots=0 must be at least 1"),
    "fewer layers than none": (
        "plan_only=true offload=stream offload.resident_layers=-1",
        r"offload\.resident_layers=-1 must not be negative",
    ),
    "more layers than there are": (
        "plan_only=true offload=stream offload.resident_layers=3",
        r"offload\.resident_layers=3: the target has 2 layers",
    ),
    "no bandwidth": (
        "plan_only=true offload=stream offload.link_gb_per_s=0",
        r"offload\.link_gb_per_s=0\.0 must be positive",
    ),
    "unknown profile": ("profile=flame", r"profile=flame: choose one of none, timeline"),
    "resume without folder": ("resume=true run_dir=", r"resume=true needs the folder to continue: run_dir=FOLDER"),
}
"""Refused by the run before anything is loaded."""

THROUGH_THE_COMMAND_LINE = (
    "nothing to quantize with",
    "bits of no class",
    "empty folder name",
    "no path",
    "no budget",
    "unknown profile",
    "resume without folder",
)
"""Cases of which the command line has a part, and one of each kind."""

FILES = {
    "missing": ("benchmark.path={root}/none.jsonl", r"benchmark\.path=.*none\.jsonl does not exist; give the path"),
    "folder": ("benchmark.path={root}/nothing", r"benchmark\.path=.*nothing is a folder; give a file"),
    "field": ("benchmark.path={root}/field.jsonl", r"line 1: the row has no field 'answer'; rename the column"),
    "broken": ("benchmark.path={root}/broken.jsonl", r"line 1 is not JSON .*readable: JSON Lines"),
    "list": ("benchmark.path={root}/list.jsonl", r"row 1 is not a JSON object"),
    "empty": ("benchmark.path={root}/empty.jsonl", r"empty\.jsonl holds no rows"),
    "blank": ("benchmark=mt_bench benchmark.path={root}/blank.jsonl", r"field 'turns' must be a list of non-empty"),
}
"""Files of ``benchmark.source=file``."""

TARGETS = {
    "no such folder": ("target.path={root}/none", 2, r"target\.path=.*none: no such folder, and not a hub id"),
    "a file": ("target.path={root}/file", 2, r"target\.path=.*file is a file; pass the checkpoint folder"),
    "no checkpoint": ("target.path={root}/nothing", 2, r"target: .*nothing has no config\.json"),
    "no weights": ("target.path={root}/no_weights", 2, r"target: .*holds no weights: .*target\.path=FOLDER"),
    "cut weights": ("target.path={root}/cut", 1, r"target: .*model\.safetensors is (cut off|damaged).*copy it again"),
    "cut GGUF": (
        "target=smollm2_135m target.path={root}/cut.gguf",
        2,
        r"target\.path: .*cut\.gguf has 4 bytes instead of 98362432: it is damaged",
    ),
    "wrong GGUF": (
        "target=smollm2_135m target.path={root}/wrong.gguf",
        2,
        r"target\.path: .*wrong\.gguf has SHA-256 .* instead of .*: it is damaged",
    ),
}
"""Checkpoints that are none."""

ELSEWHERE = {
    "baseline of no run": ("baseline={root}/nothing", 1, r"baseline: cannot read .*records\.jsonl: .*give the folder"),
    "empty baseline": ("baseline={root}/norecords", 1, r"baseline=.*norecords holds no records: give the folder"),
    "folder below a file": ("run_dir={root}/file/run", 1, r"cannot write .*file/run: a part of the path is a file.*"
                                                          r"run_dir="),
    "folder that is a file": ("run_dir={root}/file", 1, r"cannot write .*file: a file is in its place; .*run_dir="),
    "no key for W&B": ("logger=wandb logger.mode=online", 2, r"logger\.mode=online, but no W&B key found: .*offline"),
}  # fmt: skip
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


@pytest.mark.parametrize("case", [name for name in CHECKS if name not in THROUGH_THE_COMMAND_LINE])
def test_checks(places, composed, tmp_path, monkeypatch, case):
    """Refused by the runner. The command line is left out: composing would take most of the time."""

    def load(*arguments, **options):
        raise AssertionError("the target was loaded before the configuration was refused")

    monkeypatch.setattr(subspec.runs.runner, "load", load)
    arguments, line = CHECKS[case]
    texts = arguments.replace("{root}", str(places)).split()
    groups = tuple(text for text in texts if text.partition("=")[0] in GROUPS)
    cfg = composed(groups)
    for key, _, value in (text.partition("=") for text in texts if text not in groups):
        OmegaConf.update(cfg, key, yaml.safe_load(value))
    with pytest.raises(ConfigError, match=line) as caught:
        subspec.runs.runner.run(cfg, tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", THROUGH_THE_COMMAND_LINE)
def test_checks_through_the_command_line(places, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, line = CHECKS[case]
    refused(places, tmp_path / "run", arguments, 2, line)


@pytest.mark.parametrize("case", FILES)
def test_benchmark_files(places, tmp_path, case):
    arguments, line = FILES[case]
    refused(places, tmp_path / "run", f"benchmark.source=file {arguments}", 2, line)


@pytest.mark.parametrize("case", TARGETS)
def test_targets(places, tmp_path, monkeypatch, case):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no converted target there
    arguments, code, line = TARGETS[case]
    refused(places, tmp_path / "run", arguments, code, line)


@pytest.mark.parametrize("case", ELSEWHERE)
def test_folders_and_services(places, tmp_path, monkeypatch, case):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    arguments, code, line = ELSEWHERE[case]
    refused(places, tmp_path / "run", arguments, code, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none(places, tmp_path):
    line = r"device=cuda but no CUDA device: .*; run with device=cpu"
    refused(places, tmp_path / "run", "device=cuda", 2, line)


def test_a_folder_without_a_run_is_not_resumed(places):
    for folder in (places / "nothing", places / "none"):
        ran = cli(f"run_dir={folder}", "resume=true")
        assert ran.code == 2
        assert re.search(r"run_dir=\S+ holds no run to continue: correct the folder, or leave resume out", ran.error)
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
    for index, (error, kind) in enumerate(
        (
            (MemoryError(), "host"),
            (torch.OutOfMemoryError(), "device"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "host"),
            (RuntimeError("Storage size calculation overflowed with sizes=[9]"), "host"),
            (TypeError("zeros(): ... Overflow when unpacking long long"), "host"),
            (RuntimeError("CUDA error: out of memory"), "device"),
        )
    ):

        def assemble(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(subspec.runs.loading, "assemble", assemble)
        run_dir = tmp_path / str(index) / "run"
        refused(places, run_dir, "", 1, rf"out of {kind} memory: lower decoding\.max_length or the tree")


def test_prompts_longer_than_the_cache_are_skipped_and_counted(places, tmp_path):
    rows = tmp_path / "rows.jsonl"
    long = "How many? " * 200
    rows.write_text(
        "".join(f'{{"question": "{text}", "answer": "#### 7"}}\n' for text in ("How many?", long, "Why?", long))
    )
    file = ["benchmark.source=file", f"benchmark.path={rows}", "benchmark.max_samples=null"]
    arguments = [*tiny_run(places / "tiny", tmp_path / "run"), *file, "decoding.max_length=400"]
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    assert re.search(r"samples +2, turns 2; skipped prompts: prompt_too_long 2", ran.out)
    assert summary_of(tmp_path / "run")["counts"]["skipped"] == {"prompt_too_long": 2}
    skipped = [record["skipped"] for record in records_of(tmp_path / "run") if record.get("skipped")]
    assert [skip["limit"] for skip in skipped] == [388, 388]
    assert all(skip["prompt_tokens"] > 388 for skip in skipped)

    none = cli(*arguments, "benchmark.max_prompt_tokens=3", f"run_dir={tmp_path / 'none'}")
    assert none.code == 0, none.err
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
    def load(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(subspec.runs.runner, "load", load)
    with pytest.raises(ZeroDivisionError):
        cli(*tiny_run(places / "tiny", tmp_path / "run"))
