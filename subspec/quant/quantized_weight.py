"""The interface of a quantized weight between its quantizer, the caches, the codec and a draft level."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

from torch import Tensor, cat

from subspec.kernels.few_rows import interleave


class QuantizedWeight(ABC):
    """A weight [n, k] whose rows were quantized independently of each other. Subclasses are frozen dataclasses.

    Attributes:
        row_fields: names of the tensors [n, ...] with a row per output.
        centred: whether exact weights are most frequent in the middle of their intervals; else they are spread evenly.
    """

    row_fields: ClassVar[tuple[str, ...]]
    centred: ClassVar[bool] = False

    shape: tuple[int, int]
    """Outputs and inputs."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """float32 [n, k]."""

    @property
    def row_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of :attr:`row_fields`."""
        return tuple(getattr(self, name) for name in self.row_fields)

    def of_rows(self, parts: Sequence[Tensor]) -> Self:
        """This weight with other values for its row-wise tensors (:attr:`row_tensors`)."""
        return replace(self, **dict(zip(self.row_fields, parts, strict=True)))

    @abstractmethod
    def stacks_with(self, other: Self) -> bool:
        """Whether both can be rows of one weight."""

    def rows(self, first: int, count: int) -> Self:
        """Rows ``first`` to ``first + count``, as views."""
        return self.of_rows([part[first : first + count] for part in self.row_tensors])

    def stacked(self, others: Sequence[Self], *, swiglu: bool) -> Self:
        """This weight above ``others`` as one, or, with ``swiglu``, of a gate and an up projection, 16 rows in turn.

        Raises:
            ValueError: weights of different settings.
        """
        if not all(self.stacks_with(other) for other in others):
            raise ValueError("weights of different quantization settings are not one weight")
        parts = zip(*(own.row_tensors for own in (self, *others)), strict=True)
        return self.of_rows([stack_rows(part, swiglu=swiglu) for part in parts])

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Compact tensors for a file, on the CPU; :meth:`WeightFormat.restore` reads them."""

    @property
    def margin(self) -> float:
        """Margin of :meth:`interval` to code exact weights with.

        Raises:
            TypeError: the weight has no intervals.
        """
        raise TypeError(f"{type(self).__name__} has no intervals to code exact weights in")

    def interval(self, begin: int, end: int, margin: float) -> tuple[Tensor, Tensor]:
        """Ends of the intervals that hold the exact weights ``begin .. end``, numbered in row-major order.

        CUDA kernels repeat every bit of them: they are single rounded float32 operations in a fixed order.

        Returns:
            Two float32 tensors [end - begin].

        Raises:
            TypeError: the weight has no intervals.
        """
        raise TypeError(f"{type(self).__name__} has no intervals to code exact weights in")


def stack_rows(parts: Sequence[Tensor], *, swiglu: bool) -> Tensor:
    """Row-wise parts [n, ...] below each other; with ``swiglu`` a gate's and an up projection's, 16 rows in turn."""
    if not swiglu:
        return parts[0] if len(parts) == 1 else cat(list(parts))
    return interleave(*parts)


def fitting(stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether stored tensors have these shapes."""
    return all(name in stored and tuple(stored[name].shape) == shape for name, shape in shapes.items())
