"""``offload=accelerate``: Hugging Face accelerate's CPU offloading, a baseline.

Exact weights, engine and budget are the same; accelerate chooses which modules stay on the device and how the others
get there (``infer_auto_device_map`` and ``dispatch_model``).
"""

from typing import Any

import torch

from subspec.decoding.target_model import TargetModel
from subspec.errors import SubspecError
from subspec.targets.meta_model import count_parameters
from subspec.targets.source import LayerSource, build_model


def host_bytes(source: LayerSource, weight_bytes: int) -> int:
    """Bytes of weights that host memory holds at the same time; with less of it a run would swap.

    The model is built on the host, then accelerate moves up to ``weight_bytes`` of it to the device. Planted weights
    are all in memory at once; those of a checkpoint are views of its file, so the share that moves costs no memory.
    """
    whole = count_parameters(source.config) * source.dtype.itemsize
    return whole if source.planted else max(0, whole - weight_bytes)


class AccelerateTarget(TargetModel):
    """Runs a model that accelerate has dispatched, with up to ``weight_bytes`` of weights on the device."""

    def __init__(self, source: LayerSource, device: torch.device, weight_bytes: int) -> None:
        from accelerate import dispatch_model, infer_auto_device_map

        model = build_model(source, torch.device("cpu"))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # temporaries of planted weights
        super().__init__(model)
        index = device.index or 0
        placement = infer_auto_device_map(
            model, max_memory={index: weight_bytes, "cpu": 1 << 60}, no_split_module_classes=model._no_split_modules
        )
        placed = set(placement.values())
        if "disk" in placed:
            raise SubspecError("offload=accelerate would put weights on disk: this machine has too little memory")
        self.modules_on_device = sum(place == index for place in placement.values())
        self.modules_offloaded = len(placement) - self.modules_on_device
        # Parameters of dispatched modules are on the meta device between uses.
        self.dtype, self.device = source.dtype, device
        self.model = dispatch_model(model, placement, main_device=index)

    def facts(self) -> dict[str, Any]:
        return {"modules_on_device": self.modules_on_device, "modules_offloaded": self.modules_offloaded}
