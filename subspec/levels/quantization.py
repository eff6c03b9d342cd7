"""The quantization of draft levels that ``quant=...`` configures: a quantizer of weights, and the format of each role.

A new method of quantization is one entry in :data:`METHODS`, beside its
:class:`~subspec.quant.weight_format.WeightFormat`. The planner and the builder of levels both use these functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from subspec.config.enums import AUTO
from subspec.config.quant_checks import HEAD, MODULE_CLASSES, bits_by_linear, check_higgs, check_hqq, linear_names
from subspec.config.schema import HiggsConfig, HqqConfig, QuantConfig
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, check_biases, is_kept, role_shapes
from subspec.quant.codebook_linear import HiggsFormat, higgs_quantizer
from subspec.quant.hqq import HqqFormat, check_group_size, hqq_quantizer
from subspec.quant.weight_format import FormatQuantizer, WeightFormat

TILE_ROWS = 16
"""Rows of gate and up projections that alternate in one Linear (:func:`subspec.kernels.few_rows.interleave`)."""


@dataclass(frozen=True)
class LevelQuantization:
    """The quantization of a substitute whose levels are captured.

    Attributes:
        quantizer: of single weights.
        shapes: (outputs, inputs) of every quantized role: a layer's (``qkv``...), and ``head`` if it is quantized.
        formats: by quantized role.
        exact: (outputs, inputs) of a layer's roles that stay exact.
        keep_exact: names of the Linears that stay exact.
        kernel: ``draft.kernel``.
    """

    quantizer: FormatQuantizer
    shapes: Mapping[str, tuple[int, int]]
    formats: Mapping[str, WeightFormat]
    exact: Mapping[str, tuple[int, int]]
    keep_exact: frozenset[str]
    kernel: str = AUTO

    @property
    def kernels(self) -> frozenset[str]:
        """Those that hold every quantized Linear that they take in the bytes that are planned."""
        every, more = set[str](), set[str]()
        for role, (n, k) in self.shapes.items():
            own = self.formats[role]
            every.update(own.kernels)
            fitting = [kernel for kernel in own.kernels if not own.unfit(kernel, n, k)]
            more.update(kernel for kernel in fitting if own.device_bytes(n, k, kernel) > self._bytes(role))
        return frozenset(every - more)

    @property
    def head_bytes(self) -> int:
        """Device bytes of the draft's own LM head; 0: it uses the target's."""
        return self._bytes("head") if "head" in self.shapes else 0

    @property
    def layer_bytes(self) -> int:
        """Device bytes of a layer's quantized Linears."""
        return sum(self._bytes(role) for role in self.shapes if role != "head")

    def stored_bytes(self, layers: int) -> int:
        """Bytes on disk of ``layers`` layers and the head."""
        return sum(
            (1 if role == "head" else layers) * self.quantizer.format_of(_linears(role)[0]).stored_bytes(*shape)
            for role, shape in self.shapes.items()
        )

    def summary(self) -> str:
        """For the plan: ``attention 4 bit, mlp 3 bit in 4-bit words, lm_head 8 bit; groups of 64``."""
        of = {path.rpartition(".")[2]: kept for role, kept in self.formats.items() for path in _linears(role)}
        details = list(dict.fromkeys(kept.detail for kept in of.values()))
        said = {name: kept.name if len(details) == 1 else str(kept) for name, kept in of.items()}
        parts = []
        for key, names in MODULE_CLASSES.items():
            kinds = {name: said[name] for name in names if name in said}
            whole = len(kinds) == len(names) and len(set(kinds.values())) == 1
            parts += [f"{key} {kinds[names[0]]}"] if whole else [f"{n} {kind}" for n, kind in kinds.items()]
        return ", ".join(parts) + (f"; {details[0]}" if len(details) == 1 else "")

    def _bytes(self, role: str) -> int:
        return self.formats[role].device_bytes(*self.shapes[role], self.kernel)


