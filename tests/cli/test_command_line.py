"""The command line itself: a typo, a wrong type or a malformed argument is answered before anything is imported."""

import os
import re
import subprocess
import sys

import pytest

from subspec import __version__
from tests.helpers.cli import ROOT, cli, command


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Folders with configuration files of a user's own, each with one mistake."""
    root = tmp_path_factory.mktemp("own")
    files = {
        "typo/local/default": "# @package _global_\nsedd: 1\n",
        "package/local/default": "seed: 1\n",
        "yaml/local/default": "# @package _global_\nseed: [1\n",
        "group/experiment/e": "# @package _global_\ndefaults:\n  - override /tre: chain\n",
        "option/experiment/e": "# @package _global_\ndefaults:\n  - override /tree: chains\n",
    }
    for name, text in files.items():
        file = root / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return root


COMMAND_LINE = [
    ("tree=foo", r"tree=foo: no such option; tree has adaptive, beam, chain, eagle2"),
    ("quant=hqqq", r"quant=hqqq: no such option \(did you mean hqq\?\)"),
    ("experiment=unknown", r"experiment=unknown: no such option"),
    ("tre=chain", r"tre: no such key or group \(did you mean tree\?\)$"),
    ("+tre=chain", r"tre: no such key or group \(did you mean tree\?\)"),
    ("tree.dept=3", r"tree\.dept: no such key \(did you mean depth\?\); tree has check_every, depth"),
    ("+tree.dept=3", r"tree\.dept: no such key \(did you mean depth\?\)"),
    ("quatn.bits=3", r"quatn: no such key or group \(did you mean quant\?\)"),
    ("tree.x.y=3", r"tree\.x: no such key; tree has check_every, depth"),
    ("xyz=1", r"xyz: no such key or group; a run has audit, .*\btree\b"),
    ("decoding.temperature=0.5", r"decoding\.temperature: .* it is a key of decoding=sampling"),
    ("offload.vram_gib=8", r"offload\.vram_gib: .* it is a key of offload=accelerate and offload=stream"),
    ("tree.modules=[mlp]", r"tree\.modules: .*did you mean quant\.modules\?"),
    ("temperature=1", r"did you mean draft\.temperature or decoding\.temperature\?"),
    ("--cfg job --info all", r"give one of them"),
    ("--resolve", r"--resolve is for --cfg"),
    ("decoding.max_newtokens=3", r"decoding\.max_newtokens: .*did you mean max_new_tokens\?"),
    ("sed=1", r"sed: no such key or group \(did you mean seed\?\)"),
    ("+benchmark.hub.x=1", r"benchmark\.hub\.x: no such key; benchmark\.hub has config"),
    ("tree.depth=x", r"tree\.depth=x: expected an integer"),
    ("quant.bits=3.5", r"quant\.bits=3\.5: expected an integer"),
    ("draft.temperature=hot", r"draft\.temperature=hot: expected a number"),
    ("tree.depth=null", r"tree\.depth=null: expected an integer"),
    ("decoding.stop=a", r"decoding\.stop=a: expected a list, \[A,B\]"),
    ("device=gpu", r"device=gpu: choose one of auto, cpu, cuda"),
    ("target.dtype=fp16", r"target\.dtype=fp16: choose one of auto, float32"),
    ("benchmark.source=web", r"benchmark\.source=web: choose one of auto, hub, file, sample"),
    ("resume=maybe", r"resume=maybe: expected true or false"),
    ("tree.depth", r"tree\.depth: give it a value, tree\.depth=VALUE"),
    ("=3", r"=3: there is no key before the equals sign; give KEY=VALUE"),
    ("tree.depth=[", r"tree\.depth=\[: not readable as KEY=VALUE; .* 'tree\.depth=\"\[\"'"),
    ("tree=null", r"tree=null: choose one of adaptive, beam, chain, eagle2, or leave tree out"),
    ("tree=3", r"tree=3: choose one of adaptive, beam, chain, eagle2"),
    ("~tree.depth", r"~tree\.depth: a key cannot be removed; .* tree\.depth=VALUE"),
    ("~tree", r"tree is not set: give it as tree=VALUE"),
    ("draft=none,subspec", r"draft=none,subspec: several values make a sweep: add -m"),
    ("seed=${nope}", r"seed: Interpolation key 'nope' not found"),
    ("--fast", r"unrecognized arguments: --fast; .*--help"),
    ("-m --cfg job", r"-m run, --cfg and --info show: give one of them"),
    ("-m tree.depth=1,2", r"run_dir= names the folder of one run: a sweep takes sweep_dir=FOLDER"),
    ("--config-dir={own}/typo", r"sedd: no such key or group \(did you mean seed\?\)"),
    ("--config-dir={own}/package", r"local: no such key.*# @package _global_"),
    ("--config-dir={own}/yaml", r"local/default\.yaml, line 3: not valid YAML .*correct"),
    ("--config-dir={own}/group experiment=e", r"tre: no such group \(did you mean tree\?\)"),
    ("--config-dir={own}/option experiment=e", r"tree=chains: no such option \(did you mean chain\?\)"),
    ("--config-dir={own}/none", r"none' not found"),
]
"""Arguments after those of a good run, and what the line must say: refused while the configuration is composed."""


