"""The size of a tree that nobody named: small where the whole target is at hand, the paper's where it streams.

A pass over a streamed target costs as much as dozens of draft levels, so a deep tree pays there and nowhere else. The
YAML files of the trees say so by an interpolation, ``depth: ${streamed_tree:depth,16}``, which Hydra resolves when
everything is composed: records and plans hold the number.
"""

from omegaconf import DictConfig, OmegaConf

PAPER_TREES = {"subspec": {"depth": 48, "width": 6}, "small_model": {"depth": 32, "width": 6}}
"""By draft: the settings of SubSpec (arXiv 2509.18344) and of its small-model baseline. Other drafts are not accepted
that far."""


def streamed_tree(key: str, otherwise: int, *, _root_: DictConfig) -> int:
    """``key`` (``depth`` or ``width``) of the paper's tree for this configuration's draft, or ``otherwise``."""
    offload, draft = (OmegaConf.select(_root_, f"{group}.name") for group in ("offload", "draft"))
    if not str(offload).startswith("stream"):
        return otherwise
    return PAPER_TREES.get(str(draft), {}).get(key, otherwise)


def register_streamed_tree() -> None:
    """Make ``${streamed_tree:...}`` known to OmegaConf. Safe to call more than once."""
    OmegaConf.register_new_resolver("streamed_tree", streamed_tree, replace=True)
