"""Read a checkpoint folder: its configuration, the headers of its weights, its tokenizer.

Everything that is known from a few kilobytes (``config.json``, safetensors headers, file sizes) is checked
before the first weight is read. Every failure is one line with its remedy.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from subspec.errors import ConfigError, SubspecError
from subspec.targets.check_model import check_family, check_unquantized
from subspec.utils.console import quiet_libraries

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder has a tokenizer if it has one of these."""

_SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Of the types in which exact weights are stored, by their safetensors names."""

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

CONVERT = "load it once with transformers and `save_pretrained(FOLDER)` it with its tokenizer, then target.path=FOLDER"


@dataclass(frozen=True)
class StoredTensor:
    """A header entry: the file within the folder, the safetensors name of the type (``BF16``), the shape."""

    file: str
    dtype: str
    shape: torch.Size


def rounded_type(stored: Iterable[str], dtype: torch.dtype) -> str | None:
    """The type of ``stored`` (safetensors names) whose values ``dtype`` cannot hold exactly, if any."""
    kept = _DTYPE_NAMES[dtype]
    for name in sorted(stored, key=lambda name: -_SIGNIFICANT_BITS[name]):
        # float16 has more digits than bfloat16 but a smaller range, so neither holds the other.
        if name != kept and (_SIGNIFICANT_BITS[name] > _SIGNIFICANT_BITS[kept] or kept == "F16"):
            return name
    return None


def check_folder_config(folder: Path, name: str) -> PretrainedConfig:
    """The model configuration in ``folder``.

    Args:
        name: of the model, for messages.

    Raises:
        ConfigError: no or unreadable ``config.json``, an unsupported family, or quantized weights.
    """
    file = folder / "config.json"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{name} has no config.json: not a transformers checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error})") from error
    family = plain.get("model_type") if isinstance(plain, dict) else None
    check_family(family, name)
    check_unquantized(plain.get("quantization_config"), name)
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{file} is not a valid {family} configuration ({one_line(error)})") from error


def checkpoint_identity(folder: Path, source: str) -> str:
    """Identity of a checkpoint's weights, for results on disk that depend on them.

    Source and file sizes; for a local folder, which may change, the place and both dates instead of the source. The
    date of the last change of any kind (ctime) cannot be set back after an edit in place.

    Args:
        source: as recorded (``Located.source``).
    """
    local = Path(source).expanduser().is_dir()
    parts = [str(folder.resolve()) if local else source]
    for name in sorted(weight_files(folder)):
        stat = (folder / name).stat()
        parts.append(f"{name} {stat.st_size}" + (f" {stat.st_mtime_ns} {stat.st_ctime_ns}" if local else ""))
    return "\n".join(parts)


def missing_weights(folder: Path) -> str | None:
    """The first weight file of ``folder`` that is missing, or None. Contents are not read."""
    try:
        names = weight_files(folder)
    except ConfigError:
        return SINGLE
    return next((name for name in names if not (folder / name).is_file()), None)


def read_headers(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Every tensor of ``folder`` by name, from headers alone; files are checked to be complete.

    Raises:
        ConfigError: no safetensors, or weights of a quantized type.
        SubspecError: a file is missing, cut off, or not safetensors.
    """
    tensors = {}
    for file in weight_files(folder):
        if not (folder / file).is_file():
            raise SubspecError(f"{name} lacks {file}; fetch or copy it again")
        with open_weights(folder / file) as handle:
            for key in handle.keys():  # noqa: SIM118 (no mapping)
                part = handle.get_slice(key)
                tensors[key] = StoredTensor(file, part.get_dtype(), torch.Size(part.get_shape()))
    quantized = {tensor.dtype for tensor in tensors.values()} - _SIGNIFICANT_BITS.keys()
    if quantized:
        raise ConfigError(
            f"{name} holds {', '.join(sorted(quantized))} weights; the target must be the exact, unquantized model"
        )
    return tensors


def open_weights(path: Path) -> safe_open:
    """The safetensors file ``path``, mapped.

    Raises:
        SubspecError: it cannot be read, is cut off, or is something else.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise SubspecError(
            f"{path} is damaged or cannot be read ({one_line(error)}); fetch or copy it again"
        ) from error


def load_tokenizer(folder: Path, name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        ConfigError: there is none, it cannot be read, or it has ids beyond the model's vocabulary.
    """
    if not has_tokenizer(folder):
        raise ConfigError(
            f"{name} has no tokenizer (tokenizer.json); save the model's own beside its weights"
        )
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"the tokenizer of {name} cannot be read ({one_line(error)})") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer's main file."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the model.

    Raises:
        ConfigError: there are none, or their index cannot be read.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{index} cannot be read ({one_line(error)}); fetch or copy it again"
            ) from error
    if (folder / SINGLE).is_file():
        return [SINGLE]
    kinds = sorted({file.suffix for file in folder.iterdir()} & {".bin", ".pt", ".pth", ".gguf"})
    if kinds:
        raise ConfigError(f"{folder} holds {', '.join(kinds)} weights but no {SINGLE}: {CONVERT}")
    raise ConfigError(f"{folder} holds no weights ({SINGLE} or {INDEX})")


def one_line(error: BaseException) -> str:
    """Type and message of ``error`` on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
