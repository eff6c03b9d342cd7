"""Defaults that depend on other keys: interpolations in the configuration, which composing resolves.

Default tree size: 16 x 4 if the target fits on the device, the paper's 48 x 6 if it is streamed to a GPU. A pass over a
streamed target takes as long as dozens of draft levels, so that deep trees pay only there; not on a CPU, which computes
more slowly than its disk reads. The YAML files of trees hold
``depth: ${streamed_tree:depth,16}``.
"""

from datetime import datetime

from omegaconf import DictConfig, OmegaConf

PAPER_TREES = {"subspec": {"depth": 48, "width": 6}, "small_model": {"depth": 32, "width": 6}}
"""Settings of SubSpec (arXiv 2509.18344) and of its small-model baseline, by draft. Deep levels of other drafts are
rarely accepted."""


def streamed_tree(key: str, otherwise: int, *, _root_: DictConfig) -> int:
    """``key`` (``depth`` or ``width``) of the paper's tree for a streamed target and this draft, or ``otherwise``."""
    offload, draft = (OmegaConf.select(_root_, f"{group}.name") for group in ("offload", "draft"))
    if not str(offload).startswith("stream") or str(_root_.get("device")) in ("cpu", "Device.cpu"):
        return otherwise
    return PAPER_TREES.get(str(draft), {}).get(key, otherwise)


def default_samples(otherwise: int, per_category: int | None) -> int | None:
    """Default of ``benchmark.max_samples``: no limit beside ``benchmark.per_category``."""
    return otherwise if per_category is None else None


def register_resolvers() -> None:
    """Register the interpolations with OmegaConf. Idempotent.

    ``started`` is Hydra's ``now`` with microseconds (``%f``): runs of the same second get different folders.
    """
    OmegaConf.register_new_resolver("streamed_tree", streamed_tree, replace=True)
    OmegaConf.register_new_resolver("default_samples", default_samples, replace=True)
    OmegaConf.register_new_resolver(
        "started", lambda pattern: datetime.now().strftime(pattern), use_cache=True, replace=True
    )
