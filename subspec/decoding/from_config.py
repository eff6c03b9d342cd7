"""From the configuration to what the engine is told: the target's distribution and the shape of the draft's trees.

Apart from :mod:`subspec.session`, which builds whole runs, because the planner asks the same of a configuration.
"""

from subspec.config.schema import (
    AdaptiveTreeConfig,
    BeamTreeConfig,
    Config,
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


def build_tree_policy(tree: TreeConfig) -> TreePolicy:
    """The draft tree's shape."""
    if isinstance(tree, AdaptiveTreeConfig):
        return Adaptive(
            tree.depth,
            tree.width,
            level_cost=tree.level_cost,
            check_every=tree.check_every,
            min_depth=tree.min_depth,
        )
    if isinstance(tree, BeamTreeConfig):
        return Beam(tree.depth, tree.width)
    if isinstance(tree, Eagle2TreeConfig):
        return Eagle2(tree.depth, tree.width, tree.total_tokens)
    return Beam(tree.depth, width=1)
