"""``generation_config.json``: its end-of-text ids are kept, settings that are not applied are named and recorded."""

import json

import pytest
import torch
from transformers import GenerationConfig

from subspec.config.schema import HubTargetConfig
from subspec.decoding.sampling import Sampling
from subspec.errors import ConfigError
from subspec.targets import load_target, open_source
from subspec.targets.generation_settings import (
    CHANGES_BEAMS,
    CHANGES_OUTPUT,
    CHANGES_SAMPLES,
    FILE,
    OWN_SAMPLING,
    not_applied,
    read_generation_settings,
)
from tests.helpers.cli import cli, tiny_run
from tests.helpers.tiny import END_ID, edit_config, tiny_checkpoint

CPU = torch.device("cpu")

QWEN = {
    "bos_token_id": 1,
    "pad_token_id": 0,
    "do_sample": True,
    "eos_token_id": [2, 7],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}
"""What Qwen2.5's instruct models ship, with ids of the tiny vocabulary."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("generation") / "t", "qwen2", layers=1, max_positions=4096)


@pytest.fixture
def written(checkpoint):
    """Writes a ``generation_config.json`` (a text, bytes, or what JSON makes of a value); None: removes it."""

    def write(content):
        file = checkpoint / FILE
        if content is None:
            file.unlink(missing_ok=True)
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return checkpoint

    return write


def target_of(folder):
    return HubTargetConfig(name="mine", path=str(folder))


def opened(folder, note=lambda text: None):
    return open_source(target_of(folder), torch.float32, CPU, note=note)


# ------------------------------------------------------------------------------------------ end of text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token_id": [7, 2, 7]}, (2, 7)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": None}, (END_ID,)),
        ({"eos_token_id": []}, (END_ID,)),
        ({}, (END_ID,)),
        (None, (END_ID,)),
        # transformers refuses these whole:
        ({"eos_token_id": [2, 7], "max_new_tokens": -5}, (2, 7)),
        ({"eos_token_id": [2, 7], "early_stopping": "soon"}, (2, 7)),
        ({"eos_token_id": [2, 7], "cache_implementation": "none of them"}, (2, 7)),
        ({"eos_token_id": [2, 7], "watermarking_config": 5}, (2, 7)),
        ({"eos_token_id": [2, 7], "temperature": "hot"}, (2, 7)),
    ],
    ids=str,
)
def test_end_of_text_ids_are_read_whatever_else_stands_there(written, settings, expected):
    assert opened(written(settings)).eos_token_ids == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"eos_token_id": [2, 7], ',
        "",
        "[1, 2]",
        "null",
        '"text"',
        "5",
        b"\xff\xfe{}",
        "[" * 100_000,
        *({"eos_token_id": ids} for ids in ("2", "</s>", -1, True, 2.0, [2, "7"], [[2]], {"a": 2}, [None])),
        '{"eos_token_id": NaN}',
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_file_that_cannot_be_read_is_refused(written, content):
    with pytest.raises(ConfigError, match=FILE.replace(".", r"\.")) as refused:
        opened(written(content))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_file_that_leads_nowhere_is_refused(written, tmp_path):
    (file := written(None) / FILE).symlink_to(tmp_path / "nowhere")
    try:
        with pytest.raises(ConfigError, match=FILE):
            opened(file.parent)
    finally:
        file.unlink()


# ------------------------------------------------------------------------------------- what is not applied


def test_defaults_are_not_named():
    assert not_applied(GenerationConfig().to_dict()) is None
    defaults = GenerationConfig._get_default_generation_params()
    assert not_applied(defaults) is None
    neutral = CHANGES_OUTPUT | CHANGES_BEAMS | CHANGES_SAMPLES | OWN_SAMPLING
    for do_sample in (True, False):
        for settings in (neutral, dict.fromkeys(neutral), {key: [] for key in neutral}):
            assert not_applied(settings | {"do_sample": do_sample}, sampling=Sampling()) is None
    known = {key: value for key, value in defaults.items() if value is not None and key in neutral}
    assert known.items() <= neutral.items()


CHANGED = {"forced_bos_token_id": 0, "bad_words_ids": [[5]], "sequence_bias": [[[5], 2.0]], "dola_layers": "high"}
CHANGED |= {"watermarking_config": {"bias": 2.5}, "renormalize_logits": True, "token_healing": True}


@pytest.mark.parametrize("key", CHANGES_OUTPUT)
def test_every_setting_that_changes_the_output_is_named_with_its_value(key):
    value = CHANGED.get(key, 5)
    for settings, options in (({}, {}), ({"do_sample": True}, {"sampling": Sampling(1.0)})):
        assert f"{key}={json.dumps(value)}" in not_applied({key: value} | settings, **options)


def test_all_of_them_are_named_in_one_line():
    settings = dict.fromkeys(CHANGES_OUTPUT, 5) | {"length_penalty": 2.0, "cache_implementation": "quantized"}
    text = not_applied(settings)
    assert all(f"{key}=" in text for key in settings)
    assert "\n" not in text


@pytest.mark.parametrize("key", CHANGES_SAMPLES)
def test_settings_of_samples_are_named_with_samples_only(key):
    assert not_applied({key: 0.3}) is None
    assert f"{key}=0.3" in not_applied({key: 0.3, "do_sample": True})
    assert f"{key}=0.3" in not_applied({key: 0.3, "do_sample": True}, sampling=Sampling(0.7))


def test_beams_are_named_with_beams_only():
    assert not_applied({"length_penalty": 2.0, "early_stopping": True}) is None
    assert "length_penalty=2.0" in not_applied({"num_beams": 2, "length_penalty": 2.0})


def test_own_settings_of_samples_are_named_where_nothing_else_was_chosen():
    text = not_applied(QWEN, own="the group")
    assert "repetition_penalty=1.05" in text
    assert "do_sample=true with temperature=0.7, top_p=0.8, top_k=20 (the group" in text
    assert "do_sample" not in not_applied(QWEN, sampling=Sampling(0.5))
    assert not_applied({**QWEN, "repetition_penalty": 1.0}, sampling=Sampling(0.5)) is None
    assert "do_sample" not in not_applied({**QWEN, "do_sample": False})
    assert not_applied({"do_sample": True}).startswith("do_sample=true (")


def test_long_values_are_shortened_and_lengths_and_ids_are_a_runs_own():
    text = not_applied({"suppress_tokens": list(range(5000)), "sequence_bias": {(5, 6): 2.0}})
    assert len(text) < 300
    assert "suppress_tokens=[0, 1, 2" in text
    own = {"max_length": 4096, "max_new_tokens": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    assert not_applied(own | {"use_cache": True, "output_attentions": True, "chat_format": "chatml"}) is None


# -------------------------------------------------------------------------------------------- where it is said


def test_one_note_per_target_on_every_way_to_load(written):
    folder = written(QWEN)
    whole, layers = [], []
    target = load_target(target_of(folder), CPU, note=whole.append)
    source = opened(folder, layers.append)
    assert whole == layers == list(target.notes) == list(source.notes)
    assert len(whole) == 1
    assert "repetition_penalty=1.05" in whole[0]
    assert "top_k=20" in whole[0]


def test_settings_of_old_checkpoints_stand_in_their_configuration(written):
    folder = written(None)
    edit_config(folder, repetition_penalty=1.3)
    try:
        assert "repetition_penalty=1.3" in opened(folder).notes[0]
        # transformers does not look there then:
        assert opened(written({"eos_token_id": 2})).notes == ()
    finally:
        edit_config(folder, repetition_penalty=None)


def test_the_note_is_recorded(written, tmp_path):
    ran = cli(*tiny_run(written(QWEN), tmp_path, tokens=3, samples=1), "draft=none")
    assert ran.code == 0, ran.err
    assert ran.out.count("repetition_penalty=1.05") == 1
    (note,) = json.loads((tmp_path / "facts.json").read_text())["notes"]
    assert "repetition_penalty=1.05" in note
    assert note in json.loads((tmp_path / "summary.json").read_text())["run"]["notes"]


def test_no_folder_no_settings(tmp_path):
    assert read_generation_settings(tmp_path, "mine").values == {}