@pytest.mark.parametrize(("arguments", "line"), COMMAND_LINE)
def test_refused_in_one_line(own, tmp_path, arguments, line):
    run_dir = tmp_path / "run"
    more = arguments.replace("{own}", str(own)).split(" ")
    cli("target=hub", f"target.path={tmp_path}", f"run_dir={run_dir}", *more).refused(2, line)
    assert not (run_dir / "records.jsonl").exists()


def test_what_needs_no_model_is_answered_before_torch_is_imported(tmp_path):
    """In one process: help, versions, wrong values, the first line of a run, a prediction without its inputs."""
    code = """
import sys
from subspec.cli import predict, run
import subspec.__main__ as commands
def call(main, *arguments):
    try: main(list(arguments))
    except SystemExit as stop: print(stop.code)
    assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'pandas'} & set(sys.modules), arguments
def argv(*arguments):
    sys.argv[1:] = arguments
    call(lambda _: commands.main())
argv(); argv('--version'); argv('run', '--help'); argv('predict', '--help'); argv('report', '--help')
call(run.main, 'draft.nosuch=1')
assert not {'rich', 'psutil', 'filelock', 'subspec.sweeps.launcher', 'subspec.benchmarks'} & set(sys.modules)
call(run.main, '--help', 'quant'); call(run.main, 'tree.depth=0'); call(run.main, 'quant.bits=5')
call(predict.main, '--help'); call(predict.main, 'tau=5'); call(predict.main, 'card=rtx_4090')
call(predict.main, 'card=rtx_4090', 'tau=5', 'tree.depth=0')
import subspec.predict
sys.modules['subspec.runs.runner'] = None  # importing it fails, after the first line
try: run.main(['run_dir=run'])
except ImportError: pass
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert f"subspec {__version__}\n" in process.stdout
    assert "python -m subspec predict" in process.stdout
    assert re.search(rf"^subspec {__version__}: target=smollm2_135m .*run_dir=run$", process.stdout, re.MULTILINE)
    refused = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    keys = ("draft.nosuch", "tree.depth=0", "quant.bits=5", "card is not set", "tau is not set", "tree.depth=0")
    assert [line.removeprefix("error: ").startswith(key) for line, key in zip(refused, keys, strict=True)] == [True] * 6


def test_a_process_ends_with_the_line_and_the_status():
    process = command("tree=foo")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "error: tree=foo: no such option; tree has adaptive, beam, chain, eagle2\n"


def test_a_reader_that_goes_away_is_no_error():
    process = command("--help", env={"PYTHONUNBUFFERED": "1"})
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
