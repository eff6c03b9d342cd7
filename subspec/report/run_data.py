"""Find runs below folders and read them in any state.

Reports are made of sweeps that are still running or have broken, so no content of a run folder is fatal: damaged lines,
missing summaries and unreadable files are counted and reported. Figures are computed from the records;
``summary.json`` only tells whether the run finished.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from subspec.errors import SubspecError
from subspec.records.method import config_group, method_label
from subspec.records.metrics import summarise
from subspec.records.outcome import FAILED, OUTCOME, read_outcome
from subspec.records.run_files import CONFIG, ENVIRONMENT, FACTS, OVERRIDES, PLAN, RECORDS, SUMMARY
from subspec.records.run_folder import Key, read_records
from subspec.records.sweep_folder import MANIFEST, read_manifest

PASSED_OVER = {"wandb", "__pycache__", ".git", "node_modules"}  # they hold no runs and possibly very many files


class State(StrEnum):
    """Progress of a run."""

    finished = "finished"
    unfinished = "unfinished"
    empty = "nothing generated"


@dataclass(frozen=True)
class RunData:
    """The content of a run folder.

    Attributes:
        folder: its path. name: its path below the folder that was searched.
        config: the resolved configuration. overrides: as typed; None if unknown.
        facts: content of ``facts.json``. plan: the memory plan. environment: versions and hardware.
        records: complete records, each turn once, with all fields that figures are computed from.
        summary: of :func:`~subspec.records.metrics.summarise` over ``records``.
        state: progress of the run.
        damaged: number of lines of ``records.jsonl`` that are no records.
        notes: notes about this run, one line each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    overrides: tuple[str, ...] | None
    facts: Mapping[str, Any]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    state: State
    damaged: int = 0
    notes: tuple[str, ...] = ()

    @property
    def turns(self) -> list[Mapping[str, Any]]:
        """Records of generated turns; skipped prompts are left out."""
        return [record for record in self.records if not record.get("skipped")]

    @property
    def method(self) -> str:
        """Label of its method."""
        return method_label(self.config, self.facts)

    @property
    def device(self) -> str:
        """Name of the GPU, or of the CPU with its threads; ``unknown`` if the folder does not say."""
        hardware = config_group(self.environment, "hardware")
        gpu = hardware.get("gpu")
        if self.summary["context"]["device"] == "cuda" and isinstance(gpu, Mapping):
            return str(gpu.get("name") or "unknown GPU")
        cpu = hardware.get("cpu")
        threads = self.facts.get("torch_threads") or hardware.get("torch_threads")
        return f"{cpu}, {threads} thread(s)" if cpu else "unknown"

    @property
    def is_coded(self) -> bool:
        """Whether exact weights were streamed coded; the quantizer then decides the streamed bytes."""
        return self.facts.get("codec") == "substitute"


def collect(folders: Sequence[Path]) -> list[RunData]:
    """Every run in or below ``folders``, each once, in the order of their paths.

    Raises:
        SubspecError: a folder does not exist, or there is no run.
    """
    found: dict[Path, RunData] = {}
    for root in map(Path, folders):
        if not root.is_dir():
            raise SubspecError(f"{root}: no such folder; give run folders, sweep folders, or any folder above them")
        for folder in run_folders(root):
            if (resolved := folder.resolve()) not in found:
                found[resolved] = read_run(folder, _name(folder, root))
    if not found:
        shown = ", ".join(map(str, folders))
        why = f" ({said[0]})" if (said := sweep_notes(folders)) else ""
        raise SubspecError(f"no run below {shown}: a run's folder holds {RECORDS} or {CONFIG}{why}")
    return list(found.values())


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """``root`` and all folders below it, each with its files; links are not followed."""
    for place, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in PASSED_OVER)
        yield Path(place), files


def run_folders(root: Path) -> Iterator[Path]:
    """Folders in or below ``root`` that hold a run."""
    for folder, files in _walk(root):
        # A folder with a plan alone is of plan_only=true.
        if RECORDS in files or (CONFIG in files and (ENVIRONMENT in files or OVERRIDES in files)):
            yield folder


