"""Checks of a configuration: ranges of keys and contradictions between them.

Each message names the keys and the remedy. Checks against the target, the draft or the machine are in
:mod:`subspec.drafts.check_config` and :mod:`subspec.planning`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from subspec.config.enums import AUTO
from subspec.config.errors import unknown_key
from subspec.config.quant_checks import check_quant
from subspec.config.schema import (
    Config,
    Device,
    HiggsConfig,
    HiggsKernel,
    Kernel,
    Source,
    StreamOffloadConfig,
    SubstituteDraftConfig,
    Unpack,
)
from subspec.errors import ConfigError

Check = tuple[str, Callable[[Any], bool], str]

_AT_LEAST_1: Callable[[Any], bool] = lambda value: value is None or value >= 1  # noqa: E731 (used as data)
_NOT_NEGATIVE: Callable[[Any], bool] = lambda value: value is None or value >= 0  # noqa: E731
_NOT_NEGATIVE_FINITE: Callable[[Any], bool] = lambda value: value is None or 0 <= value < math.inf  # noqa: E731
_POSITIVE: Callable[[Any], bool] = lambda value: value is None or 0 < value < math.inf  # noqa: E731

RANGES: list[Check] = [
    ("run_dir", lambda value: bool(value.strip()), "names no folder: give one, or leave run_dir out"),
    ("seed", _NOT_NEGATIVE, "must not be negative"),
    ("warmup", _NOT_NEGATIVE, "must not be negative (0: no warm-up)"),
    ("audit_margin", _NOT_NEGATIVE_FINITE, "must be finite and not negative (null: by dtype)"),
    ("tree.depth", _AT_LEAST_1, "must be at least 1 (draft=none decodes without a tree)"),
    ("tree.width", _AT_LEAST_1, "must be at least 1"),
    ("tree.total_tokens", lambda value: value >= 2, "must be at least 2: the root and a node below it"),
    ("tree.check_every", _AT_LEAST_1, "must be at least 1"),
    ("tree.min_depth", _NOT_NEGATIVE, "must not be negative (0: nothing is drafted while plain decoding is faster)"),
    ("tree.level_cost", _POSITIVE, "must be positive (null: measured while running)"),
    ("draft.temperature", _POSITIVE, "must be positive"),
    ("draft.proposed", lambda value: 1 <= value <= 64, "must lie in 1..64"),
    ("decoding.max_length", lambda value: value >= 2, "must be at least 2: one token of prompt, one of answer"),
    ("decoding.max_new_tokens", _AT_LEAST_1, "must be at least 1 (null: until max_length)"),
    ("decoding.prefill_chunk", _AT_LEAST_1, "must be at least 1"),
    (
        "decoding.temperature",
        lambda value: 1e-6 <= value < math.inf,
        "must be positive, at least 1e-6 (decoding=greedy for the argmax)",
    ),
    ("decoding.top_k", _NOT_NEGATIVE, "must not be negative (0: off)"),
    ("decoding.top_p", lambda value: 0 < value <= 1, "must lie in (0, 1] (1: off)"),
    ("decoding.bitwise", lambda value: value == AUTO or isinstance(value, bool), "must be auto, true or false"),
    (
        "decoding.texts",
        lambda value: value == AUTO or (type(value) is int and value >= 1),
        "must be a whole number of at least 1, or auto",
    ),
    ("decoding.stop", all, "holds an empty string: leave it out"),
    (
        "offload.vram_gib",
        lambda value: value == AUTO or (type(value) in (int, float) and 0 < value < math.inf),
        "must be positive, or auto",
    ),
    ("offload.resident_layers", _NOT_NEGATIVE, "must not be negative (null: as many as fit)"),
    ("offload.ring_slots", _AT_LEAST_1, "must be at least 1 (2: a layer is copied while another computes)"),
    ("offload.link_gb_per_s", _POSITIVE, "must be positive (null: measured, or the card's)"),
    ("offload.ram_gib", _POSITIVE, "must be positive (null: what is free)"),
    ("offload.disk_gb_per_s", _POSITIVE, "must be positive (null: measured)"),
    ("benchmark.max_samples", _AT_LEAST_1, "must be at least 1 (null: all)"),
    ("benchmark.per_category", _AT_LEAST_1, "must be at least 1 (null: no such limit)"),
    ("benchmark.categories", lambda value: value != [], "selects nothing: name categories (null: all)"),
    ("benchmark.max_prompt_tokens", _AT_LEAST_1, "must be at least 1 (null: what fits)"),
    ("logger.init_timeout_s", _POSITIVE, "must be positive"),
    ("serve.port", lambda value: 0 <= value < 2**16, "must lie in 0..65535 (0: any free one)"),
    ("serve.queue", _NOT_NEGATIVE, "must not be negative (0: requests never wait)"),
    ("serve.api_key", lambda value: value is None or value.strip(), "is empty: give a key, or leave it out"),
]
"""(key, predicate, complaint); keys that the chosen option does not have are skipped."""


def check_keys(cfg: DictConfig, parent: str = "") -> None:
    """Refuse (ConfigError) keys added with ``+``, mandatory keys without a value, and interpolations without a target.

    Hydra accepts all of these.
    """
    schema = OmegaConf.get_type(cfg)
    known = {field.name for field in dataclasses.fields(schema)}
    for name in cfg:
        key = f"{parent}{name}"
        if name not in known:
            raise ConfigError(unknown_key(key, schema))
        node = cfg._get_node(name)  # as written: cfg[name] would already resolve it
        if node._is_missing():
            raise ConfigError(f"{key} is not set: give it as {key}=VALUE")
        if isinstance(node, DictConfig):
            check_keys(node, f"{key}.")
    for name in cfg:
        try:
            OmegaConf.select(cfg, str(name), throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{parent}{name}: {str(error).splitlines()[0]}") from error


def check_ranges(groups: Mapping[str, Any]) -> None:
    """Refuse (ConfigError) wrong values of single keys; ``groups`` by name, "": the keys outside groups."""
    for key, fine, complaint in RANGES:
        group, _, name = key.rpartition(".")
        node = groups.get(group)
        if hasattr(node, name) and not fine(value := getattr(node, name)):
            raise ConfigError(f"{key}={value} {complaint}")


def check_values(config: Config) -> None:
    """Refuse (ConfigError) wrong values of single keys, and contradictions between keys."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    check_ranges({"": config, **groups})
    if quantizes(config):
        check_quant(config.quant)
    tree = config.tree
    least = getattr(tree, "min_depth", None) or 0
    if config.draft.name != "none" and least > tree.depth:
        raise ConfigError(f"tree.min_depth={least} exceeds tree.depth={tree.depth}: lower the former")
    _check_execution(config)
    _check_lengths(config)
    if config.benchmark.source is Source.file and not config.benchmark.path:
        raise ConfigError("benchmark.source=file needs benchmark.path=FILE")
    if config.benchmark.path and config.benchmark.source is not Source.file:
        raise ConfigError(
            f"benchmark.path is set but benchmark.source={config.benchmark.source.name}: "
            "use benchmark.source=file, or leave benchmark.path out"
        )


