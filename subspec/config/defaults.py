"""Defaults that depend on other keys.

``tree=adaptive``, the default, finds the depth by the times of levels and passes that it measures. Its limits are the
paper's 48 x 6 if the target is streamed, because a pass then takes as long as dozens of levels, else 16 x 4; on a CPU,
where every row of a pass costs time, 16 x 1 (``experiments/cpu``), or 16 x 4 if the target streams from a disk, whose
reads hide that time. The YAML files of trees hold interpolations, which composing resolves:
``depth: ${streamed_tree:depth,16}``.
"""

from datetime import datetime

from omegaconf import DictConfig, OmegaConf

STREAMED_TREES = {
    "subspec": {"depth": 48, "width": 6, "check_every": 2},
    "small_model": {"depth": 32, "width": 6, "check_every": 2},
}
"""Trees for a streamed target by draft: settings of SubSpec (arXiv 2509.18344) and of its small-model baseline."""

STREAMED_OTHERS = {"depth": 16, "width": 4, "check_every": 2}
"""Of other drafts, whose deep levels are rarely accepted; on a CPU of all drafts, because a pass over many rows
takes longer there than reading the layers from a disk."""


MOST_TEXTS = 8
"""Texts side by side with ``decoding.texts=auto``, at most: the time of a pass over more trees grows with them."""


def streamed_tree(key: str, otherwise: int | None, *, _root_: DictConfig) -> int | None:
    """``key`` of the tree for a streamed target and this draft, or ``otherwise``."""
    offload, draft = (OmegaConf.select(_root_, f"{group}.name") for group in ("offload", "draft"))
    if not str(offload).startswith("stream"):
        return otherwise
    if str(_root_.get("device")) in ("cpu", "Device.cpu"):
        return STREAMED_OTHERS[key]
    return STREAMED_TREES.get(str(draft), STREAMED_OTHERS)[key]


def whole_tree(device_type: str) -> dict[str, int]:
    """Defaults of an adaptive tree if the target is whole on a device. On a CPU drafting may not pay."""
    return {"width": 1, "min_depth": 0} if device_type == "cpu" else {"width": 4, "min_depth": 1}


def fill_tree(cfg: DictConfig, device_type: str) -> None:
    """Set ``tree.width`` and ``tree.min_depth`` where they are null, so that the run's record has the numbers."""
    for key, default in whole_tree(device_type).items():
        if key in cfg.tree and cfg.tree[key] is None:
            cfg.tree[key] = default


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
