"""The built wheel holds everything a run needs, configs and sample prompts included."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


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


def test_a_sweep_of_the_wheel_away_from_the_checkout(wheel, tmp_path):
    """Its jobs are processes, which must find the same package, and Hydra its plugins."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, 'site'); import subspec.run; "
        "subspec.run.main(['-m', 'plan_only=true', 'offload=stream', 'target=planted_qwen2_5_7b', "
        "'offload.card=RTX 4090', 'device=cpu', 'sweep_dir=sweep'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "sweep" / "0" / "plan.json").is_file()


def test_the_wheel_runs_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, 'site'); import subspec, subspec.run; "
        "assert 'site' in subspec.__file__, subspec.__file__; "
        "subspec.run.main(['tree=chain', '--cfg', 'job'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "name: chain" in done.stdout
    assert "smollm2_135m" in done.stdout
