"""From ``draft=...`` to the object that drafts: which builder builds which kind."""

from subspec.config.schema import (
    DraftConfig,
    Eagle2DraftConfig,
    LayerSkipDraftConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.drafts.base import DraftBuilder
from subspec.drafts.build_eagle import EagleBuilder
from subspec.drafts.build_layer_skip import LayerSkipBuilder
from subspec.drafts.build_small_model import SmallModelBuilder
from subspec.drafts.build_substitute import SubstituteBuilder
from subspec.errors import ConfigError

BUILDERS: dict[type[DraftConfig], type[DraftBuilder]] = {
    SubstituteDraftConfig: SubstituteBuilder,
    Eagle2DraftConfig: EagleBuilder,
    SmallModelDraftConfig: SmallModelBuilder,
    LayerSkipDraftConfig: LayerSkipBuilder,
}
"""By the class of ``draft``'s configuration; ``draft=none`` has nothing to build."""


def draft_builder(draft: DraftConfig) -> DraftBuilder:
    """The builder of ``draft``.

    Raises:
        ConfigError: there is none.
    """
    if type(draft) not in BUILDERS:
        raise ConfigError(f"draft={draft.name}: nothing here builds such a draft")
    return BUILDERS[type(draft)]()
