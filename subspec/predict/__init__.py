"""Predictions: tokens per second from a card, a target and a measured acceptance, before anything is bought or loaded.

``python -m subspec.predict target=qwen2_5_7b offload.vram_gib=8 card=rtx_4090 tau=26``. The arithmetic is in
:mod:`subspec.planning.predict_timing`, acceptance over depths in :mod:`subspec.planning.acceptance`; what lies where
comes from the planner. As a library::

    from subspec.predict import Acceptance, Machine, predict

    found = predict(config, model_config, Machine(25.0, 1008.0), Acceptance.from_tau(26, depth=48))
    found.best.depth, found.best.iteration.tokens_per_s
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspec.planning.acceptance import Acceptance
    from subspec.planning.predict import Depth, Prediction, predict
    from subspec.planning.predict_timing import Iteration, Machine

__all__ = ["Acceptance", "Depth", "Iteration", "Machine", "Prediction", "predict"]

_MODULES = {"Acceptance": "acceptance", "Iteration": "predict_timing", "Machine": "predict_timing"}


def __getattr__(name: str) -> Any:
    # Lazily: the command's help needs neither torch nor transformers.
    if name in __all__:
        return getattr(import_module(f"subspec.planning.{_MODULES.get(name, 'predict')}"), name)
    raise AttributeError(f"module 'subspec.predict' has no attribute {name!r}")