def level_quantization(
    quant: QuantConfig, layer: Mapping[str, torch.Size], head: tuple[int, int], *, kernel: str = AUTO
) -> LevelQuantization:
    """The quantization of a target of these shapes that ``quant`` configures.

    Args:
        layer: shape of every parameter of a layer by name. head: vocabulary and hidden size.
        kernel: ``draft.kernel``.

    Raises:
        ConfigError: captured levels do not support the method, or its settings do not fit the target.
    """
    if type(quant) not in METHODS:
        raise ConfigError(f"quant={quant.name} is not supported by offload=stream: set quant=hqq or quant=higgs")
    check_biases(layer, "the quantized model")
    outputs = layer[f"{ROLES['gate_up'][0]}.weight"][0]
    if outputs % TILE_ROWS:
        raise ConfigError(
            f"this target's {ROLES['gate_up'][0]} has {outputs} outputs, and the substitute of offload=stream "
            f"takes a multiple of {TILE_ROWS}: set offload=none, or draft=none with offload.codec=none"
        )
    found = METHODS[type(quant)](quant, layer, head)
    for role, (n, k) in found.shapes.items():
        own = found.formats[role]
        if kernel != AUTO and (reason := own.unfit(kernel, n, k)):
            raise ConfigError(f"draft.kernel={kernel} cannot compute {role}: {reason}; set draft.kernel=auto")
        problems = {name: own.unfit(name, n, k) for name in own.kernels}
        if kernel == AUTO and all(problems.values()):
            raise ConfigError(
                f"quant.group_size={quant.group_size}: no kernel of offload=stream takes {own.bits} bits for the {k} "
                f"inputs of {_linears(role)[0]} ({'; '.join(f'{n}: {r}' for n, r in problems.items())}): take another"
            )
    return replace(found, kernel=kernel)


def hqq_quantization(
    quant: HqqConfig, layer: Mapping[str, torch.Size], head: tuple[int, int], format_class: type[HqqFormat] = HqqFormat
) -> LevelQuantization:
    """HQQ: bits by role, groups along the inputs; ``format_class`` has the kernels."""
    check_hqq(quant.bits, quant.group_size, quant.axis)
    if quant.axis != 1:
        raise ConfigError(
            f"quant.axis={quant.axis}: offload=stream multiplies with groups along the inputs: set quant.axis=1"
        )
    bits = bits_by_linear(quant.bits, quant.bits_by, quant.modules)
    shapes, exact, keep_exact = split_roles(quant.modules, layer, head)
    for name, shape in layer.items():
        if len(shape) == 2 and name.split(".")[-2] in bits:
            check_group_size(*shape, group_size=quant.group_size, axis=1, name=name)
    if HEAD in bits:
        check_group_size(*head, group_size=quant.group_size, axis=1, name=HEAD)
    formats: dict[str, WeightFormat] = {}
    for role in shapes:
        own = {name: bits[name] for name in (path.rpartition(".")[2] for path in _linears(role))}
        if len(set(own.values())) > 1:
            said = ", ".join(f"{name} {number}" for name, number in own.items())
            raise ConfigError(
                f"quant.bits_by: offload=stream makes one Linear of {' and '.join(own)}, which cannot have different "
                f"bits ({said}): give them the same"
            )
        formats[role] = format_class(next(iter(own.values())), quant.group_size)
    quantizer = hqq_quantizer(quant.bits, quant.group_size, bits, format_class)
    return LevelQuantization(quantizer, shapes, formats, exact, keep_exact)


def higgs_quantization(quant: HiggsConfig, layer: Mapping[str, torch.Size], head: tuple[int, int]) -> LevelQuantization:
    """HIGGS: one grid for all roles."""
    check_higgs(quant.bits, quant.vector_dim, quant.group_size, quant.hadamard_size)
    shapes, exact, keep_exact = split_roles(quant.modules, layer, head)
    format_ = HiggsFormat(quant.bits, quant.vector_dim, quant.group_size, quant.hadamard_size, quant.hadamard.value)
    quantizer = higgs_quantizer(quant.bits, quant.vector_dim, quant.group_size, quant.hadamard_size)
    return LevelQuantization(quantizer, shapes, dict.fromkeys(shapes, format_), exact, keep_exact)


METHODS: dict[
    type[QuantConfig], Callable[[QuantConfig, Mapping[str, torch.Size], tuple[int, int]], LevelQuantization]
] = {HqqConfig: hqq_quantization, HiggsConfig: higgs_quantization}
"""By the class of ``quant``'s configuration."""


def split_roles(
    modules: Sequence[str] | None, layer: Mapping[str, torch.Size], head: tuple[int, int]
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]], frozenset[str]]:
    """Quantized roles (the head's included), a layer's exact roles, and names of exact Linears.

    Args:
        modules: ``quant.modules``.
    """
    everything = {name for names in MODULE_CLASSES.values() for name in names}
    keep_exact = frozenset(everything - linear_names(modules))
    shapes = role_shapes(layer, keep_exact)
    exact = {role: shape for role, shape in role_shapes(layer).items() if is_kept(role, keep_exact)}
    if HEAD not in keep_exact:
        shapes["head"] = head
    return shapes, exact, keep_exact


def _linears(role: str) -> tuple[str, ...]:
    return (HEAD,) if role == "head" else ROLES[role]
