"""Parts of a configuration that have no effect in it, so that runs which differ only there are one run."""

from collections.abc import Mapping
from typing import Any

from subspec.config.enums import AUTO, Codec, VramCounts
from subspec.config.quant_checks import USUAL_MODULES


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration (builtin types) without the parts that have no effect.

    Plain decoding has no tree. ``quant`` applies to the draft, and to the weights that ``offload.codec=substitute``
    streams. Configurations of earlier versions have no ``offload.vram_counts``; their budgets counted the allocator.
    Without a proposer its keys are left out, too. ``quant.modules: null`` is the list that it stands for, unless a plan
    may add the LM head (:func:`subspec.codec.coding.draft_head`).
    """
    draft, offload = (config.get(group) or {} for group in ("draft", "offload"))
    idle = {"tree"} if draft.get("name") == "none" else set()
    if draft.get("name") != "subspec" and not draft.get("quantize") and offload.get("codec") != "substitute":
        idle.add("quant")
    kept = {key: value for key, value in config.items() if key not in idle}
    if offload.get("vram_counts") == VramCounts.allocator.value:
        kept["offload"] = {key: value for key, value in offload.items() if key != "vram_counts"}
    if draft.get("proposer") == "none":
        kept["draft"] = {key: value for key, value in draft.items() if not key.startswith("propose")}
    quant = kept.get("quant") or {}
    if "modules" in quant and quant["modules"] is None and not may_add_head(config):
        kept["quant"] = {**quant, "modules": [*USUAL_MODULES]}
    return kept


def may_add_head(config: Mapping[str, Any]) -> bool:
    """Whether a plan may give the draft an LM head of its own, which ``quant.modules: null`` leaves open.

    Args:
        config: of builtin types or with enumerations.
    """

    def said(group: str, key: str) -> Any:
        value = (config.get(group) or {}).get(key)
        return getattr(value, "value", value)

    streams = said("offload", "name") == "stream" and said("offload", "codec") != Codec.none.value
    drafts = said("draft", "name") == "subspec" and said("draft", "vocab") is None
    return streams and drafts and said("quant", "name") == "hqq" and said("decoding", "texts") in (1, AUTO)