def streams_from_disk(config: Config) -> bool:
    """Whether the target's layers stream from a disk through a CPU: ``offload=stream`` with ``device=cpu``.

    A plan for a named card is of a GPU on any device.
    """
    offload = config.offload
    return isinstance(offload, StreamOffloadConfig) and config.device is Device.cpu and offload.card is None


def _check_execution(config: Config) -> None:
    """Check that keys of the draft's execution fit ``offload``."""
    draft, quant = config.draft, config.quant
    captured = isinstance(config.offload, StreamOffloadConfig) and not streams_from_disk(config)
    streamed = isinstance(config.offload, StreamOffloadConfig)
    if streamed and isinstance(quant, HiggsConfig) and quant.kernel is not HiggsKernel.auto:
        raise ConfigError(
            f"quant.kernel={quant.kernel.value} is for single modules: with offload=stream set draft.kernel, or "
            "leave quant.kernel at auto"
        )
    unpack = getattr(draft, "unpack", Unpack.auto)
    if streamed and unpack is not Unpack.auto:
        raise ConfigError(
            f"draft.unpack={unpack.value} is for single modules, and offload=stream computes with packed weights: "
            "leave draft.unpack at auto"
        )
    kernel = getattr(draft, "kernel", Kernel.auto)
    if kernel is not Kernel.auto and not captured:
        raise ConfigError(
            f"draft.kernel={kernel.value} chooses the kernel of offload=stream: set that, or leave draft.kernel at auto"
        )
    if not getattr(draft, "overlap_launches", True) and not captured:
        raise ConfigError(
            "draft.overlap_launches=false is for the captured levels of offload=stream: set that, or leave it out"
        )


def check_skip_layers(skipped: Iterable[int], layers: int, model: str = "target") -> None:
    """Refuse (ConfigError) a layer in ``quant.skip_layers`` that the quantized ``model`` does not have."""
    wrong = [index for index in skipped if not 0 <= index < layers]
    if wrong:
        raise ConfigError(f"quant.skip_layers: no layer {wrong[0]} in a {model} with layers 0..{layers - 1}")


def quantizes(config: Config) -> bool:
    """Whether ``quant`` applies to the draft."""
    return isinstance(config.draft, SubstituteDraftConfig) or getattr(config.draft, "quantize", False)


def _check_lengths(config: Config) -> None:
    decoding, prompt = config.decoding, config.benchmark.max_prompt_tokens
    answer = decoding.max_new_tokens
    if answer is not None and answer >= decoding.max_length:
        raise ConfigError(
            f"decoding.max_new_tokens={answer} leaves no room for a prompt in "
            f"decoding.max_length={decoding.max_length}: lower the former or raise the latter"
        )
    if prompt is not None and prompt + (answer or 1) > decoding.max_length:
        raise ConfigError(
            f"benchmark.max_prompt_tokens={prompt} + decoding.max_new_tokens={answer or 1} exceed the cache of "
            f"decoding.max_length={decoding.max_length} tokens: raise decoding.max_length to at least "
            f"{prompt + (answer or 1)} or lower benchmark.max_prompt_tokens"
        )


def prompt_limit(config: Config) -> int:
    """Longest prompt in tokens; longer ones are skipped and counted."""
    room = config.decoding.max_length - (config.decoding.max_new_tokens or 1)
    return min(room, config.benchmark.max_prompt_tokens or room)
