"""The files of a checkpoint folder: which of them are read, and how they are opened.

Every reader of weights asks here (a target whole or layer by layer, small models, EAGLE heads, digests, the hub), so
all see the same model: the one that transformers loads from the folder.
"""

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from subspec.errors import ConfigError, SubspecError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

TEXTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Files beside a model's weights that its output depends on."""

CONVERT = "load it once with transformers and `save_pretrained(FOLDER)` it with its tokenizer, then {key}=FOLDER"

_OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"}

_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Wanted:
    """What a path of the configuration must hold, and how messages name it.

    Attributes:
        key: of the configuration, with the path as its value.
        what: to pass instead of a path that is none.
        remedy: for weights in another format; ``{key}`` stands for :attr:`key`.
        pickle: :data:`PICKLE` will do, too.
        tokenizer: a tokenizer must be there; family: it must be a model of a supported family.
        texts: patterns of the files that are wanted beside the weights.
    """

    key: str = "target.path"
    what: str = "the checkpoint folder (config.json, safetensors, tokenizer)"
    remedy: str = CONVERT
    pickle: bool = False
    tokenizer: bool = True
    family: bool = True
    texts: tuple[str, ...] = TEXTS


TARGET = Wanted()
SMALL_MODEL = Wanted(key="draft.path", tokenizer=False, texts=(*TEXTS, "warp_model.bin"))  # of PARD-2


def main_file(names: Collection[str], where: str, wanted: Wanted = TARGET) -> str:
    """The file through which weights are found, in transformers' order: the only one, an index, or a pickle.

    Args:
        names: of the files in the folder or repository ``where``; ConfigError if no weights are among them.
    """
    accepted = (SINGLE, INDEX, PICKLE) if wanted.pickle else (SINGLE, INDEX)
    found = next((name for name in accepted if name in names), None)
    if found is not None:
        return found
    others = sorted(name for name in names if name.endswith(".safetensors"))
    shards = [name for name in others if "-of-" in name]
    if shards:
        raise ConfigError(
            f"{where} holds {len(shards)} shards ({shards[0]}, ...) without their index {INDEX}: fetch or copy the "
            "index, too"
        )
    others = others[:1] + sorted({Path(name).suffix for name in names} & _OTHER_FORMATS)
    held = f" (it has {', '.join(others)})" if others else ""
    raise ConfigError(
        f"{where} holds no weights: no {' or '.join(accepted)}{held}; {wanted.remedy.format(key=wanted.key)}"
    )


def weight_files(folder: Path, wanted: Wanted = TARGET) -> list[str]:
    """Names of the files in ``folder`` that make up the model; those of an index may be missing.

    ConfigError if there are none, or if their index cannot be read.
    """
    main = main_file([file.name for file in folder.iterdir() if file.is_file()], str(folder), wanted)
    if main != INDEX:
        return [main]
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(f"{folder / INDEX} cannot be read (no weight_map); fetch or copy it again")
    return sorted(set(files.values()))


def open_weights(path: Path) -> safe_open:
    """The safetensors file ``path``, mapped; SubspecError if it is missing, cut off, unreadable or something else."""
    if not path.is_file():
        raise SubspecError(f"{path.parent} lacks {path.name}; fetch or copy it again")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        check_pointer(path)
        raise SubspecError(
            f"{path} is damaged or cannot be read ({one_line(error)}); fetch or copy it again"
        ) from error


def data_offsets(path: Path) -> dict[str, int]:
    """First byte of every tensor in the safetensors file ``path``, by name; errors as :func:`open_weights`."""
    open_weights(path)  # checks the header
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; FileNotFoundError without the file, ConfigError for all other failures."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of an object")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        check_pointer(file)
        raise ConfigError(f"{file} cannot be read ({one_line(error)}); fetch or copy it again") from error
    return content


def check_pointer(file: Path) -> None:
    """Refuse (ConfigError) a Git LFS pointer in place of ``file``."""
    with suppress(OSError), file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise ConfigError(f"{file} is a Git LFS pointer instead of the file: run `git lfs pull` in its folder")


def one_line(error: BaseException) -> str:
    """Type and message of ``error`` on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
