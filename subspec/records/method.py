"""Labels of a run: its method and its group, the same in tables, plots and Weights & Biases."""

from collections.abc import Mapping
from typing import Any

QUANTIZED_DRAFTS = ("subspec",)
"""Drafts that ``quant`` quantizes, for runs whose facts do not say."""


def method_label(config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> str:
    """Draft, quantizer, tree, offloading and texts at a time: ``subspec hqq4, beam 48x6, stream 8 GiB, 8 texts``.

    Args:
        config: the resolved configuration, as in ``config.yaml``; missing parts are left out.
        facts: the run's ``facts.json``, which says whether a draft was quantized.
    """
    draft = config_group(config, "draft")
    name = str(draft.get("name") or "unknown draft")
    if name == "none":
        parts = ["plain decoding"]
    else:
        quant = quant_label(config, facts)
        parts = [f"{name} {quant}" if quant else name, _tree(config_group(config, "tree"))]
    parts.append(_offload(config, facts))
    if config_group(config, "decoding").get("name") == "sampling":
        parts.append(f"sampling T={_number(config_group(config, 'decoding').get('temperature'))}")
    # The facts hold the number that auto resolved to.
    texts = (facts or {}).get("texts", config_group(config, "decoding").get("texts", 1))
    parts.append(f"{texts} texts" if texts != 1 else "")
    return ", ".join(part for part in parts if part)


def quant_label(config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> str:
    """``hqq4``; empty if nothing is quantized."""
    if not is_quantized(config, facts):
        return ""
    quant = config_group(config, "quant")
    name, bits = quant.get("name"), quant.get("bits")
    if name in (None, "none"):
        return ""
    return f"{name}{_number(bits)}" if bits is not None else str(name)


def is_quantized(config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bool:
    """Whether the draft is a quantized model."""
    if facts and "substitute" in facts:
        return facts["substitute"] is not None
    return config_group(config, "draft").get("name") in QUANTIZED_DRAFTS


def group_name(config: Mapping[str, Any]) -> str | None:
    """The experiment of a run; None without one."""
    experiment = config.get("experiment")
    return str(experiment) if experiment else None


def config_group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of a configuration; empty if the file holds something else there."""
    group = config.get(name)
    return group if isinstance(group, Mapping) else {}


def _tree(tree: Mapping[str, Any]) -> str:
    name, depth, width = tree.get("name"), tree.get("depth"), tree.get("width")
    if not name:
        return ""
    size = f"{depth}" if name == "chain" or width is None else f"{depth}x{width}"
    return f"{name} {size}"


def _offload(config: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str:
    """``stream 8 GiB``, ``stream coded 8 GiB`` if the exact weights were streamed coded, ``disk 8 GiB`` on a CPU, or
    ``stream 8 GiB, disk beyond 4 GiB of RAM``."""
    offload = config_group(config, "offload")
    name = offload.get("name")
    if name in (None, "none"):
        return ""
    if _from_disk(config):
        name = "disk"
    elif "codec" in offload:
        codec = (facts or {}).get("codec", offload["codec"])  # the facts hold the value that auto resolved to
        name = "stream coded" if codec == "substitute" else "stream"
    beyond = ""
    if name != "disk" and (facts or {}).get("disk"):
        beyond = f", disk beyond {_number(offload.get('ram_gib'))} GiB of RAM"
    return f"{name} {budget_text(config, facts)}".rstrip() + beyond


def _from_disk(config: Mapping[str, Any]) -> bool:
    """Whether the target streams from a disk to a CPU."""
    return config.get("device") == "cpu" and str(config_group(config, "offload").get("name")).startswith("stream")


def budget_text(config: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str:
    """``8 GiB``, or ``8 GiB with CUDA`` if the budget bounds CUDA's own memory too; empty without a budget.

    Of host memory if the target streams from a disk.
    """
    offload = config_group(config, "offload")
    if _from_disk(config):
        ram = offload.get("ram_gib")
        return "" if ram is None else f"{_number(ram)} GiB"
    vram = (facts or {}).get("vram_gib", offload.get("vram_gib"))  # the facts hold the value that auto resolved to
    if vram is None:
        return ""
    return f"{_number(vram)} GiB" + " with CUDA" * (offload.get("vram_counts") == "device")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
