"""From the configuration to what the engine is told: the target's distribution and the shape of the draft's trees.

Apart from :mod:`subspec.assemble`, which builds whole runs, because the planner asks the same of a configuration.
"""

from subspec.config import (
    AdaptiveTreeConfig,
    BeamTreeConfig,
    Config,
    Eagle2TreeConfig,
    SamplingConfig,
    TreeConfig,
)
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.growth import Beam, Growth
from subspec.decoding.sampling import Sampling


def build_sampling(config: Config) -> Sampling:
    """The target's distribution."""
    decoding = config.decoding
    if isinstance(decoding, SamplingConfig):
        return Sampling(decoding.temperature, decoding.top_k, decoding.top_p)
    return Sampling()


def build_growth(tree: TreeConfig) -> Growth:
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
