"""The specification of ``draft=subspec``, with or without ``draft.proposer``."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.checks import streams_from_disk
from subspec.config.enums import Proposer
from subspec.config.schema import (
    Config,
    DraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    PromptLookupDraftConfig,
    SmallModelDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.drafts.cascade import CONTEXT, CascadeDraft, GuessPolicy
from subspec.drafts.eagle import EagleSpec
from subspec.drafts.padded_levels import KnownLevels, PaddedLevels
from subspec.drafts.prompt_lookup import PromptLookupSpec
from subspec.drafts.small_model import SmallModelSpec
from subspec.drafts.spec import BuiltDraft, DraftContext, DraftSpec
from subspec.drafts.substitute import SubstituteSpec
from subspec.errors import ConfigError, reworded
from subspec.levels.captured_draft import CapturedDraft
from subspec.memory.allocator import Allocation
from subspec.memory.draft_memory import DraftMemory, SizingInputs, tree_bytes
from subspec.utils.console import Note
from subspec.utils.rounding import round_up

PROPOSERS: dict[Proposer, tuple[type[DraftSpec], type[DraftConfig]]] = {
    Proposer.prompt_lookup: (PromptLookupSpec, PromptLookupDraftConfig),
    Proposer.small_model: (SmallModelSpec, SmallModelDraftConfig),
    Proposer.eagle2: (EagleSpec, Eagle2DraftConfig),
    Proposer.eagle3: (EagleSpec, Eagle3DraftConfig),
}


def proposer_of(config: Config) -> tuple[type[DraftSpec], Config] | None:
    """The proposer's kind, and the configuration in which it is the draft; None: there is none."""
    draft = config.draft
    if not isinstance(draft, SubstituteDraftConfig) or draft.proposer is Proposer.none:
        return None
    kind, settings = PROPOSERS[draft.proposer]
    options: dict[str, Any] = {"name": draft.proposer.value}
    if settings is not PromptLookupDraftConfig:
        options["path"] = draft.proposer_path
    return kind, replace(config, draft=settings(**options))


def _about_proposer(text: str) -> str:
    """Name the proposer's keys in one of its own messages."""
    return re.sub(r"\bdraft=(?!subspec)", "draft.proposer=", text.replace("draft.path", "draft.proposer_path"))


@reworded(_about_proposer)
def _ask_proposer(config: Config, ask: Callable[[type[DraftSpec], Config], Any]) -> Any:
    """What ``ask`` returns of the proposer's kind and configuration; None: there is no proposer."""
    found = proposer_of(config)
    return None if found is None else ask(*found)


