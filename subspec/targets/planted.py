"""Planted targets: exact shapes of real models with made-up weights, for speed without a checkpoint.

They are no language models, and every figure measured with one says so. The work per token is real. Acceptance
is realistic, because a 4-bit substitute and the target differ by real quantization noise.

Decoder weights are N(0, 0.02). The hidden state behind the last layer is the token's embedding (rms e) plus the
output of the layers (rms s), which is noise to the LM head. The LM head plants a next-token map pi: its row of
pi(t) is the embedding of t as a unit vector. In units of the other tokens' logits, which are N(0, 1) after the
final norm, the logit of pi(t) is

    z = sqrt(hidden) * r / sqrt(1 + r^2),    r = e / s

It wins while z exceeds the largest of vocabulary-many normal numbers, about m (4.4 for 152064). r = 1/4 gives z
= 14.5 for a 7B model: no quantization noise overturns that. So for ``hard_share`` of the tokens the row of the
successor is scaled down until z = m: there the planted token wins or loses narrowly against a random rival, and
the substitute sees the same race through its own noise. The scales:

* ``e = r * s``. s follows from the configuration, by propagating variances through one decoder layer
  (:func:`layers_rms`). r is 1/4 where the model is wide enough for a safe z, and larger for the tiny shapes.
* hard rows: ``m / z`` (0.30 for 7B, 0.25 for 14B and 32B). So the signal-to-noise ratio of easy and hard tokens
  does not depend on width, depth or vocabulary.
* all rows: at the substitute's default temperature of 0.2 its best guess at a hard token has a probability of
  about two thirds; the largest logits are then about 30, as in real models.

pi is one cycle through the whole vocabulary in random order, so a text has no short loops. No token ends a
text: lengths are equal for every draft.

Every tensor is a function of (seed, name, layer) alone, drawn by its own generator on the source's device: the
same bits at every call. CPUs and GPUs draw different numbers.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from subspec.config.schema import PlantedTargetConfig, SubstituteDraftConfig
from subspec.errors import ConfigError
from subspec.targets.planted_tokenizer import planted_tokenizer
from subspec.targets.source import LayerSource

EMBEDDING_SHARE = 0.25
"""r: rms of the embedding over rms of the layers' output, where the model is wide enough."""

SAFETY = 4.0
"""Least distance between an easy token's logit and the largest of the others, in units of theirs."""

ATTENTION_SHARE = 0.15
"""Share of a value's variance after attention's averaging (measured, 64 to 512 tokens of context)."""

DRAFT_TEMPERATURE = SubstituteDraftConfig.temperature
"""The substitute's default temperature."""

CHUNK_ROWS = 4096
"""Rows of the LM head computed in float32 at a time."""


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads",)


def _shape(family: type[PretrainedConfig], *sizes: int, theta: float = 1e4, **own: Any) -> PretrainedConfig:
    """A configuration without special tokens. ``sizes``: of :data:`SIZES`; ``own``: further keys."""
    settings: dict[str, Any] = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "tie_word_embeddings": False}
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return family(**(settings | dict(zip(SIZES, sizes, strict=True)) | own))


def _qwen2(*sizes: int, vocab: int = 152064, tied: bool = False) -> PretrainedConfig:
    """A published Qwen2.5 configuration (7B and larger: untied, padded vocabulary of 152064)."""
    own = {"max_position_embeddings": 32768, "tie_word_embeddings": tied, "use_sliding_window": False}
    return _shape(Qwen2Config, vocab, *sizes, theta=1e6, **own)


def _llama3(*sizes: int, factor: float, tied: bool = False) -> PretrainedConfig:
    """Llama-3.1 and 3.2, Instruct."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    own = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    return _shape(LlamaConfig, 128256, *sizes, 32, 8, tie_word_embeddings=tied, **own)


def _tiny(*sizes: int) -> PretrainedConfig:
    """Grouped attention with biases, 25 MB; its wider weights quantize as badly in few layers as 7B's in many."""
    return _shape(Qwen2Config, 4096, *sizes, 2, initializer_range=0.15, use_sliding_window=False)