def sweep_notes(folders: Sequence[Path]) -> list[str]:
    """Failed jobs and jobs that have not been started of the sweeps in or below ``folders``, one line each.

    They may have left no run folder, so that the tables would not show them.
    """
    notes: dict[Path, str] = {}
    for root in map(Path, folders):
        for folder, files in _walk(root):
            outcome = read_outcome(folder) if OUTCOME in files else None
            if outcome is not None and outcome.status == FAILED:
                notes.setdefault(folder.resolve(), f"{_name(folder, root)}: its job failed: {outcome.reason}")
            jobs = (read_manifest(folder) or {}).get("jobs", []) if MANIFEST in files else []
            waiting = sum(not (folder / str(job["number"]) / OUTCOME).exists() for job in jobs)
            if waiting:
                text = f"{_name(folder, root)}: {waiting} of {len(jobs)} jobs have not been started"
                notes.setdefault(folder.resolve(), text)
    return list(notes.values())


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Read one run folder. No content of it is an error."""
    notes: list[str] = []
    config, environment = (_load(folder / file, dict, notes, needed=True) for file in (CONFIG, ENVIRONMENT))
    facts, plan = (_load(folder / file, dict, notes) for file in (FACTS, PLAN))
    records, damaged = _records(folder, notes)
    written = _load(folder / SUMMARY, dict, notes) or {}
    if not config:
        notes.append(f"no readable {CONFIG}: the method is told by the records alone")
        config = _config_of(records)
    overrides = _load(folder / OVERRIDES, list, [])
    summary = summarise(records)
    counts, covered = summary["counts"], config_group(written, "counts")
    state = State.finished if counts["turns"] else State.empty
    # A run that was resumed and killed still has its first summary.
    if counts["turns"] and any(covered.get(key) != counts[key] for key in ("turns", "skipped")):
        state = State.unfinished
    return RunData(
        folder=folder,
        name=name or folder.name,
        config=config,
        overrides=None if overrides is None else tuple(map(str, overrides)),
        facts=facts or config_group(written, "run"),
        plan=plan or {},
        environment=environment or {},
        records=tuple(records),
        summary=summary,
        state=state,
        damaged=damaged,
        notes=tuple(notes),
    )


def texts_of(run: RunData) -> dict[Key, Mapping[str, Any]]:
    """Records by key: skipped ones, and those with token ids."""
    usable = [one for one in run.records if one.get("skipped") or isinstance(one.get("token_ids"), list)]
    return {(record["sample_id"], record["turn"]): record for record in usable}


def turn_outcome(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    """``identical`` or ``different`` texts of one prompt, or why the records of a turn are not compared."""
    if a is None or b is None:
        return "only_b" if a is None else "only_a"
    if a.get("skipped") or b.get("skipped"):
        return "skipped" if a.get("skipped") and b.get("skipped") else "skipped_once"
    if a.get("prompt_sha256") != b.get("prompt_sha256"):
        return "other_prompt"
    return "identical" if a["token_ids"] == b["token_ids"] else "different"


# ------------------------------------------------------------------------------------------------ parts


def _name(folder: Path, root: Path) -> str:
    below = folder.relative_to(root).as_posix()
    return root.resolve().name if below == "." else f"{root.resolve().name}/{below}"


def _load(file: Path, kind: type, notes: list[str], *, needed: bool = False) -> Any:
    """The ``kind`` that a JSON or YAML file holds; None and a note if it is unreadable, or ``needed`` and absent."""
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        notes += [f"no {file.name}"] if needed else []
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"{file.name} cannot be read ({type(error).__name__})")
        return None
    if not isinstance(value, kind):
        notes.append(f"{file.name} cannot be read (it holds no mapping)")
        return None
    return value


def _records(folder: Path, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Records that can be pooled, and the number of damaged lines."""
    if not (folder / RECORDS).exists():
        return [], 0
    try:
        records, found = read_records(folder)
    except SubspecError as error:
        notes.append(str(error))
        return [], 0
    damaged = [note for note in found if " damaged line " in note or "half-written" in note]
    notes += [note.rpartition(f"{RECORDS}: ")[2] for note in found if note not in damaged]
    usable = [record for record in records if _poolable(record)]
    if broken := len(records) - len(usable):
        notes.append(f"{broken} record(s) lack fields that figures are computed from, and are left out")
    if damaged:
        notes.append(f"{len(damaged)} damaged line(s) in {RECORDS} are left out")
    return usable, len(damaged)


def _poolable(record: Mapping[str, Any]) -> bool:
    """Whether figures can be computed from a record: a JSON line need not be one of ours."""
    if record.get("skipped"):
        return isinstance(record["skipped"], Mapping)
    numbers = ("new_tokens", "verified_tokens", "iterations", "prefill_s", "decode_s")
    if not all(isinstance(record.get(name), int | float) for name in numbers):
        return False
    try:
        summarise([record])
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    return True


def _config_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a configuration that records hold."""
    if not records:
        return {}
    first = records[0]
    groups = ("target", "draft", "benchmark")
    return {name: {"name": first[name]} for name in groups if first.get(name)} | {"seed": first.get("seed")}
