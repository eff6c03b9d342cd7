"""Which job lies in which folder, who may write it, and which sweep a command continues."""

import json

import pytest

from subspec.errors import ConfigError, SubspecError
from subspec.records.sweep_folder import SweepFolder, config_digest, read_manifest, unfinished_sweep
from subspec.sweeps.job_table import labels, varying

CONFIG = {
    "tree": {"depth": 8},
    "seed": 0,
    "run_dir": "a",
    "resume": False,
    "benchmark": {"name": "gsm8k", "max_samples": 2},
}


def config(**changes):
    return {**CONFIG, **changes}


def test_a_job_is_known_by_what_it_computes():
    same = config(run_dir="b", resume=True, experiment="x", benchmark={"name": "gsm8k", "max_samples": 9}, logger={})
    assert config_digest(config()) == config_digest(same)
    assert config_digest(config()) == config_digest(dict(reversed(CONFIG.items())))
    assert config_digest(config()) != config_digest(config(seed=1))
    assert config_digest(config()) != config_digest(config(tree={"depth": 9}))


def test_jobs_keep_their_folders_when_the_sweep_changes(tmp_path):
    with SweepFolder.open(tmp_path, ["seed=0,1"]) as folder:
        first = folder.assign([(["seed=0"], config()), (["seed=1"], config(seed=1))])
        assert [job.number for job in first] == [0, 1]
    (tmp_path / "5").mkdir()  # somebody else's
    with SweepFolder.open(tmp_path, ["seed=2,1,0"]) as folder:
        wanted = [(["seed=2"], config(seed=2)), (["seed=1"], config(seed=1)), (["seed=0"], config())]
        assert [job.number for job in folder.assign(wanted)] == [6, 1, 0]
        assert folder.job_folder(folder.assign(wanted)[0]) == tmp_path / "6"


def test_equal_configurations_are_one_job(tmp_path):
    with SweepFolder.open(tmp_path, []) as folder:
        jobs = folder.assign([(["quant=none"], config()), (["quant=hqq"], config())])
    assert jobs[0] == jobs[1]
    assert len(read_manifest(tmp_path)["jobs"]) == 1


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    with (
        SweepFolder.open(tmp_path, []),
        pytest.raises(SubspecError, match=r"sweep_dir=\S+ is in use by another process: wait for it, or choose"),
    ):
        SweepFolder.open(tmp_path, [])
    SweepFolder.open(tmp_path, []).close()


def test_the_folder_of_a_single_run_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds the records of a single run.*sweep_dir="):
        SweepFolder.open(tmp_path, [])


@pytest.mark.parametrize("text", ["{", "[]", '{"jobs": [{}]}', ""])
def test_a_manifest_that_cannot_be_read(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match=r"sweep\.json cannot be read: mend it, or choose"):
        SweepFolder.open(tmp_path, [])
    SweepFolder.open(tmp_path / "other", []).close()  # and the lock is free again


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspecError, match=r"cannot write.*sweep_dir="):
        SweepFolder.open(tmp_path / "file" / "sweep", [])


def made(path, command, finished):
    with SweepFolder.open(path, command) as folder:
        folder.write(finished=finished)
    return path


def test_a_command_continues_its_own_newest_unfinished_sweep(tmp_path):
    made(tmp_path / "2026-01-01" / "10-00-00", ["a=1,2", "b=3"], finished=False)
    newest = made(tmp_path / "2026-01-02" / "10-00-00", ["a=1,2", "b=3"], finished=False)
    made(tmp_path / "2026-01-03" / "10-00-00", ["a=1,2", "b=4"], finished=False)
    assert unfinished_sweep(["b=3", "a=1,2"], tmp_path) == newest
    assert unfinished_sweep(["b=5"], tmp_path) is None
    with SweepFolder.open(newest, []):  # another process is at it
        assert unfinished_sweep(["b=3", "a=1,2"], tmp_path) == tmp_path / "2026-01-01" / "10-00-00"
    made(newest, ["a=1,2", "b=3"], finished=True)
    assert unfinished_sweep(["b=3", "a=1,2"], tmp_path) is None  # measured: the command measures anew


def test_the_manifest_names_the_command_and_the_jobs(tmp_path):
    with SweepFolder.open(tmp_path, ["seed=0,1"]) as folder:
        folder.assign([(["seed=0"], config())])
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["command"] == ["seed=0,1"]
    assert found["finished"] is False
    assert found["jobs"] == [{"number": 0, "overrides": ["seed=0"], "digest": config_digest(config())}]


def test_jobs_are_told_from_each_other_by_what_differs(tmp_path):
    with SweepFolder.open(tmp_path, []) as folder:
        jobs = folder.assign(
            [
                (["draft=none", "target=x", "+tree.width='a,b'"], config()),
                (["draft=subspec", "target=x"], config(seed=1)),
            ]
        )
    assert labels(jobs) == {0: "draft=none tree.width=a,b", 1: "draft=subspec"}
    assert labels(jobs[:1]) == {0: "draft=none target=x tree.width=a,b"}
    assert varying(jobs, {"target"}) == {0: {"target": "x"}, 1: {"target": "x"}}
    assert labels(jobs, ()) == {0: "(as configured)", 1: "(as configured)"}
