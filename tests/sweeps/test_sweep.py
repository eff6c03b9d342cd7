"""Sweeps through the command line: rows of tables, what is missing, refusals, in one process and in several."""

import json
import re
import signal
import time

import psutil
import pytest

import subspec.benchmarks.loader
from subspec.benchmarks.rows import DataUnavailableError, Table
from subspec.records.run_folder import RunFolder
from subspec.sweeps.command_line import is_sweep
from subspec.sweeps.process import JobProcess, job_environment
from tests.helpers.cli import Forked, cli, command, no_report, records_of, timeless  # noqa: F401

TINY = [
    "target=planted_tiny_tied",
    "device=cpu",
    "logger=none",
    "benchmark.source=sample",
    "benchmark.max_samples=2",
    "decoding.max_new_tokens=8",
    "tree=beam",
    "tree.depth=4",
    "warmup=0",
]
HERE = "hydra/launcher=basic"
"""In the test's own process: imports are paid once."""


@pytest.fixture(autouse=True)
def _no_report(request):
    """Drawing takes longer than the jobs of a test: only the test in processes gets its report."""
    if "real_report" not in request.fixturenames:
        request.getfixturevalue("no_report")


@pytest.fixture
def real_report():
    """Keep the report."""


def run_sweep(folder, *options):
    """A sweep of tiny runs in the test's own process."""
    return cli("-m", *TINY, *options, HERE, f"sweep_dir={folder}")


def statuses(sweep):
    """Status by job number."""
    files = sorted(sweep.glob("*/job.json"), key=lambda file: int(file.parent.name))
    return [json.loads(file.read_text())["status"] for file in files]


def sweep_records(sweep):
    """Records without times, by job number."""
    return {folder.parent.name: timeless(records_of(folder.parent)) for folder in sweep.glob("*/records.jsonl")}


# ------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sweep_dir=x"], r"sweep_dir= names the folder of a sweep: add -m, or give run_dir=FOLDER"),
        (["-m", "draft=none,subspec", "run_dir=x"], r"run_dir= names the folder of one run: a sweep takes"),
        (["-m", "draft=none,subspec", "resume=true"], r"no unfinished sweep of the same overrides"),
        (["-m", "draft=none,nope"], r"draft=nope: no such option"),
        (["-m", "draft=none", "hydra.launcher.jobs=0"], r"hydra\.launcher\.jobs=0 must be at least 1"),
        (["-m", "experiment=glob(planted/tiny_*)"], r"experiment=glob\(planted/tiny_\*\): matches nothing"),
        (["-m", "tree.depth=range(5,1)"], r"tree\.depth=range\(5,1\): matches nothing"),
        (["-m", "seed=interval(0,1)"], r"seed=interval\(0,1\): an interval is for a search"),
        (["-m", "experiment=smoke,planted/table_tiny"], r"planted/table_tiny is a table, a sweep of its own"),
        (["-m", "experiment=choice(planted/table_tiny)"], r"planted/table_tiny is a table"),
        (["-m", "benchmark.max_samples=1,2"], r"benchmark\.max_samples=1,2: jobs that differ in this key alone"),
        (["-m", "seed=0,1", "logger=none,wandb"], r"logger: jobs that differ in this key alone are one job"),
        (["hparams_search=nope"], r"hparams_search=nope: no such option"),
    ],
)
def test_refused_in_one_line(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    ran.refused(2, line)
    assert ran.out == ""  # no table without a row
    assert list(tmp_path.iterdir()) == []  # a folder that was made for the sweep is gone again


def test_what_is_a_sweep_without_saying_so():
    assert is_sweep(["experiment=planted/table_main"])
    assert is_sweep(["hparams_search=tree"])
    assert not is_sweep(["experiment=smoke", "hparams_search=null"])
    assert not is_sweep(["hparams_search=tree", "hydra.mode=RUN"])
    assert not is_sweep(["draft=none"])


def test_a_table_of_ones_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n"
        "      experiment: planted/tiny_plain,planted/tiny_subspec\n      seed: 0,1\n"
    )
    sweep = tmp_path / "my sweep (1), a=b"
    quick = ["benchmark.max_samples=1", "decoding.max_new_tokens=4", "tree.depth=2", "warmup=0", "benchmark=gsm8k"]
    here = ["logger=none", "device=cpu", HERE, f"sweep_dir={sweep}"]
    ran = cli(f"--config-dir={tmp_path}", "experiment=mine", "seed=3", *quick, *here)
    assert ran.code == 0, ran.err
    drafts = [records_of(sweep / name)[0]["draft"] for name in "01"]
    assert drafts == ["none", "subspec"]
    assert statuses(sweep) == ["ok", "ok"]
    assert {_config_of(sweep / name)["experiment"] for name in "01"} == {"mine"}  # one group of runs
    assert json.loads((sweep / "sweep.json").read_text())["finished"]
    text = (sweep / "sweep.md").read_text()
    assert "| 1 | planted/tiny_subspec | ok | 1 |" in text
    assert "planted weights" in text
    assert "packaged sample prompts" in text