def _tiny_tied() -> PretrainedConfig:
    own = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.15}
    return _shape(LlamaConfig, 1003, 192, 576, 3, 6, 6, **own)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_5_7b": lambda: _qwen2(3584, 18944, 28, 28, 4),
    "qwen2_5_14b": lambda: _qwen2(5120, 13824, 48, 40, 8),
    "qwen2_5_32b": lambda: _qwen2(5120, 27648, 64, 40, 8),
    "qwen2_5_1_5b": lambda: _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True),
    "qwen2_5_1_5b_untied": lambda: _qwen2(1536, 8960, 28, 12, 2),
    "llama3_1_8b": lambda: _llama3(4096, 14336, 32, factor=8.0),
    "llama3_2_1b": lambda: _llama3(2048, 8192, 16, factor=32.0, tied=True),
    "llama3_2_1b_untied": lambda: _llama3(2048, 8192, 16, factor=32.0),
    "tiny": lambda: _tiny(256, 512, 8, 8),
    "tiny_draft": lambda: _tiny(128, 256, 2, 4),
    "tiny_tied": _tiny_tied,
}
"""Configurations by name: the published ``config.json`` of Instruct models, and tiny ones for tests.

``tiny_draft`` is a small model for ``tiny``, with its vocabulary in a third of its weights. ``tiny_tied`` has tied
embeddings, plain attention, and a vocabulary that is no multiple of anything.

Small models are for ``draft.path=planted:SHAPE``. With the target's seed and vocabulary and an untied LM head, a small
model plants the target's map and agrees on easy tokens; a tied one agrees on none.
"""


def planted_config(config: PlantedTargetConfig) -> PretrainedConfig:
    """The model configuration of a planted target; ConfigError for a shape, share or seed that is none."""
    if config.shape not in SHAPES:
        raise ConfigError(f"target.shape={config.shape}: no such planted shape; use {', '.join(SHAPES)}")
    if not 0 <= config.hard_share <= 1:
        raise ConfigError(f"target.hard_share={config.hard_share}: a share lies between 0 and 1")
    if config.seed < 0:
        raise ConfigError(f"target.seed={config.seed}: must not be negative")
    return SHAPES[config.shape]()


