"""The target's distribution and the tree policy of a configuration, for sessions and the planner."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from subspec.config.schema import (
    AdaptiveTreeConfig,
    BeamTreeConfig,
    ChainTreeConfig,
    Config,
    DecodingConfig,
    Eagle2TreeConfig,
    SamplingConfig,
    TreeConfig,
)
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree_policy import Beam, TreePolicy


def build_sampling(config: Config) -> Sampling:
    """The target's distribution."""
    decoding = config.decoding
    if isinstance(decoding, SamplingConfig):
        return Sampling(decoding.temperature, decoding.top_k, decoding.top_p)
    return Sampling()


def for_any_sampling(config: Config) -> Config:
    """``config`` with the distribution that takes the most memory, for a plan that holds whatever a text asks for."""
    kept = {field.name: getattr(config.decoding, field.name) for field in fields(DecodingConfig)}
    return replace(config, decoding=SamplingConfig(**kept, temperature=1.0, top_k=1, top_p=0.5))


POLICIES: dict[type[TreeConfig], Callable[[Any], TreePolicy]] = {
    ChainTreeConfig: lambda tree: Beam(tree.depth, width=1),
    BeamTreeConfig: lambda tree: Beam(tree.depth, tree.width),
    AdaptiveTreeConfig: lambda tree: Adaptive(
        tree.depth,
        tree.width,
        level_cost=tree.level_cost,
        check_every=tree.check_every,
        min_depth=1 if tree.min_depth is None else tree.min_depth,
    ),
    Eagle2TreeConfig: lambda tree: Eagle2(tree.depth, tree.width, tree.total_tokens),
}
"""By the class of ``tree``'s configuration."""


def build_tree_policy(tree: TreeConfig) -> TreePolicy:
    """The draft tree's shape."""
    return POLICIES[type(tree)](tree)
