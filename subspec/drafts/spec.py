"""The specification of a kind of draft: its checks, its consumption of the target's layers, and its construction.

A kind of draft is a configuration class (:mod:`subspec.config.schema`), a file in ``conf/draft``, and a
:class:`DraftSpec` in :mod:`subspec.drafts.registry`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspec.codec.coded_cache import CodedCache
from subspec.config.enums import AUTO
from subspec.config.schema import Config, StreamOffloadConfig
from subspec.decoding.draft import Draft
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import LEVEL_ROWS, TreePolicy
from subspec.errors import ConfigError
from subspec.levels.build import SubstituteBuilder
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.dense import check_level_support
from subspec.levels.model import LevelModel
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.offload.loader import LoadingPlan
from subspec.quant.quantize_model import Quantizer, QuantReport
from subspec.targets.device import resolve_dtype
from subspec.utils.console import Note, print_note


@dataclass
class BuiltDraft:
    """A draft with facts about it.

    Attributes:
        quant: the quantization report; None: nothing was quantized.
        facts: builtin types for the record: source of the weights, layers, cache.
        summary: the facts on one line for people, without the draft's name; empty: ``quant`` says it all.
    """

    draft: Draft
    quant: QuantReport | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class DraftContext:
    """The inputs of a draft's construction besides the target's weights.

    Attributes:
        policy: shape of the trees that will be drafted.
        name, model, tokenizer, dtype, identity: of the target: its name for messages, its transformers configuration,
            its tokenizer, and the identity of its weights (``LayerSource.identity``).
        plan: of a target that is streamed; None: the target is whole on ``device``.
        quantizer: used instead of ``config.quant`` for modules (library users); None: as configured.
    """

    config: Config
    policy: TreePolicy
    name: str
    model: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype
    identity: str
    device: torch.device
    plan: LoadingPlan | None = None
    quantizer: Quantizer | None = None
    note: Note = print_note

    @property
    def level_rows(self) -> int:
        """Rows of a draft level of all texts that run side by side."""
        texts = self.plan.texts if self.plan is not None else self.config.decoding.texts
        width = self.policy.width
        return width if texts in (1, AUTO) else min(width * texts, max(width, LEVEL_ROWS))


class DraftSpec(ABC):
    """One kind of draft. The class checks configurations; an instance builds one draft.

    A context manager, entered before a streamed target is loaded and left afterwards: ``prepare``, loading of the
    target, ``close``, ``build``. With a whole target, ``prepare`` and ``build`` follow each other.

    Everything but ``close`` and ``build`` raises a SubspecError that names the key and the remedy. ``config.draft`` is
    always of the class that :mod:`subspec.drafts.registry` maps to the kind; ``model`` is the target's transformers
    configuration.

    Attributes:
        builder: consumes the layers of a streamed target; None: the draft takes nothing of them.
        coded: keeps what the target's exact layers are coded to; None: they are not coded, or not kept.
        from_disk: whether the draft runs beside a target that streams from a disk to a CPU.
    """

    from_disk: ClassVar[bool] = True

    builder: SubstituteBuilder | None = None
    coded: CodedCache | None = None

    def __init__(self, context: DraftContext) -> None:
        self.context = context

    @classmethod
    def serves_texts(cls, config: Config) -> bool:
        """Whether the draft serves several texts that run side by side (``Draft.fork``)."""
        return True

    @classmethod  # noqa: B027 (optional)
    def check(cls, config: Config) -> None:
        """Check a configuration by itself."""

    @classmethod  # noqa: B027 (optional)
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        """Check a configuration against the target's."""

    @classmethod  # noqa: B027 (optional)
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        """Check the draft's own files, before the target's weights are fetched or read."""

    @classmethod
    def quantized_model(cls, config: Config, model: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the model that ``quant`` quantizes."""
        return model

    @classmethod
    def memory(cls, inputs: SizingInputs) -> DraftMemory:
        """The draft's memory under ``offload=stream``, computed before anything is loaded."""
        raise ConfigError(f"offload=stream has no plan for draft={inputs.config.draft.name}: set offload=none")

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        """Hex digest of the draft's own weights, fetched first if need be; None: it has none."""
        return None

    def prepare(self) -> None:  # noqa: B027 (optional)
        """Load and choose everything that does not depend on the target's weights.

        Errors of configuration and files belong here: a streamed target is not loaded yet.
        """

    def close(self) -> None:  # noqa: B027 (optional)
        """Close files that were open while the target's layers passed."""

    @abstractmethod
    def build(self, target: TargetModel) -> BuiltDraft:
        """The draft, for a target that is loaded, whole or streamed."""

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def why_not_captured(context: DraftContext, model: PretrainedConfig, dtype: torch.dtype) -> str:
    """Why a draft, of this ``model`` and ``dtype``, beside a whole target runs as modules; empty: it is captured."""
    if context.device.type != "cuda":
        return f"the target is whole on {context.device.type}"
    if not context.policy.whole_levels:
        return "the tree expands parts of levels"
    try:
        check_level_support(model, dtype, "the draft")
    except ConfigError as error:
        return str(error)
    return ""


def check_target_levels(config: Config, model: PretrainedConfig) -> None:
    """Check that a draft of a streamed target can run the target's layers as captured levels."""
    if isinstance(config.offload, StreamOffloadConfig):
        dtype = resolve_dtype(config.target.dtype, torch.device("cuda"))
        check_level_support(model, dtype, f"target {config.target.name}")


def capture(model: LevelModel, draft: Any) -> CapturedDraft:
    """Captured levels, with the settings ``temperature`` and ``overlap_launches`` of a draft's configuration."""
    return CapturedDraft(model, draft.temperature, overlap=None if draft.overlap_launches else False)
