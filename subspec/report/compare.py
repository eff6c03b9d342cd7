"""Compare the texts of two runs token by token; a run against its twin with ``draft=none`` is a losslessness test.

Turns are matched by ``(sample_id, turn)``. Token ids are compared where both turns have the same ``prompt_sha256``.
Other turns are counted apart: the second turn of a conversation has another prompt once the first turn differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from subspec.errors import ConfigError
from subspec.records.method import config_group
from subspec.records.run_files import RECORDS
from subspec.records.run_folder import Key
from subspec.records.same_run import config_differences
from subspec.report.run_data import RunData, State, read_run, run_folders, texts_of, turn_outcome
from subspec.utils.terminal import Terminal, one_line

SHOWN, WIDTH = 20, 80  # rows and columns of the printed table; the JSON file has every differing turn

NOT_COMPARED = {
    "other_prompt": "other prompt",
    "skipped": "skipped",
    "skipped_once": "skipped in one run only",
    "only_a": "only in A",
    "only_b": "only in B",
}
"""Outcomes of a turn besides ``identical`` and ``different``."""


@dataclass(frozen=True)
class TopTwo:
    """The two largest logits at one position, recorded by the audit of run ``side`` (``a`` or ``b``)."""

    side: str
    ids: tuple[int, int]
    logits: tuple[float, float]
    gap: float


@dataclass(frozen=True)
class Difference:
    """Where the texts of one turn part.

    Attributes:
        index: first position with different token ids, from 0. a, b: the ids; None: that text has ended.
        finish_a, finish_b: finish reasons. top: None when neither run recorded it.
    """

    sample_id: str
    turn: int
    index: int
    a: int | None
    b: int | None
    finish_a: str | None
    finish_b: str | None
    top: TopTwo | None


@dataclass(frozen=True)
class Side:
    """One of the two runs. ``tokens``: of its compared turns. ``notes``: what a reader should know about it."""

    folder: str
    method: str
    tokens: int
    notes: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """Two runs, turn by turn.

    Attributes:
        turns: keys of the turns: ``identical``, ``different``, and those of :data:`NOT_COMPARED`.
        differences: one per ``different`` turn.
        equal_tokens: tokens before the first difference, summed over the compared turns.
        not_twins: settings besides the method that decide the text and differ, as ``key: a -> b``.
    """

    a: Side
    b: Side
    turns: Mapping[str, Sequence[Key]]
    differences: Sequence[Difference]
    equal_tokens: int
    not_twins: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Every field, and ``counts`` of the turns."""
        return {"counts": {name: len(keys) for name, keys in self.turns.items()}, **asdict(self)}


def compare(folder_a: Path, folder_b: Path) -> Comparison:
    """Compare two run folders.

    Raises:
        ConfigError: one is not the folder of one run or has no records, or there is no turn to compare.
    """
    a, b = _read(folder_a), _read(folder_b)
    if a.folder.resolve() == b.folder.resolve():
        raise ConfigError(f"{folder_a} and {folder_b} are the same run: give two")
    ours, theirs = texts_of(a), texts_of(b)
    turns: dict[str, list[Key]] = {name: [] for name in ("identical", "different", *NOT_COMPARED)}
    for key in {**ours, **theirs}:
        turns[turn_outcome(ours.get(key), theirs.get(key))].append(key)
    settings = _settings(a), _settings(b)
    shared = settings[0].keys() & settings[1].keys()  # a file may be absent, or a configuration older
    not_twins = config_differences(*({key: value for key, value in one.items() if key in shared} for one in settings))
    if not turns["identical"] and not turns["different"]:
        names, why = f"{folder_a} and {folder_b}", "; ".join([_left_out(turns), *not_twins])
        raise ConfigError(f"{names} have no turn with the same prompt in common: {why}")
    differences = [_difference(ours[key], theirs[key]) for key in turns["different"]]
    equal = [len(ours[key]["token_ids"]) for key in turns["identical"]] + [one.index for one in differences]
    return Comparison(_side(a, ours, turns), _side(b, theirs, turns), turns, differences, sum(equal), not_twins)


