"""Read a checkpoint folder: is it a target at all, are its weights whole, and then into memory.

Everything that can be known from a few kilobytes (``config.json``, the safetensors headers, the file sizes) is
checked before the first weight is read, and said in one line.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from subspec.errors import ConfigError, SubspecError
from subspec.targets.check_model import check_family, check_unquantized
from subspec.targets.generation_settings import loadable_settings
from subspec.utils.console import quiet_libraries

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder has a tokenizer if it has one of these."""

_EXACT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_CONVERT = "load it once with transformers and `save_pretrained(FOLDER)` it with its tokenizer, then target.path=FOLDER"


@dataclass
class Weights:
    """What the safetensors headers of a folder say.

    Attributes:
        count: number of weights.
        dtypes: safetensors names of their types, ``BF16`` for instance.
    """

    count: int = 0
    dtypes: set[str] = field(default_factory=set)

    def rounding(self, dtype: torch.dtype) -> str | None:
        """The stored type whose values ``dtype`` cannot hold exactly, if any."""
        kept = _DTYPE_NAMES[dtype]
        for stored in sorted(self.dtypes, key=lambda name: -_SIGNIFICANT_BITS[name]):
            # float16 has more digits than bfloat16 but a smaller range, so neither holds the other.
            if stored != kept and (_SIGNIFICANT_BITS[stored] > _SIGNIFICANT_BITS[kept] or kept == "F16"):
                return stored
        return None


def check_folder_config(folder: Path, name: str) -> PretrainedConfig:
    """The model configuration in ``folder``, if its model can be a target.

    Args:
        name: what the user called it, for messages.

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
        raise ConfigError(f"{file} is not a valid {family} configuration ({_line(error)})") from error


def checkpoint_identity(folder: Path, source: str) -> str:
    """What tells a checkpoint's weights from all others', for what is kept on disk and follows from them.

    The commit or package and its files' sizes; of a local folder, which may change, also place and dates: the date of
    the last change of any kind, too, which whoever edits weights in place cannot set back.

    Args:
        source: what a record says was loaded (``Located.source``).
    """
    local = Path(source).expanduser().is_dir()
    parts = [str(folder.resolve()) if local else source]
    for name in sorted(weight_files(folder)):
        stat = (folder / name).stat()
        parts.append(f"{name} {stat.st_size}" + (f" {stat.st_mtime_ns} {stat.st_ctime_ns}" if local else ""))
    return "\n".join(parts)


def missing_weights(folder: Path) -> str | None:
    """Which weight file of ``folder`` is not there, or None when all are. Contents are not looked at."""
    try:
        names = weight_files(folder)
    except ConfigError:
        return SINGLE
    return next((name for name in names if not (folder / name).is_file()), None)


def read_headers(folder: Path, name: str) -> Weights:
    """Check that every weight file of ``folder`` is there and whole, from headers and sizes alone.

    Raises:
        ConfigError: no safetensors, or weights of a quantized type.
        SubspecError: a file is missing, cut off, or not safetensors.
    """
    weights = Weights()
    for file in weight_files(folder):
        path = folder / file
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length < size else None
            if header is None:
                raise SubspecError(f"{path} is cut off ({size} bytes); fetch or copy it again")
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        except FileNotFoundError:
            raise SubspecError(f"{name} lacks {file}; fetch or copy it again") from None
        except OSError as error:
            raise SubspecError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SubspecError(
                f"{path} is damaged (no safetensors header); fetch or copy it again"
            ) from error
        if size != 8 + length + end:
            raise SubspecError(
                f"{path} is damaged: {size} bytes instead of {8 + length + end}; fetch or copy it again"
            )
        for tensor in tensors.values():
            kind = tensor["dtype"]
            if kind not in _EXACT:
                raise ConfigError(
                    f"{name} holds {kind} weights; the target must be the exact, unquantized model"
                )
            weights.dtypes.add(kind)
            weights.count += (tensor["data_offsets"][1] - tensor["data_offsets"][0]) // _EXACT[kind]
    return weights


def load_model(folder: Path, name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in ``folder``: on ``device``, in ``dtype``, in eval mode, without gradients, with SDPA attention.

    Raises:
        SubspecError: the weights do not belong to the configuration, or do not fit into memory.
    """
    options: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if settings := loadable_settings(folder):
        options["generation_config"] = settings
    try:
        with quiet_libraries(bars=True):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise SubspecError(
            f"{name} does not fit into the memory of {device}; choose a smaller target"
        ) from error
    except Exception as error:
        raise SubspecError(f"the weights of {name} cannot be loaded ({_line(error)})") from error
    if absent := sorted(report["missing_keys"]):
        raise SubspecError(
            f"{name} lacks {len(absent)} weights of a {model.config.model_type} language model "
            f"({absent[0]} first): not a causal language model, or an incomplete checkpoint"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        ConfigError: there is none, it cannot be read, or it has ids beyond the model's vocabulary.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ConfigError(
            f"{name} has no tokenizer (tokenizer.json); save the model's own beside its weights"
        )
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"the tokenizer of {name} cannot be read ({_line(error)})") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {name} has id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
            "they do not belong together"
        )
    return tokenizer


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
            raise ConfigError(f"{index} cannot be read ({_line(error)}); fetch or copy it again") from error
    if (folder / SINGLE).is_file():
        return [SINGLE]
    kinds = sorted({file.suffix for file in folder.iterdir()} & {".bin", ".pt", ".pth", ".gguf"})
    if kinds:
        raise ConfigError(f"{folder} holds {', '.join(kinds)} weights but no {SINGLE}: {_CONVERT}")
    raise ConfigError(f"{folder} holds no weights ({SINGLE} or {INDEX})")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