class PlantedSource(LayerSource):
    """Draws its tensors on request.

    Args:
        config: shape, seed and share of hard tokens.
        dtype: of every tensor.
        device: on which numbers are drawn, whatever device they are requested for.

    Attributes:
        successor: int64 [vocabulary] on the CPU, the planted map pi; the same on every device.
        hard: bool [vocabulary] on the CPU, the tokens whose successor is hard to predict.

    With tied embeddings no map can be planted: the hidden state is most similar to the token itself. There
    ``successor`` is the identity, no token is hard, and acceptance means nothing.

    Raises:
        ConfigError: see :func:`planted_config`.
    """

    planted = True

    def __init__(self, config: PlantedTargetConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(planted_config(config))
        self.name, self.dtype, self.device = config.name, dtype, device
        self.shape, self.seed, self.hard_share = config.shape, config.seed, config.hard_share
        vocabulary = self.config.vocab_size
        self.tokenizer = planted_tokenizer(vocabulary, self.config.max_position_embeddings)
        self.source = (
            f"planted weights: shape {config.shape}, seed {config.seed}, hard share {config.hard_share}, "
            f"drawn on {device.type}"
        )
        self.scales = Scales(self.config)
        self.successor = torch.arange(vocabulary)
        self.hard = torch.zeros(vocabulary, dtype=torch.bool)
        meaning = "tied embeddings cannot plant a map, so acceptance means nothing"
        if not self.config.tie_word_embeddings:
            meaning = "acceptance comes from quantization noise"
            cpu = torch.device("cpu")
            order = torch.randperm(vocabulary, generator=self._generator("successor", cpu))
            self.successor[order] = order.roll(-1)
            chosen = torch.randperm(vocabulary, generator=self._generator("hard", cpu))
            self.hard[chosen[: round(config.hard_share * vocabulary)]] = True
        self.notes = (
            f"{self.name}: planted weights, for speed only; it is no language model, {meaning}, "
            "and texts end at their length limit only",
        )

    @property
    def identity(self) -> str:
        """Shape, seed, share of hard tokens and the device: GPUs of different models draw different numbers."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"planted {self.shape}, seed {self.seed}, hard {self.hard_share}, torch {torch.__version__} on {where}"

    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """Matrices and biases N(0, 0.02), norms 1."""
        shapes = self._layer_shapes
        return {name: self._draw(full, shapes[name]).to(device) for name, full in self._names(index).items()}

    def sample(self, index: int) -> Mapping[str, Tensor]:
        """Vectors, and the first row of the smallest matrix (drawing a row means drawing the whole matrix).

        One matrix will do to notice what :attr:`identity` does not contain: a changed shape, and other numbers from a
        GPU of the same name.
        """
        shapes = self._layer_shapes
        smallest = min((name for name in shapes if len(shapes[name]) > 1), key=lambda name: shapes[name].numel())
        sample = {}
        for name, full in self._names(index).items():
            if len(shapes[name]) == 1 or name == smallest:
                tensor = self._draw(full, shapes[name])
                sample[name] = (tensor if tensor.dim() == 1 else tensor[:1].clone()).cpu()
        return sample

    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """The LM head plants the map."""
        tensors = {
            name: self._draw(name, shape, self.scales.embedding)
            for name, shape in self._shared_shapes.items()
            if name != "lm_head.weight"
        }
        if "lm_head.weight" in self._shared_shapes:
            tensors["lm_head.weight"] = self._head(tensors["model.embed_tokens.weight"])
        return {name: tensors[name].to(device) for name in self._shared_shapes}

    def _head(self, embedding: Tensor) -> Tensor:
        """Row pi(t): the embedding of t as a unit vector, scaled; in float32 only a few rows at a time."""
        scale = torch.where(self.hard, self.scales.hard_row, self.scales.row).to(self.device)
        successor = self.successor.to(self.device)
        head = torch.empty_like(embedding)
        for start in range(0, len(embedding), CHUNK_ROWS):
            rows = embedding[start : start + CHUNK_ROWS].float()
            factors = scale[start : start + CHUNK_ROWS, None] / rows.norm(dim=1, keepdim=True)
            head[successor[start : start + CHUNK_ROWS]] = (rows * factors).to(self.dtype)
        return head

    def _draw(self, name: str, shape: torch.Size, std: float | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        if "norm" in name:
            return tensor.fill_(1.0)
        return tensor.normal_(0.0, std or self.config.initializer_range, generator=self._generator(name, self.device))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


class Scales:
    """Scales of the planted map for a model of this shape; the module docstring derives them.

    Attributes:
        ratio: r, rms of the embedding over rms of the layers' output.
        embedding: e, standard deviation of the embedding.
        easy: z, logit of an easy token's successor, in units of the other tokens' logits.
        rival: m, where the largest of the other logits is most likely, in the same units.
        row, hard_row: norms of the LM head's rows behind easy and hard tokens.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        width = math.sqrt(config.hidden_size)
        spread = math.sqrt(2 * math.log(config.vocab_size))
        self.rival = spread - (math.log(math.log(config.vocab_size)) + math.log(4 * math.pi)) / (2 * spread)
        share = EMBEDDING_SHARE / math.hypot(1.0, EMBEDDING_SHARE)
        share = min(max(share, (self.rival + SAFETY) / width), 0.9)
        self.ratio = share / math.sqrt(1 - share**2)
        self.easy = share * width
        self.embedding = self.ratio * layers_rms(config)
        # The largest rival logits are 1 / spread apart, so the best has about two thirds of the probability.
        self.row = 2 * DRAFT_TEMPERATURE * spread
        self.hard_row = self.row * self.rival / self.easy


def layers_rms(config: PretrainedConfig) -> float:
    """Expected rms of the sum that all decoder layers add to the residual stream, from the shape alone.

    Each layer reads a normalised state (variance 1) through N(0, std) matrices and its output is independent of the
    other layers', so variances add: of ``down(silu(gate) * up)``, and of ``o(attention)`` after averaging.
    """
    variance = config.initializer_range**2
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = variance * config.hidden_size  # of gate, up and value
    mlp = variance * config.intermediate_size * inner * _silu_power(math.sqrt(inner))
    attention = variance * config.num_attention_heads * head_dim * inner * ATTENTION_SHARE
    return math.sqrt(config.num_hidden_layers * (mlp + attention))


def _silu_power(std: float) -> float:
    """Mean of ``silu(x)^2`` for x ~ N(0, std), by the trapezoidal rule over nine standard deviations."""
    points = torch.linspace(-9.0, 9.0, 1801, dtype=torch.float64)
    density = torch.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(torch.nn.functional.silu(std * points) ** 2 * density, points))