def test_a_key_that_only_the_rows_have(tmp_path):
    """The sweep's own configuration has ``offload=none``; every job has a budget."""
    rows = "experiment=planted/qwen2_5_7b_plain,planted/qwen2_5_7b_subspec"
    keys = ['offload.card="RTX 4090"', "offload.vram_gib=9", "decoding.stop=[]", "target.seed=1"]
    ran = cli("-m", rows, "plan_only=true", *keys, HERE, f"sweep_dir={tmp_path}")
    assert ran.code == 0, ran.err
    budgets = [json.loads((tmp_path / job / "plan.json").read_text())["budget"] for job in "01"]
    assert budgets == [9 * 2**30] * 2


def test_combinations_that_differ_in_keys_without_effect_are_one_run(tmp_path):
    """A baseline is measured once, also by later sessions with other values of these keys."""
    ran = run_sweep(tmp_path, "benchmark.max_samples=1", "draft=none,layer_skip", "quant.bits=4,3")
    assert ran.code == 0, ran.err
    assert "4 combinations make 2 runs" in ran.out
    assert statuses(tmp_path) == ["ok", "ok"]
    again = run_sweep(tmp_path, "draft=none", "quant=higgs", "tree.width=2")
    assert again.code == 0, again.err
    assert statuses(tmp_path) == ["ok", "ok"]
    assert len(records_of(tmp_path / "0")) == 2, again.out


# ------------------------------------------------------------------------------------- what is missing


def test_the_same_command_does_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = cli("-m", *TINY, "draft=none,subspec", "quant=hqq,none", HERE)
    assert first.code == 2  # one of three cannot be: plain decoding has no use for a quantizer
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert _config_of(sweep / "1")["run_dir"] == str(sweep.relative_to(tmp_path) / "1")
    job, whole = first.err.splitlines()
    assert re.match(r"error: job 2 \(.*quant=none.*\): draft=subspec without a quantizer", job)
    assert re.match(r"error: 1 of 3 jobs did not end well.* sweep_dir=\S+ runs only what is missing", whole)
    assert statuses(sweep) == ["ok", "ok", "failed"]
    before = sweep_records(sweep)

    again = cli(*TINY, "draft=none,subspec", "quant=hqq,none", HERE, "-m")  # the flag may stand anywhere
    assert f"continuing the sweep in {sweep.relative_to(tmp_path)}" in again.out
    assert "2 of 3 job(s) had been finished before" in again.out
    assert list(tmp_path.glob("multirun/*/*")) == [sweep]

    (sweep / "1" / "records.jsonl").write_bytes((sweep / "1" / "records.jsonl").read_bytes()[:-40])
    (sweep / "1" / "job.json").unlink()  # as if it had been killed there
    third = cli("-m", *TINY, "draft=none,subspec", "quant=hqq,none", HERE)
    assert "half-written last line" in third.out
    assert sweep_records(sweep) == before


def test_a_finished_sweep_is_measured_anew_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["-m", *TINY, "draft=none", "seed=0", HERE]
    assert cli(*options).code == 0
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert cli(*options, f"sweep_dir={sweep}").code == 0
    assert len(list(tmp_path.glob("multirun/*/*"))) == 1
    assert cli(*options).code == 0
    assert len(list(tmp_path.glob("multirun/*/*"))) == 2


def test_more_samples_extend_the_jobs_and_more_values_add_some(tmp_path):
    assert run_sweep(tmp_path, "draft=none", "seed=0,1").code == 0
    before = sweep_records(tmp_path)
    assert run_sweep(tmp_path, "draft=none,prompt_lookup", "seed=1,0", "benchmark.max_samples=3").code == 0
    after = sweep_records(tmp_path)
    assert [len(after[name]) for name in "0123"] == [3, 3, 3, 3]
    assert all(after[name][:2] == before[name] for name in "01")


