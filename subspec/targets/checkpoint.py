"""Read a checkpoint folder: its configuration, the headers of its weights, its tokenizer.

Everything that is known from a few kilobytes (``config.json``, safetensors headers, file sizes) is checked
before the first weight is read. Every failure is one line with its remedy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from subspec.errors import ConfigError
from subspec.targets.check_model import check_architecture, check_family, check_unquantized, shortest_window
from subspec.targets.meta_model import parameter_shapes
from subspec.targets.weight_files import (
    CONFIG,
    TARGET,
    TEXTS,
    Wanted,
    check_pointer,
    one_line,
    open_weights,
    read_json,
    weight_files,
)
from subspec.utils.console import quiet_libraries

ADAPTER = "adapter_config.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder has a tokenizer if it has one of these."""

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Of the types in which exact weights are stored, by their safetensors names."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class StoredTensor:
    """A header entry: the file within the folder, the safetensors name of the type (``BF16``), the shape."""

    file: str
    dtype: str
    shape: torch.Size


def rounded_type(stored: Iterable[str], dtype: torch.dtype) -> str | None:
    """The type of ``stored`` (safetensors names) whose values ``dtype`` cannot hold exactly, if any."""
    kept = DTYPE_NAMES[dtype]
    for name in sorted(stored, key=lambda name: -SIGNIFICANT_BITS[name]):
        # float16 has more digits than bfloat16 but a smaller range, so neither holds the other.
        if name != kept and (SIGNIFICANT_BITS[name] > SIGNIFICANT_BITS[kept] or kept == "F16"):
            return name
    return None


def check_folder_config(folder: Path, name: str, wanted: Wanted = TARGET) -> PretrainedConfig:
    """The model configuration in ``folder``; ``name`` is the model's, for messages.

    Raises:
        ConfigError: no or unreadable ``config.json``, an unsupported family, quantized weights, an adapter, or weights
            in files of other names.
    """
    adapter = (folder / ADAPTER).exists()
    try:
        plain = read_json(folder / CONFIG)
    except FileNotFoundError:
        plain = None
    if adapter or plain is None:
        raise ConfigError(f"{name} {_not_whole(folder, adapter, wanted)}")
    family = plain.get("model_type")
    check_family(family, name)
    check_unquantized(plain.get("quantization_config"), name)
    if (other := plain.get("transformers_weights")) is not None:
        raise ConfigError(f"{name} keeps its weights in {other} (transformers_weights), which is not read")
    try:
        with quiet_libraries():
            model = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_architecture(model, name)
        # The library checks some values only when it builds the modules.
        shortest_window(model)
        parameter_shapes(model)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{folder / CONFIG} is not a valid {family} configuration ({one_line(error)})") from error
    return model


def _not_whole(folder: Path, adapter: bool, wanted: Wanted) -> str:
    """Why ``folder`` is no checkpoint of a whole model, as the end of a sentence."""
    if adapter:
        return (
            f"holds an adapter ({ADAPTER}), not a whole model: merge it into its model (merge_and_unload(), "
            f"save_pretrained(FOLDER)), then {wanted.key}=FOLDER"
        )
    inner = sorted([*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")])
    if inner:
        return f"has no {CONFIG}, and {inner[-1].parent} has one: {wanted.key}={inner[-1].parent}"
    if next(folder.glob("*.gguf"), None) is not None:
        return f"has no {CONFIG}: a GGUF file is not read; take the original in safetensors"
    return f"has no {CONFIG}: not a transformers checkpoint"


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


def read_headers(folder: Path, wanted: Wanted = TARGET) -> dict[str, StoredTensor]:
    """Every tensor of ``folder`` by name, from headers alone; SubspecError if a file is missing or cut off."""
    tensors = {}
    for file in weight_files(folder, wanted):
        with open_weights(folder / file) as handle:
            for key in handle.keys():  # noqa: SIM118 (no mapping)
                part = handle.get_slice(key)
                tensors[key] = StoredTensor(file, part.get_dtype(), torch.Size(part.get_shape()))
    return tensors


def load_tokenizer(folder: Path, name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; ConfigError if there is none or it cannot be read, or for ids beyond the model's
    vocabulary other than those of added tokens."""
    if not has_tokenizer(folder):
        raise ConfigError(f"{name} has no tokenizer (tokenizer.json); save the model's own beside its weights")
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        for pattern in TEXTS:
            for file in folder.glob(pattern):
                check_pointer(file)
        raise ConfigError(f"the tokenizer of {name} cannot be read ({one_line(error)})") from error
    tokens = tokenizer.get_vocab()
    largest = max((tokens[token] for token in tokens.keys() - tokenizer.get_added_vocab()), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together"
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has a tokenizer's main file."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)
