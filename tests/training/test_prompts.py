"""The prompts: seeded, hardly repeated over the shards of a usual run, and none that the packaged samples ask."""

import json
from importlib import resources

from training.prompts import CODE, CODE_TASKS, TASKS, TOPICS, messages


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_the_lists_have_no_doubles():
    for words in (TOPICS, TASKS, CODE, CODE_TASKS):
        assert len(set(words)) == len(words)
        assert all(words)


def test_a_shard_is_decided_by_its_seed_and_number():
    first = list(messages(0, 0, 200))
    assert len(first) == 200
    assert first == list(messages(0, 0, 200))
    assert first != list(messages(0, 1, 200))
    assert first != list(messages(1, 0, 200))
    assert all("{" not in text.replace("{\n", "") for text in first)


def test_shards_hardly_repeat_each_other():
    every = [text for shard in range(8) for text in messages(0, shard, 2000)]
    assert len(set(every)) > 0.95 * len(every)


def test_no_packaged_sample_is_asked():
    asked = {text.lower() for shard in range(4) for text in messages(0, shard, 2000)}
    found = 0
    for file in resources.files("subspec.benchmarks").joinpath("samples").iterdir():
        if not file.name.endswith(".jsonl"):
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            for text in strings(json.loads(line)):
                found += 1
                assert text.strip().lower() not in asked
    assert found > 100
