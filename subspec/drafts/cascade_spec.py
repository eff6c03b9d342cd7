"""The specification of ``draft=subspec``, with or without ``draft.proposer``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

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
from subspec.decoding.draft import LevelDraft
from subspec.decoding.target_model import TargetModel
from subspec.drafts.cascade import CascadeDraft, GuessPolicy
from subspec.drafts.eagle import EagleSpec
from subspec.drafts.prompt_lookup import PromptLookupSpec
from subspec.drafts.small_model import SmallModelSpec
from subspec.drafts.spec import BuiltDraft, DraftContext, DraftSpec
from subspec.drafts.substitute import SubstituteSpec
from subspec.errors import ConfigError, SubspecError
from subspec.utils.console import Note

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
    if settings is PromptLookupDraftConfig:
        options["shortest"] = 1  # a wrong guess costs only a row
    else:
        options["path"] = draft.proposer_path
    return kind, replace(config, draft=settings(**options))


@contextmanager
def _about_proposer() -> Iterator[None]:
    """Name the proposer's keys in its own messages."""
    try:
        yield
    except SubspecError as error:
        text = str(error).replace("draft.path", "draft.proposer_path")
        raise type(error)(re.sub(r"\bdraft=(?!subspec)", "draft.proposer=", text)) from error


class CascadeSpec(SubstituteSpec):
    """``draft=subspec``, with ``draft.proposer`` in front of it if there is one."""

    def __init__(self, context: DraftContext) -> None:
        self._proposer: DraftSpec | None = None
        if found := proposer_of(context.config):
            kind, config = found
            assert isinstance(context.config.draft, SubstituteDraftConfig)
            self._policy, self._proposed = context.policy, context.config.draft.proposed
            # The substitute's kernels are chosen for the rows of a pass, too.
            context = replace(context, policy=GuessPolicy(context.policy, self._proposed))
            self._proposer = kind(replace(context, config=config, quantizer=None))
        super().__init__(context)

    @classmethod
    def serves_texts(cls, config: Config) -> bool:
        return proposer_of(config) is None

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        draft, found = config.draft, proposer_of(config)
        path = getattr(draft, "proposer_path", None)
        if path is not None and (found is None or draft.proposer is Proposer.prompt_lookup):
            raise ConfigError(
                f"draft.proposer_path={path}: draft.proposer={draft.proposer.value} has no weights: leave it at null"
            )
        if found is None:
            return
        if isinstance(config.offload, StreamOffloadConfig):
            raise ConfigError(
                f"draft.proposer={draft.proposer.value}: offload=stream captures whole levels, and a proposer adds "
                "single nodes: set draft.proposer=none, or offload=none"
            )
        with _about_proposer():
            found[0].check(found[1])

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        super().check_target(config, model)
        if found := proposer_of(config):
            with _about_proposer():
                found[0].check_target(found[1], model)

    @classmethod
    def check_files(cls, config: Config, model: PretrainedConfig, note: Note) -> None:
        if found := proposer_of(config):
            with _about_proposer():
                found[0].check_files(found[1], model, note)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        own = super().weights_identity(config, note)
        if found := proposer_of(config):
            with _about_proposer():
                own = "+".join(filter(None, (own, found[0].weights_identity(found[1], note)))) or None
        return own

    def prepare(self) -> None:
        super().prepare()
        if self._proposer is not None:
            with _about_proposer():
                self._proposer.prepare()

    def build(self, target: TargetModel) -> BuiltDraft:
        built = super().build(target)
        if self._proposer is None:
            return built
        assert isinstance(built.draft, LevelDraft)
        with _about_proposer():
            proposer = self._proposer.build(target)
        draft = CascadeDraft(built.draft, proposer.draft, self._policy, self._proposed, target.device)
        name = self._proposer.context.config.draft.name
        own = {"draft": name, "proposed": self._proposed, **proposer.facts}
        summary = f"up to {self._proposed} nodes a pass are proposed by {name}, {proposer.summary}"
        return replace(built, draft=draft, facts={**built.facts, "proposer": own}, summary=summary)

    def _take_whole(self, target: TargetModel, draft: SubstituteDraftConfig) -> str | None:
        """Captured levels are whole, and a proposer adds single nodes."""
        if self._proposer is not None:
            return f"draft.proposer={draft.proposer.value}"
        return super()._take_whole(target, draft)