def show(found: Comparison, console: Terminal) -> None:
    """Print a headline, what was not compared, a row per differing turn, and notes."""
    same, differing = len(found.turns["identical"]), len(found.differences)
    tokens = f"{found.equal_tokens} tokens"
    if differing:
        tokens += f" before the differences; A {found.a.tokens}, B {found.b.tokens}"
    console.rich.print(f"{same} of {same + differing} turns identical ({tokens})", style="bold", soft_wrap=True)
    for name, side in (("A", found.a), ("B", found.b)):
        for text in (f"{side.folder} ({side.method})", *side.notes):
            console.note(f"{name}: {text}")
    if left_out := _left_out(found.turns):
        console.note(f"not compared: {left_out}")
    if differing:
        console.rich.print(_table(found.differences[:SHOWN]), width=min(WIDTH, console.rich.width))
    if differing > SHOWN:
        console.note(f"{differing - SHOWN} more differing turns (--json FILE has all)")
    if missing := sum(one.top is None for one in found.differences):
        console.note(f"top two logits of {missing} turn(s): not recorded (audit=true records them)")
    if found.not_twins:
        console.warn(f"the runs are not twins: {'; '.join(found.not_twins)}")


def _read(folder: Path) -> RunData:
    if (first := next(run_folders(folder), None)) != folder:
        why = f"it holds no {RECORDS}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} is not a run folder: {why}{f' ({first} is one)' if first else ''}")
    run = read_run(folder)
    if not run.records:
        raise ConfigError(f"{folder} has no records in {RECORDS}{''.join(f'; {note}' for note in run.notes)}")
    return run


def _side(run: RunData, texts: Mapping[Key, Mapping[str, Any]], turns: Mapping[str, Sequence[Key]]) -> Side:
    notes, bitwise = list(run.notes), config_group(run.facts, "bitwise")
    if run.state is not State.finished:
        notes.append(f"the run is {run.state}")
    if len(texts) < len(run.records):
        notes.append(f"{len(run.records) - len(texts)} record(s) without token_ids are left out")
    if turns["different"] and bitwise.get("on") is False:
        notes.append(f"bitwise is off ({bitwise.get('reason') or 'no reason recorded'})")
    tokens = sum(len(texts[key]["token_ids"]) for key in (*turns["identical"], *turns["different"]))
    return Side(str(run.folder), run.method, tokens, notes)


def _left_out(turns: Mapping[str, Sequence[Key]]) -> str:
    return ", ".join(f"{len(turns[name])} {words}" for name, words in NOT_COMPARED.items() if turns[name])


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    pairs = list(zip(a["token_ids"], b["token_ids"], strict=False))
    index = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
    ids = [(*record["token_ids"], None)[index] for record in (a, b)]  # the shorter text has ended
    finish = [record.get("finish_reason") for record in (a, b)]
    top = _top_two("a", a, index) or _top_two("b", b, index)
    return Difference(a["sample_id"], a["turn"], index, *ids, *finish, top)


def _top_two(side: str, record: Mapping[str, Any], index: int) -> TopTwo | None:
    audit = config_group(record, "audit")
    try:
        (first, second), (high, low) = audit["top_ids"][index], audit["top_logits"][index]
        return TopTwo(side, (first, second), (high, low), high - low)
    except (LookupError, TypeError, ValueError):  # not audited, or not a number, which JSON has as null
        return None


def _settings(run: RunData) -> dict[str, Any]:
    """Settings besides the method that decide the text, by dotted key, as far as the folder knows them."""
    context, target, decoding = run.summary["context"], *(config_group(run.config, n) for n in ("target", "decoding"))
    known = {name: context[name] for name in ("target", "benchmark", "source", "seed")} | {
        "dtype": run.facts.get("dtype"),
        "device": run.facts.get("device") or context["device"],
        "hardware": run.device if run.device != "unknown" else None,
        "weights of the target": config_group(run.facts, "weights").get("target"),
        "bitwise.on": config_group(run.facts, "bitwise").get("on"),  # the kernels' tile shapes change no bit
    }
    return {
        **{key: value for key, value in known.items() if value is not None},
        **{f"target.{key}": value for key, value in target.items() if key not in ("name", "dtype")},
        **{f"decoding.{key}": value for key, value in decoding.items() if key != "texts"},
    }


def _table(rows: Sequence[Difference]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    ends, tops = any(one.finish_a != one.finish_b for one in rows), any(one.top for one in rows)
    table.add_column("sample", overflow="fold")
    for heading in ("turn", "index", "A", "B"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ["finish A, B"] * ends + ["top two logits", "gap"] * tops:
        table.add_column(heading, overflow="fold")
    for one in rows:
        ids = ["ended" if token is None else str(token) for token in (one.a, one.b)]
        finish = f"{one.finish_a}, {one.finish_b}" if one.finish_a != one.finish_b else ""
        top, gap = "not recorded", ""
        if one.top is not None:
            (first, second), (high, low) = one.top.ids, one.top.logits
            top, gap = f"{first} {high:.3f}, {second} {low:.3f}", f"{one.top.gap:.3g}"
        place = one_line(one.sample_id), str(one.turn), str(one.index)
        table.add_row(*place, *ids, *[finish] * ends, *[top, gap] * tops)
    return table
