"""Predictions: tokens per second from a card, a target and a measured acceptance, before anything is bought or loaded.

``python -m subspec.predict target=qwen2_5_7b offload.vram_gib=8 card=rtx_4090 tau=26``. The arithmetic is in
:mod:`subspec.planning.predict_timing`, acceptance over depths in :mod:`subspec.planning.acceptance`; what lies where
comes from the planner. As a library::

    from subspec.predict import Acceptance, Machine, predict

    found = predict(config, model_config, Machine(25.0, 1008.0), Acceptance.from_tau(26, depth=48))
    depth, way = found.best
"""

from subspec.planning.acceptance import Acceptance
from subspec.planning.predict import Depth, Prediction, predict
from subspec.planning.predict_timing import Iteration, Machine

__all__ = ["Acceptance", "Depth", "Iteration", "Machine", "Prediction", "predict"]
