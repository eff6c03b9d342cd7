"""The kinds of draft."""

from subspec.config.schema import (
    BlockHeadDraftConfig,
    DraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    PardDraftConfig,
    PromptLookupDraftConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.drafts.block_draft import BlockSpec
from subspec.drafts.cascade_spec import CascadeSpec
from subspec.drafts.eagle import EagleSpec
from subspec.drafts.layer_skip import LayerSkipSpec
from subspec.drafts.pard import PardSpec
from subspec.drafts.prompt_lookup import PromptLookupSpec
from subspec.drafts.small_model import SmallModelSpec
from subspec.drafts.spec import DraftSpec
from subspec.errors import ConfigError

SPECS: dict[type[DraftConfig], type[DraftSpec]] = {
    SubstituteDraftConfig: CascadeSpec,
    Eagle2DraftConfig: EagleSpec,
    Eagle3DraftConfig: EagleSpec,
    BlockHeadDraftConfig: BlockSpec,
    SmallModelDraftConfig: SmallModelSpec,
    PardDraftConfig: PardSpec,
    LayerSkipDraftConfig: LayerSkipSpec,
    PromptLookupDraftConfig: PromptLookupSpec,
}
"""By the class of the configuration. ``draft=none`` has no spec."""


def spec_of(draft: DraftConfig) -> type[DraftSpec] | None:
    """The kind of a configured draft; None for ``draft=none``.

    Raises:
        ConfigError: an unknown class of configuration.
    """
    if isinstance(draft, NoDraftConfig):
        return None
    if type(draft) not in SPECS:
        raise ConfigError(f"draft={draft.name} has no entry in subspec.drafts.registry.SPECS: add one")
    return SPECS[type(draft)]