class CascadeSpec(SubstituteSpec):
    """``draft=subspec``, with ``draft.proposer`` in front of it if there is one."""

    def __init__(self, context: DraftContext) -> None:
        self._proposer: DraftSpec | None = None
        if found := proposer_of(context.config):
            kind, config = found
            self._policy, self._proposed = context.policy, context.config.draft.proposed
            sizes = GuessPolicy(context.policy, self._proposed)
            self._proposer = kind(replace(context, policy=sizes, config=config, quantizer=None))
            # The substitute's kernels are chosen for the rows of a pass, too.
            self._passes = passes_of(context.policy, self._proposed)
            context = replace(context, policy=self._passes if context.device.type == "cuda" else sizes)
        super().__init__(context)

    @classmethod
    def serves_texts(cls, config: Config) -> bool:
        return proposer_of(config) is None

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        draft = config.draft
        if draft.proposer_path is not None and draft.proposer in (Proposer.none, Proposer.prompt_lookup):
            raise ConfigError(
                f"draft.proposer_path={draft.proposer_path}: draft.proposer={draft.proposer.value} has no weights: "
                "leave it at null"
            )
        if isinstance(config.offload, StreamOffloadConfig) and draft.proposer is Proposer.small_model:
            raise ConfigError(
                "draft.proposer=small_model: beside a target that streams a small model runs whole levels, "
                "and a proposer single nodes: set draft.proposer=eagle2, eagle3, prompt_lookup or none, or offload=none"
            )
        _ask_proposer(config, lambda kind, own: kind.check(own))

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        super().check_target(config, model)
        _ask_proposer(config, lambda kind, own: kind.check_target(own, model))

    @classmethod
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        _ask_proposer(config, lambda kind, own: kind.check_files(own, model, note))

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        other = _ask_proposer(config, lambda kind, own: kind.weights_identity(own, note))
        return "+".join(filter(None, (super().weights_identity(config, note), other))) or None

    @classmethod
    def memory(cls, inputs: SizingInputs) -> DraftMemory:
        found = proposer_of(inputs.config)
        if found is None:
            return super().memory(inputs)
        proposed, on_disk = inputs.config.draft.proposed, streams_from_disk(inputs.config)
        sizes = GuessPolicy(inputs.policy, proposed)
        passes = sizes if on_disk else passes_of(inputs.policy, proposed)
        own = super().memory(replace(inputs, policy=passes))
        with reworded(_about_proposer):
            other = found[0].memory(replace(inputs, config=found[1], policy=sizes))
        rows = passes.draft_rows if on_disk else passes.capacity
        return CascadeMemory(own, other, rows, sizes.capacity)

    def prepare(self) -> None:
        super().prepare()
        if self._proposer is not None:
            with reworded(_about_proposer):
                self._proposer.prepare()

    def build(self, target: TargetModel) -> BuiltDraft:
        built = super().build(target)
        if self._proposer is None:
            return built
        proposer: BuiltDraft | None = None
        if not isinstance(self._proposer, PromptLookupSpec):  # the cascade's own index knows as much
            with reworded(_about_proposer):
                proposer = self._proposer.build(target)
        own, device = built.draft, target.device
        if isinstance(own, CapturedDraft):
            levels: KnownLevels = PaddedLevels(own, self._passes.width, self._passes.max_depth, device)
        else:
            levels = KnownLevels(own, GuessPolicy(self._policy, self._proposed).draft_rows, device)
        guesses = None if proposer is None else proposer.draft
        draft = CascadeDraft(levels, own.temperature, guesses, self._policy, self._proposed, target.vocab_size)
        name = self._proposer.context.config.draft.name
        facts = {
            "draft": name,
            "proposed": self._proposed,
            **({"longest": CONTEXT} if proposer is None else proposer.facts),
        }
        known = f"contexts of up to {CONTEXT} tokens" if proposer is None else proposer.summary
        summary = f"{self._proposed} nodes a pass or more, if rows are left, are proposed by {name}, {known}"
        return replace(built, draft=draft, facts={**built.facts, "proposer": facts}, summary=summary)


class CascadeMemory(DraftMemory):
    """A substitute and its proposer.

    Args:
        own, other: their memory.
        rows: of the draft region.
        nodes: that the substitute may run in a tree.
    """

    def __init__(self, own: DraftMemory, other: DraftMemory, rows: int, nodes: int) -> None:
        self._proposer = other
        self.allocations = (
            *own.allocations,
            *other.allocations,
            Allocation("proposals", ((tree_bytes(rows), 1), (tree_bytes(nodes), 1)), "trees of passes and of nodes"),
        )
        self.required_resident, self.required_by = own.required_resident, own.required_by
        self.shared_rows, self.captured = rows, own.captured
        self.library = own.library or other.library
        self.library_levels = own.library_levels or (other.captured and other.library_levels)
        self.level, self.read = own.level + other.level, own.read + other.read
        self.workspaces, self.states = {**own.workspaces, **other.workspaces}, other.states

    def prompt_bytes(self, chunk: int) -> int:
        return self._proposer.prompt_bytes(chunk)


def passes_of(policy: TreePolicy, proposed: int) -> Beam:
    """A tree whose levels are the passes of a cascade: at most one per level, with rows for all that it may run."""
    return Beam(policy.max_depth, round_up(policy.width + proposed, 8))
