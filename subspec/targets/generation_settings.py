"""Settings of a checkpoint's ``generation_config.json``: end-of-text ids, and settings that a run does not apply.

transformers applies them by default (Qwen2.5 ships ``repetition_penalty`` 1.05, which changes even greedy
text). A run here decodes as its own configuration says, so every setting that would change the output is named
in a note. The file is read as JSON: transformers refuses it whole for one bad value, and the end-of-text ids
would be lost.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspec.decoding.sampling import Sampling
from subspec.decoding.stopping import eos_ids, eos_tuple
from subspec.errors import ConfigError
from subspec.targets.weight_files import CONFIG, read_json

FILE = "generation_config.json"

VALUE_WIDTH = 60
"""Most characters of a value that a note shows."""

CHANGES_OUTPUT: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("penalty_alpha", "renormalize_logits", "token_healing"), 0),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "constraints", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "max_time")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids")),
    **dict.fromkeys(("watermarking_config", "dola_layers")),
}
"""Settings that change greedy and sampled text alike, with the value that changes nothing, as null and [] do."""

CHANGES_BEAMS: dict[str, Any] = dict.fromkeys(("diversity_penalty", "early_stopping"), 0)
CHANGES_BEAMS |= dict.fromkeys(("num_beam_groups", "length_penalty"), 1)
"""Settings that count with several beams only."""

CHANGES_SAMPLES: dict[str, Any] = {"min_p": 0, "top_h": None, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""Settings that count with ``do_sample`` only and that :class:`~subspec.decoding.sampling.Sampling` does not have."""

OWN_SAMPLING: dict[str, Any] = {"temperature": 1, "top_p": 1, "top_k": 50}
"""Settings of ``do_sample`` that the ``decoding`` group has, with transformers' defaults."""


@dataclass(frozen=True)
class GenerationSettings:
    """The generation settings of a checkpoint by name, as written in ``file``; None: it has no such file."""

    file: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def eos_token_ids(self, *others: object) -> tuple[int, ...]:
        """Every id that ends a text, ascending; without any here, those of the first of ``others`` that has some.

        ``others``: objects with an ``eos_token_id``. ConfigError if the value here is no id and no list of ids.
        """
        ids = self.values.get("eos_token_id")
        return eos_ids(*others) if ids is None or ids == [] else eos_tuple(ids, f"eos_token_id in {self.file}")


def read_generation_settings(folder: Path, name: str) -> GenerationSettings:
    """The settings in the folder of checkpoint ``name``, of old ones in ``config.json``; ConfigError if unreadable."""
    for file in (folder / FILE, folder / CONFIG):
        if file.exists() or file.is_symlink():
            try:
                return GenerationSettings(file, read_json(file))
            except FileNotFoundError as error:  # a link to nothing
                raise ConfigError(f"{file} cannot be read ({error}); fetch or copy it again") from error
            except ConfigError as error:
                raise ConfigError(f"{error} (it holds the end-of-text tokens of {name})") from error
    return GenerationSettings()


def not_applied(
    settings: Mapping[str, Any], *, own: str = "the decoding group", sampling: Sampling | None = None
) -> str | None:
    """Requests in ``settings`` that a run does not fulfil, as the end of a sentence; None: there are none.

    Args:
        own: the name of the run's own sampling settings, for the message.
        sampling: those settings, if chosen explicitly: then ``do_sample`` is not named.
    """
    samples = settings.get("do_sample") is True
    named = _named(settings, CHANGES_OUTPUT)
    if "num_beams" in named:
        named |= _named(settings, CHANGES_BEAMS)
    if samples:
        named |= _named(settings, CHANGES_SAMPLES)
    if settings.get("cache_implementation") == "quantized":
        named["cache_implementation"] = "quantized"
    parts = []
    if named:
        parts.append(f"{_listed(named)} (transformers' generate applies them and emits other tokens)")
    if samples and sampling is None:
        theirs = _named(settings, OWN_SAMPLING)
        parts.append(f"do_sample=true{' with ' if theirs else ''}{_listed(theirs)} ({own} says how a run samples)")
    return "; ".join(parts) or None


def _named(settings: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from their value in ``neutral``."""
    return {
        key: settings[key]
        for key, value in neutral.items()
        if settings.get(key) is not None and settings[key] != value and settings[key] not in ([], {}, ())
    }


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    """A value as JSON in one short line."""
    try:
        text = " ".join(json.dumps(value, default=str).split())
    except (TypeError, ValueError):
        text = " ".join(str(value).split())
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 3]}..."
