"""What is built holds everything a run needs: configs, sample prompts and the drafts that ship."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.forked import run_forked

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the wheel and the source distribution, made by the backend in this process's environment."""
    folder = tmp_path_factory.mktemp("built")
    # Nothing here looks at how well they are packed, which takes seconds.
    script = "import gzip, sys, zlib; gzip.GzipFile.__init__.__defaults__ = (None, None, 0, None, None);"
    script += "zlib.Z_DEFAULT_COMPRESSION = 0; from hatchling import build;"
    script += "build.build_wheel(sys.argv[1]); build.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_the_wheel_holds_configs_and_samples(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        relative = file.relative_to(ROOT)
        if "local" not in relative.parts:
            assert f"subspec/{relative.as_posix()}" in names
    for file in (ROOT / "subspec" / "benchmarks" / "samples").glob("*.jsonl"):
        assert f"subspec/{file.relative_to(ROOT / 'subspec').as_posix()}" in names
    assert "hydra_plugins/subspec.py" in names
    assert "hydra_plugins/__init__.py" not in names  # other distributions have their plugins there too
    assert not [name for name in names if name.startswith(("tests/", "experiments/", "scripts/"))]


SHIPPED = [
    f"subspec/drafts/weights/{draft}/{file}"
    for draft in ("eagle", "eagle3", "block_head", "small_model")
    for file in ("config.json", "model.safetensors", "MODEL_CARD.md")
]


def test_the_wheel_holds_the_drafts_that_ship(wheel):
    archive = zipfile.ZipFile(wheel)
    for name in SHIPPED:
        assert archive.read(name) == (ROOT / name).read_bytes()
    assert sum(archive.getinfo(name).file_size for name in SHIPPED) < 45e6


def test_so_does_the_source_distribution(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names.issuperset({*SHIPPED, "conf/config.yaml", "pyproject.toml"})


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """It reads the drafts that ship, finds configs and plugins, and the jobs of a sweep find the same package."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = """
import torch
import subspec.run
from subspec.config.schema import Eagle2DraftConfig, EmbeddedTargetConfig
from subspec.drafts.eagle_checkpoint import load_head, locate_for
from subspec.drafts.small_checkpoint import open_checkpoint, shipped_small_model
from subspec.drafts.small_model import load_small_model
from subspec.targets.meta_model import count_parameters
assert 'site' in subspec.__file__, subspec.__file__
cpu, target = torch.device('cpu'), EmbeddedTargetConfig(name='smollm2_135m')
files = locate_for(Eagle2DraftConfig(name='eagle2'), target, print)
head = load_head(files, hidden=576, target=target.name, dtype=torch.float32, device=cpu)
source = open_checkpoint(shipped_small_model(), torch.float32, print)
load_small_model(source, 49152, cpu)
for name in (head.source, source.source):
    assert name.startswith('shipped with subspec (sha256 '), name
print(sum(p.numel() for p in head.head.parameters()), count_parameters(source.config))
subspec.run.main(['-m', 'tree.depth=0', 'device=cpu', 'sweep_dir=sweep'])
"""
    done = run_forked(tmp_path / "site", script, tmp_path)
    assert done.code == 2, done.out + done.err
    assert done.out.startswith("4203648 7997568\n")
    # The job reads the configuration, and is refused before it imports torch, which takes seconds.
    log = (tmp_path / "sweep" / "0" / "job.log").read_text()
    assert log.startswith("error: tree.depth=0 must be at least 1")


@pytest.mark.parametrize("extra", ["dev", "sweep", "dashboard", "serve"])
def test_what_an_extra_asks_for_is_pinned(extra):
    """To a version that it allows; ``pip install -c constraints.txt -e '.[EXTRA]'`` is then what was tested."""
    pins = pinned()
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_pins_leave_rays_launcher_a_boto3():
    """Botocore asks for python-dateutil below 3; against another pin pip tries all its versions, for ever."""
    assert Version(pinned()["python-dateutil"]) < Version("3")


def pinned():
    """Versions in ``constraints.txt`` by canonical name."""
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    return {canonicalize_name(line.name): next(iter(line.specifier)).version for line in lines}
