"""The kinds of draft."""

from subspec.config import schema
from subspec.drafts.block_draft import BlockSpec
from subspec.drafts.cascade_spec import CascadeSpec
from subspec.drafts.eagle import EagleSpec
from subspec.drafts.layer_skip import LayerSkipSpec
from subspec.drafts.pard import PardSpec
from subspec.drafts.prompt_lookup import PromptLookupSpec
from subspec.drafts.small_model import SmallModelSpec
from subspec.drafts.spec import DraftSpec
from subspec.errors import ConfigError

SPECS: dict[type[schema.DraftConfig], type[DraftSpec]] = {
    schema.SubstituteDraftConfig: CascadeSpec,
    schema.Eagle2DraftConfig: EagleSpec,
    schema.Eagle3DraftConfig: EagleSpec,
    schema.BlockHeadDraftConfig: BlockSpec,
    schema.SmallModelDraftConfig: SmallModelSpec,
    schema.PardDraftConfig: PardSpec,
    schema.LayerSkipDraftConfig: LayerSkipSpec,
    schema.PromptLookupDraftConfig: PromptLookupSpec,
}
"""By the class of the configuration. ``draft=none`` has no spec."""


def spec_of(draft: schema.DraftConfig) -> type[DraftSpec] | None:
    """The kind of a configured draft; None for ``draft=none``.

    Raises:
        ConfigError: an unknown class of configuration.
    """
    if isinstance(draft, schema.NoDraftConfig):
        return None
    if type(draft) not in SPECS:
        raise ConfigError(f"draft={draft.name} has no entry in subspec.drafts.registry.SPECS: add one")
    return SPECS[type(draft)]
