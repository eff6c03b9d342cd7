"""A resumed run continues the data and weights of its records, or is refused."""

import json
from dataclasses import replace

import pytest

from subspec.benchmarks import Benchmark, Sample
from subspec.config.schema import Source
from subspec.errors import ConfigError
from subspec.runs.inputs import check_prompts, check_weights
from subspec.runs.turn import chat_messages, skipped_record, turn_record
from tests.helpers.records import CONTEXT, result

SAMPLES = [Sample("q/1", ("one", "and then?")), Sample("q/2", ("two",), "42"), Sample("q/3", ("three",), "7")]
DATA = Benchmark("gsm8k", Source.file, "rows.jsonl", None, SAMPLES, 3)


def data(*samples, available=3, **fields):
    return replace(DATA, samples=list(samples), available=available, **fields)


def records():
    """Both turns of the first sample, the second sample, and a skipped one."""
    texts = (["one"], ["one", "an answer", "and then?"], ["two"])
    places = (("q/1", 0, 0), ("q/1", 0, 1), ("q/2", 1, 0))
    made = [
        turn_record(
            CONTEXT,
            result(),
            sample_id=id_,
            sample_index=index,
            turn=turn,
            messages=chat_messages(said),
            correct=None if id_ == "q/1" else True,
            reference=None if id_ == "q/1" else "42",
        )
        for (id_, index, turn), said in zip(places, texts, strict=True)
    ]
    long = {"sample_id": "q/3", "sample_index": 2, "messages": chat_messages(["three"])}
    return [*made, skipped_record(CONTEXT, **long, prompt_tokens=5000, limit=400)]


@pytest.mark.parametrize(
    "today",
    [
        DATA,
        data(*SAMPLES, Sample("q/4", ("four",)), available=9),  # benchmark.max_samples grew
        data(*SAMPLES[:1]),  # it shrank
        data(SAMPLES[2], Sample("q/0", ("zero",)), *SAMPLES[:2], available=4),  # the file has a row more
    ],
)
def test_the_same_data_is_continued(tmp_path, today):
    check_prompts(tmp_path, records(), today)


@pytest.mark.parametrize(
    ("today", "problem"),
    [
        (data(Sample("q/1", ("other", "and then?")), *SAMPLES[1:]), r"prompt of sample q/1 .*\(turn 0\)"),
        (data(Sample("q/1", ("one", "other?")), *SAMPLES[1:]), r"prompt of sample q/1 .*\(turn 1\)"),
        (data(Sample("q/1", ("one",)), *SAMPLES[1:]), r"turn of sample q/1 .*\(turn 1\)"),
        (data(SAMPLES[0], Sample("q/2", ("two",), "43"), SAMPLES[2]), "reference answer of sample q/2"),
        (data(*SAMPLES[:2], Sample("q/3", ("other",))), "prompt of sample q/3"),
        (data(*SAMPLES[1:], Sample("q/4", ("four",))), "row of sample q/1"),
        (data(*SAMPLES[:2], available=2), "row of sample q/3"),
    ],
)
def test_other_data_is_refused(tmp_path, today, problem):
    with pytest.raises(ConfigError, match=rf"benchmark\.path=rows\.jsonl now holds other data: .*{problem}"):
        check_prompts(tmp_path, records(), today)


def test_a_turn_behind_a_damaged_one_and_an_old_record_are_not_judged(tmp_path):
    today = data(Sample("q/1", ("other", "and then?")), *SAMPLES[1:])
    check_prompts(tmp_path, records()[1:], today)
    check_prompts(tmp_path, [{**records()[0], "prompt_sha256": None}], today)


@pytest.mark.parametrize(
    ("source", "detail", "key"),
    [(Source.hub, "org/set", r"benchmark\.hub\.path=org/set"), (Source.sample, "x", r"benchmark\.source=sample")],
)
def test_the_key_of_other_data_is_named(tmp_path, source, detail, key):
    today = data(*SAMPLES[:2], available=2, source=source, source_detail=detail)
    with pytest.raises(ConfigError, match=f"{key} now holds other data"):
        check_prompts(tmp_path, records(), today)


def test_other_weights_are_refused_and_folders_without_identities_are_not(tmp_path):
    config = {"target": {"name": "hub", "path": "a"}, "draft": {"name": "eagle2", "path": None}}
    weights = {"target": "1", "draft": "2"}
    check_weights(tmp_path, config, weights)
    for before in ({}, {"weights": weights}, {"weights": {"target": "1"}}, {"weights": None}):
        (tmp_path / "facts.json").write_text(json.dumps(before))
        check_weights(tmp_path, config, weights)
    for name, line in (("target", r"target\.path=a now holds other"), ("draft", "draft=eagle2 now holds other")):
        (tmp_path / "facts.json").write_text(json.dumps({"weights": {**weights, name: "3"}}))
        with pytest.raises(ConfigError, match=line):
            check_weights(tmp_path, config, weights)
