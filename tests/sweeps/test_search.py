"""Searches with Optuna and the launchers of other projects; what they need is in the extra ``sweep``."""

import csv
import importlib.util
import json
import re
import signal
import time

import pytest

from tests.helpers.cli import cli, command, records_of

from .test_sweep import HERE, TINY, statuses, sweep_records, wait_for_records

SEARCH = ["-m", "hydra/sweeper=search", "optimise=tau"]
SPACE = [*SEARCH, "tree.depth=choice(2,4,8)", "tree.width=range(1,3)"]


def needs(module):
    missing = importlib.util.find_spec("hydra_plugins") is None or importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


optuna = needs("hydra_plugins.hydra_optuna_sweeper")
submitit = needs("hydra_plugins.hydra_submitit_launcher")
ray = needs("hydra_plugins.hydra_ray_launcher")


def ranking(sweep):
    return list(csv.DictReader((sweep / "search.csv").open()))


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="tells what happens without optuna")
def test_without_the_extra_a_search_says_what_to_install(tmp_path):
    ran = cli("hparams_search=tree", *TINY, f"sweep_dir={tmp_path / 's'}")
    ran.refused(1, r"a search needs packages that are not here .*pip install 'subspec\[sweep\]'")


@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="tells what happens without submitit")
@pytest.mark.parametrize("launcher", ["slurm", "submitit_here", "ray_cluster"])
def test_without_the_extra_a_cluster_says_what_to_install(launcher):
    ran = cli("-m", *TINY, f"hydra/launcher={launcher}")
    ran.refused(2, r"hydra/launcher: needs packages that are not here: pip install 'subspec\[sweep\]'")


@optuna
def test_a_search_ranks_its_trials_and_continues(tmp_path):
    """More trials are asked for later: only they are measured, and no proposal twice."""
    sweep = tmp_path / "s"
    options = [*SPACE, *TINY, HERE, f"sweep_dir={sweep}", "hydra.sweeper.startup=2"]
    first = cli(*options, "hydra.sweeper.n_trials=3")
    assert first.code == 0, first.err
    rows = ranking(sweep)
    taus = [float(row["tau"]) for row in rows]
    assert taus == sorted(taus, reverse=True)
    assert {row["tree.depth"] for row in rows} <= {"2", "4", "8"}
    assert re.search(r"best tau: [\d.]+ with tree\.depth=\d tree\.width=\d \(job \d\)", first.out)
    before = sweep_records(sweep)

    again = cli(*options, "hydra.sweeper.n_trials=5")
    assert again.code == 0, again.err
    assert "continuing: 3 of 5 trials were measured before" in again.out
    after = sweep_records(sweep)
    assert {name: after[name] for name in before} == before
    done = cli(*options, "hydra.sweeper.n_trials=5")
    assert done.code == 0, done.err
    assert sweep_records(sweep) == after


@optuna
def test_a_trial_that_fails_ends_nothing_and_a_search_without_any_says_so(tmp_path):
    options = [*SEARCH, *TINY, HERE, "hydra.sweeper.n_trials=3"]
    proposes_5_5_4 = ["quant.bits=choice(4,5)", "hydra.sweeper.sampler=random", "hydra.sweeper.seed=1"]
    some = cli(*options, f"sweep_dir={tmp_path / 'a'}", *proposes_5_5_4)
    assert some.code == 0, some.err
    assert set(statuses(tmp_path / "a")) == {"ok", "failed"}
    assert ranking(tmp_path / "a")[-1]["status"] == "failed"
    none = cli(*options, f"sweep_dir={tmp_path / 'b'}", "quant.bits=choice(5,6)")
    assert none.code == 1
    assert "the search found nothing: every trial failed" in none.err


@optuna
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_the_same_proposal(tmp_path):
    sweep = tmp_path / "s"
    options = [*SPACE, *TINY, f"sweep_dir={sweep}", "hydra.sweeper.n_trials=2", "decoding.max_new_tokens=60"]
    process = command(*options, cwd=tmp_path)
    wait_for_records(sweep, 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    proposed = json.loads((sweep / "sweep.json").read_text())["jobs"]
    process = command(*options, cwd=tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert jobs[: len(proposed)] == proposed
    assert set(statuses(sweep)) == {"ok"}


# --------------------------------------------------------------------------------------------- clusters


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["hydra/launcher=submitit_here"], marks=submitit, id="submitit"),
        pytest.param(["hydra/launcher=ray_cluster", "hydra.launcher.ray.remote.num_gpus=0"], marks=ray, id="ray"),
    ],
)
def test_launchers_of_other_projects(tmp_path, options):
    """A process per job there too; one job fails, and the second time only that one is tried again."""
    sweep = tmp_path / "s"
    arguments = ["-m", *TINY, "draft=none,subspec", "quant=none", *options, f"sweep_dir={sweep}"]
    for attempt in (1, 2):
        process = command(*arguments, cwd=tmp_path)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 2, err
        assert statuses(sweep) == ["ok", "failed"]
        outcomes = [json.loads((sweep / name / "job.json").read_text()) for name in "01"]
        assert [outcome["attempts"] for outcome in outcomes] == [1, attempt]
        assert "draft=subspec without a quantizer" in outcomes[1]["reason"]
        assert "draft=subspec without a quantizer" in out
    assert len(records_of(sweep / "0")) == 2


@submitit
def test_the_slurm_configuration_is_what_submitit_knows(tmp_path):
    """Composed, and handed to submitit's own check of its parameters, without a cluster."""
    from hydra import compose, initialize_config_dir

    from subspec.config.schema import register_schemas
    from subspec.utils.paths import conf_dir

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            "config",
            ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", f"hydra.sweep.dir={tmp_path}"],
            return_hydra_config=True,
        )
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.partition, launcher.tasks_per_node) == (1, "gpu", 1)
    assert time.gmtime(launcher.timeout_min * 60).tm_hour == 4