def test_a_damaged_record_of_a_finished_job_is_made_again(tmp_path):
    def in_order():
        every = sweep_records(tmp_path)
        return {job: sorted(kept, key=lambda record: record["sample_id"]) for job, kept in every.items()}

    assert run_sweep(tmp_path, "draft=none", "seed=0,1").code == 0
    before, file = in_order(), tmp_path / "1" / "records.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(f"{first[:50]}\x00{first[50:90]}\n{rest}")
    ran = run_sweep(tmp_path, "draft=none", "seed=0,1")
    assert ran.code == 0, ran.err
    assert "1 of 2 job(s) had been finished before" in ran.out
    assert in_order() == before


def test_a_job_that_failed_once_and_then_ends_well_has_ended_well(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "s"
    options = ["benchmark=gsm8k", "benchmark.source=file", f"benchmark.path={rows}", "draft=none", "seed=0"]
    assert run_sweep(folder, *options).code != 0
    assert statuses(folder) == ["failed"]
    rows.write_text(json.dumps({"question": "How much is one and one?", "answer": "#### 2"}) + "\n")
    ran = run_sweep(folder, *options)
    assert ran.code == 0, ran.err
    assert statuses(folder) == ["ok"]
    assert json.loads((folder / "0" / "job.json").read_text())["attempts"] == 2


def test_a_job_over_its_budget_is_recorded_and_the_others_go_on(tmp_path):
    budgets = ["offload=stream", "offload.card=RTX 4090", "offload.vram_gib=2,8"]
    ran = cli("-m", "plan_only=true", "target=planted_qwen2_5_7b", *budgets, HERE, f"sweep_dir={tmp_path}")
    assert ran.code == 2
    assert statuses(tmp_path) == ["failed", "ok"]
    reason = json.loads((tmp_path / "0" / "job.json").read_text())["reason"]
    assert "offload.vram_gib=2" in reason
    assert "\n" not in reason
    assert (tmp_path / "1" / "plan.json").exists()


# ------------------------------------------------------------------------------------------ processes


def test_jobs_in_processes_of_their_own(tmp_path, monkeypatch, real_report):
    """One that ends well, and one whose hub is gone: recorded, with its reason, its log and the exit status.

    The processes are forks of this one; tests/test_packaging.py has a job that starts from nothing.
    """
    sweep = tmp_path / "größe"
    monkeypatch.setattr(
        JobProcess, "_spawn", lambda job, log: Forked(*job.command[3:], log=log.fileno(), env=job_environment(job.gpu))
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = ["-m", *TINY, "draft=prompt_lookup", "benchmark.source=sample,hub", f"sweep_dir={sweep}"]
    ran = cli(*options)
    ran.refused(1, r"error: 1 of 2 jobs did not end well: .*sweep_dir=.* runs only what is missing")
    assert statuses(sweep) == ["ok", "failed"]
    assert re.search(r"\[1/2\] ok       job 0: benchmark\.source=sample  2/2 samples  [\d.]+ tokens/s  tau", ran.out)
    assert re.search(r"\[2/2\] failed   job 1: benchmark\.source=hub  \S.*\(elapsed", ran.out)
    assert re.search(r"warning: job 1 failed: .*\(log: 1/job\.log\)", ran.out)
    assert "error: " in (sweep / "1" / "job.log").read_text()
    assert "1: its job failed: " in (sweep / "report" / "REPORT.md").read_text(encoding="utf-8")
    assert len(records_of(sweep / "0")) == 2
    assert cli(*options[1:-2], f"run_dir={sweep / '0'}", "resume=true").code == 0  # a run like any other


def wait_for_records(sweep, count, process):
    deadline = time.monotonic() + 200
    while sum(file.read_bytes().count(b"\n") for file in sweep.rglob("records.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_twice_at_random_and_run_again(tmp_path, seed):
    """The sweep and one of its jobs are killed, each somewhere; the records are those of an undisturbed sweep."""
    import random

    picked = random.Random(seed)
    options = ["-m", *TINY, "draft=none,subspec", "benchmark=mt_bench,gsm8k", "decoding.max_new_tokens=60"]
    whole = tmp_path / "whole"
    assert cli(*options, HERE, f"sweep_dir={whole}").code == 0
    total = sum(len(records) for records in sweep_records(whole).values())

    sweep = tmp_path / "sweep"
    for victim in ("sweep", "job"):
        process = command(*options, f"sweep_dir={sweep}", cwd=tmp_path)
        done = sum(len(records) for records in sweep_records(sweep).values())
        wait_for_records(sweep, picked.randint(done + 1, max(done + 1, total - 2)), process)
        if victim == "sweep":
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            (job,) = running_jobs(sweep)
            job.kill()
            _, err = process.communicate(timeout=400)
            assert process.returncode == 1, err
            assert statuses(sweep).count("failed") == 1
    process = command(*options, f"sweep_dir={sweep}", cwd=tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert statuses(sweep) == ["ok"] * 4
    assert sweep_records(sweep) == sweep_records(whole)


@pytest.mark.slow
def test_interrupted_and_continued_by_the_same_command(tmp_path):
    options = ["-m", *TINY, "draft=none,subspec", "decoding.max_new_tokens=200"]
    process = command(*options, cwd=tmp_path)
    wait_for_records(tmp_path, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert re.fullmatch(r"error: interrupted: finished samples are kept; continue with the same command.*\n", err)
    assert "interrupted" in out
    process = command(*options, cwd=tmp_path)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    (sweep,) = tmp_path.glob("multirun/*/*")
    assert f"continuing the sweep in {sweep.relative_to(tmp_path)}" in out
    assert statuses(sweep) == ["ok", "ok"]


def running_jobs(sweep):
    """Processes of the jobs below a sweep's folder."""
    commands = {one: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
    return [one for one, text in commands.items() if "subspec.cli.job" in text and str(sweep) in text]


def test_an_interrupt_of_the_report_tells_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("subspec.sweeps.sweeper.write_report", interrupted)
    ran = run_sweep(tmp_path, "draft=none")
    ran.refused(130, r"interrupted: finished samples are kept; continue with the same command and sweep_dir=")


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    from hydra.core.plugins import Plugins
    from hydra.plugins.launcher import Launcher

    def launch(self, job_overrides, initial_job_idx):
        raise RuntimeError("no srun here")

    (basic,) = (one for one in Plugins.instance().discover(Launcher) if one.__name__ == "BasicLauncher")
    monkeypatch.setattr(basic, "launch", launch)
    ran = run_sweep(tmp_path, "draft=none")
    ran.refused(1, r"hydra/launcher=basic could not start a job \(no srun here\): .*hydra/launcher=process")


def test_a_job_in_use_elsewhere_ends_no_other(tmp_path, monkeypatch):
    assert run_sweep(tmp_path, "draft=none", "seed=0,1").code == 0
    (tmp_path / "1" / "job.json").unlink()
    with RunFolder.open(tmp_path / "1", resume=True, config=_config_of(tmp_path / "1")):
        ran = run_sweep(tmp_path, "draft=none", "seed=0,1,2")
    assert ran.code == 1
    assert statuses(tmp_path) == ["ok", "failed", "ok"]


def test_a_job_is_not_mixed_with_other_prompts(tmp_path, monkeypatch):
    """Half of a job with packaged prompts, and then the hub answers: the job says so, and keeps what it has."""
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]

    def load_rows(*arguments):
        if not up:
            raise DataUnavailableError("the hub did not answer", "take other prompts")
        return Table(rows, "the hub"), None

    monkeypatch.setattr(subspec.benchmarks.loader, "load_rows", load_rows)
    options, up = ["benchmark.source=auto", "draft=none", "seed=0,1"], False
    assert run_sweep(tmp_path, *options).code == 0
    job, file = tmp_path / "1", tmp_path / "1" / "records.jsonl"
    (job / "job.json").unlink()
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(first)

    up = True
    assert run_sweep(tmp_path, *options).code == 2
    assert statuses(tmp_path) == ["ok", "failed"]
    reason = json.loads((job / "job.json").read_text())["reason"]
    assert "benchmark.source comes to hub now" in reason
    assert "set benchmark.source=sample" in reason
    assert file.read_bytes() == first

    ran = cli(f"run_dir={job}", "resume=true", "benchmark.source=sample")
    assert ran.code == 0, ran.err
    assert [record["source"] for record in records_of(job)] == ["sample"] * 2


def _config_of(folder):
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text())
