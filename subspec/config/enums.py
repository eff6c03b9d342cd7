"""Enums of the schema (:mod:`subspec.config.schema`): keys that take one of a few words."""

from enum import Enum


class Device(Enum):
    """Where the run computes; ``auto`` takes CUDA when there is a card, and the record says which."""

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
    """Where a benchmark's prompts come from."""

    auto = "auto"
    hub = "hub"
    file = "file"
    sample = "sample"


class Placement(Enum):
    """Where a module that is only looked up lives; ``auto`` lets the planner decide."""

    auto = "auto"
    device = "device"
    host = "host"


class Profile(Enum):
    """What is recorded besides metrics: ``timeline`` writes a trace and a picture of a few iterations."""

    none = "none"
    timeline = "timeline"


class Objective(Enum):
    """What a search maximises: a total of the run's summary."""

    tokens_per_s = "tokens_per_s"
    tokens_per_s_total = "tokens_per_s_total"
    tau = "tau"


class WandbMode(Enum):
    """``auto`` is online with a key and a network, else offline (said and recorded)."""

    auto = "auto"
    online = "online"
    offline = "offline"


class Unpack(Enum):
    """Whether the substitute is unpacked into plain Linears after quantization (same values, no packed kernel)."""

    auto = "auto"
    always = "always"
    never = "never"


class Kernel(Enum):
    """What computes a draft level's quantized Linears; ``auto`` takes the fastest here, and the record says which."""

    auto = "auto"
    int4_mma = "int4_mma"
    tinygemm = "tinygemm"
    gemlite = "gemlite"
    triton_wq = "triton_wq"
    lut_mma = "lut_mma"
    lut_triton = "lut_triton"


class HiggsKernel(Enum):
    """What computes the Linears of ``quant=higgs``; ``auto`` takes the fastest that runs here, and the record says
    which."""

    auto = "auto"
    reference = "reference"
    lut_triton = "lut_triton"
    lut_mma = "lut_mma"
    flute = "flute"


class Hadamard(Enum):
    """What rotates the inputs of ``quant=higgs``; ``library`` is ``fast_hadamard_transform``."""

    auto = "auto"
    library = "library"


class Cache(Enum):
    """Whether something that takes long to make is kept on disk: ``auto`` where there is room for it."""

    auto = "auto"
    off = "off"


class Codec(Enum):
    """How exact weights cross the link: as they are, or coded by what the substitute on the device knows of them."""

    auto = "auto"
    none = "none"
    substitute = "substitute"
