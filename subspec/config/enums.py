"""Enums of the schema (:mod:`subspec.config.schema`)."""

from enum import Enum

AUTO = "auto"
"""Value of keys that are otherwise numbers or true and false."""


class Device(Enum):
    """Device of the run; ``auto`` is CUDA if there is a GPU. Records hold the resolved device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    """Arithmetic of the target; ``auto`` is float32 on a CPU and bfloat16 on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Source(Enum):
    """Source of a benchmark's prompts."""

    auto = "auto"
    hub = "hub"
    file = "file"
    sample = "sample"


class Placement(Enum):
    """Location of the embedding table; ``auto`` lets the planner decide."""

    auto = "auto"
    device = "device"
    host = "host"


class Profile(Enum):
    """Recordings besides metrics: ``timeline`` writes a trace and a picture of a few iterations."""

    none = "none"
    timeline = "timeline"


class Objective(Enum):
    """Total of the summary that a search maximises."""

    tokens_per_s = "tokens_per_s"
    tokens_per_s_total = "tokens_per_s_total"
    tokens_per_s_together = "tokens_per_s_together"
    tau = "tau"


class WandbMode(Enum):
    """``auto`` is online with a key and a network, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


class Unpack(Enum):
    """Whether the substitute is unpacked into plain Linears after quantization (same values, no packed kernel)."""

    auto = "auto"
    always = "always"
    never = "never"


class Proposer(Enum):
    """The draft that proposes nodes to the substitute, named as in ``conf/draft``."""

    none = "none"
    prompt_lookup = "prompt_lookup"
    small_model = "small_model"
    eagle2 = "eagle2"
    eagle3 = "eagle3"


class Kernel(Enum):
    """What computes a draft level's quantized Linears; ``auto`` takes the fastest here, and the record says which."""

    auto = "auto"
    int4_mma = "int4_mma"
    gemlite = "gemlite"
    lut_mma = "lut_mma"


class HiggsKernel(Enum):
    """What computes the Linears of ``quant=higgs``; ``auto`` takes the fastest that runs here, and the record says
    which."""

    auto = "auto"
    reference = "reference"
    lut_mma = "lut_mma"
    flute = "flute"


class Hadamard(Enum):
    """What rotates the inputs of ``quant=higgs``; ``library`` is ``fast_hadamard_transform``."""

    auto = "auto"
    library = "library"


class Cache(Enum):
    """Cache on disk of data that takes long to make; ``auto``: if there is room for it."""

    auto = "auto"
    off = "off"


class VramCounts(Enum):
    """What ``offload.vram_gib`` bounds: all device memory of the run, or PyTorch's allocations alone."""

    device = "device"
    allocator = "allocator"


class Codec(Enum):
    """Form of streamed exact weights: uncoded, or coded given the substitute on the device."""

    auto = "auto"
    none = "none"
    substitute = "substitute"
