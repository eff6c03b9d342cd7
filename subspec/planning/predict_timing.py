"""Seconds of an iteration, from bytes and bandwidths.

    draft level   layers * LEVEL_LAYER_S + bytes of substitute and LM head / memory + rows
    rows          for every TILE_ROWS nodes behind the first ones: operations / (multiprocessor GHz * rate), at a rate
                  of ROW_RATE or TENSOR_EFFICIENCY * the tensor cores' operations per cycle, the smaller of the two
    target pass   the largest of: streamed bytes / link, less the bytes that filled the ring during drafting; the same
                  of the disk and its ring; restoring coded layers, then computing them. The last layer waits for its
                  bytes, and the link, with a full ring, for the first one: a layer's restoring and computing each
    restoring     weights / (multiprocessor GHz * RESTORE_RATE), or RESTORE_BYTES of each / memory if that takes longer
    computing     the target's bytes / memory, or its operations at TENSOR_EFFICIENCY if that takes longer
    end of a pass restoring a coded LM head, its bytes / memory, OTHER_S, while the links continue to fill the rings
    iteration     depth * draft level + target pass + end

``memory`` is EFFICIENCY * the device's memory bandwidth. With ``draft.proposer`` a pass of the substitute, of more
rows, grows several levels:

    drafting      depth * passes per level * (draft level + proposals)
    proposals     levels of guesses * the proposer's weights / memory

During drafting the link is idle once the ring's slots are full. Left out: attention, and the host's work between the
passes of a cascade. Of a GPU with unknown tensor cores, rows, restoring and operations are left out, too.

The constants are fitted to measurements on one H200 (single levels of 7B, 8B and 32B at width 6, of 7B at 8 to 64 rows,
restored layers of 7B); the check in ``experiments/predict`` repeats the fits and states the errors on whole runs, which
are not part of them. Rows, restoring and operations have not been measured on other GPUs.
"""

import math
from dataclasses import dataclass

from subspec.planning.acceptance import Acceptance

EFFICIENCY = 0.79
"""Share of the data-sheet memory bandwidth that long kernels reach (fitted). Single Linears give 0.77
(``experiments/predict``)."""

TENSOR_EFFICIENCY = 0.64
"""Share of the tensor cores' data-sheet rate that they are assumed to reach; not fitted."""

LEVEL_LAYER_S = 20.5e-6
"""Seconds per layer of a draft level, independent of its bytes: launches, norms, attention (fitted)."""

TILE_ROWS = 8
"""Rows of a draft level that its kernels multiply at once; the first ones take no time beside that of the weights."""

ROW_RATE = 840
"""Operations per multiprocessor and cycle at which ``int4.cu`` multiplies further rows (fitted): on an H200 its loads
of the rows limit it, to a fifth of what the tensor cores do. ``int4_wide.cu``, which is faster, is not modelled."""

RESTORE_RATE = {"hqq": 1.48, "higgs": 0.46}
"""Weights per multiprocessor and cycle that are restored beside 4 bits of a quantizer (359e9 and 112e9 weights/s), a
layer at once. In slices an H200 takes 0.78 ms for a layer of a 7B instead of 0.65, since a slice does not fill it."""

EIGHT_BITS = 0.84
"""Of that rate beside 8 bits (300e9 weights/s)."""

RESTORE_BYTES = 3.5
"""Bytes of a restored weight: 16 bits written, some 7 of its code and 4 of the substitute read."""

OTHER_S = 0.4e-3
"""Seconds of bookkeeping per iteration outside the timed phases: measured 0.3 to 0.6 ms."""


@dataclass(frozen=True)
class Machine:
    """Speeds of a machine.

    Attributes:
        link_gb_per_s, memory_gb_per_s: host-to-device and device-memory bandwidth, GB/s (1e9 bytes).
        level_s: measured seconds of a draft level, with ``draft.proposer`` of a pass and its proposals; None: computed.
        disk_gb_per_s: of the disk; None: no layer lies on it.
        tensor: as of :class:`~subspec.planning.gpu_specs.GpuSpec`; None: unknown.
        proposals_s: seconds of proposing for a pass; None: computed.
    """

    link_gb_per_s: float
    memory_gb_per_s: float
    level_s: float | None = None
    disk_gb_per_s: float | None = None
    tensor: tuple[float, int] | None = None
    proposals_s: float | None = None

    def read(self, size: float) -> float:
        """Seconds of reading bytes of device memory."""
        return size / (self.memory_gb_per_s * 1e9 * EFFICIENCY)

    def compute(self, operations: float, most: float = math.inf) -> float:
        """Seconds of the tensor cores' operations, of which a multiprocessor does at most ``most`` a cycle."""
        if self.tensor is None:
            return 0.0
        ghz, rate = self.tensor
        return operations / (ghz * 1e9 * min(most, TENSOR_EFFICIENCY * rate))

    def restore(self, weights: int, rate: float) -> float:
        """Seconds of restoring coded weights, ``rate`` per multiprocessor and cycle."""
        if self.tensor is None or not weights:
            return 0.0
        return max(weights / (self.tensor[0] * 1e9 * rate), self.read(RESTORE_BYTES * weights))


@dataclass(frozen=True)
class Sizes:
    """Bytes and operations of a planned run.

    Attributes:
        streamed: bytes over the link per pass. ring: of all its slots. disk: of the streamed bytes, from a disk.
        level: bytes that a draft level reads. target: of all layers. head: of the LM head.
        layers: their number.
        rows: of a draft level. row_operations: of each.
        proposals: bytes that a proposer reads for a pass of the substitute.
        operations: of a target pass.
        restored, restored_head: coded weights of layers and LM head. restore_rate, head_rate: of either, see
            :data:`RESTORE_RATE`.
    """

    streamed: int
    ring: int
    level: int
    target: int
    head: int
    layers: int
    disk: int = 0
    rows: int = 1
    row_operations: int = 0
    proposals: int = 0
    operations: int = 0
    restored: int = 0
    restored_head: int = 0
    restore_rate: float = 1.0
    head_rate: float = 1.0


@dataclass(frozen=True)
class Iteration:
    """A predicted iteration.

    Attributes:
        draft_s, pass_s: seconds of drafting, and of the target's pass with its end.
        tau: emitted tokens.
        ceiling: tokens/s at this tau if only streaming took time; None: nothing is streamed.
    """

    draft_s: float
    pass_s: float
    tau: float
    ceiling: float | None

    @property
    def seconds(self) -> float:
        return self.draft_s + self.pass_s

    @property
    def tokens_per_s(self) -> float:
        return self.tau / self.seconds


def level_seconds(sizes: Sizes, machine: Machine) -> float:
    """Seconds of one draft level, or of a pass of a cascade; 0 without a draft."""
    if machine.level_s is not None:
        return machine.level_s
    if not sizes.level:
        return 0.0
    return sizes.layers * LEVEL_LAYER_S + machine.read(sizes.level) + rows_seconds(sizes, machine)


def rows_seconds(sizes: Sizes, machine: Machine) -> float:
    """Seconds of a draft level that its rows behind the first :data:`TILE_ROWS` take."""
    tiles = math.ceil(sizes.rows / TILE_ROWS) - 1
    return machine.compute(tiles * TILE_ROWS * sizes.row_operations, ROW_RATE)


def proposals_seconds(sizes: Sizes, machine: Machine) -> float:
    """Seconds of the proposals for a pass of the substitute."""
    if machine.proposals_s is not None:
        return machine.proposals_s
    return machine.read(sizes.proposals) if machine.level_s is None else 0.0


def pass_seconds(sizes: Sizes, machine: Machine, draft_s: float) -> float:
    """Seconds of the target's pass and its end, after ``draft_s`` seconds in which the links filled their rings."""
    end = machine.restore(sizes.restored_head, sizes.head_rate) + machine.read(sizes.head) + OTHER_S
    device = machine.restore(sizes.restored, sizes.restore_rate)
    device += max(machine.read(sizes.target), machine.compute(sizes.operations))
    layer = device / sizes.layers
    ahead = draft_s + layer + end  # the links' time from their last copy to the next pass
    links = [seconds - min(ring - layer, ahead) + layer for seconds, ring in _link_seconds(sizes, machine)]
    return max(*links, device) + end


def plain(sizes: Sizes, machine: Machine) -> Iteration:
    """Plain decoding: one token a pass."""
    return Iteration(0.0, pass_seconds(sizes, machine, 0.0), 1.0, _ceiling(sizes, machine, 1.0))


def serial(sizes: Sizes, machine: Machine, acceptance: Acceptance, depth: int) -> Iteration:
    """Draft at most ``depth`` levels, then verify them."""
    levels = acceptance.levels(depth)
    passes = max(min(1.0, levels), levels * acceptance.passes)
    draft = passes * (level_seconds(sizes, machine) + proposals_seconds(sizes, machine))
    tau = acceptance.tau(depth)
    return Iteration(draft, pass_seconds(sizes, machine, draft), tau, _ceiling(sizes, machine, tau))


def _link_seconds(sizes: Sizes, machine: Machine) -> list[tuple[float, float]]:
    """Seconds of a pass's bytes over the link and from the disk, and those of a full ring of each."""
    link = machine.link_gb_per_s * 1e9
    found = [(sizes.streamed / link, sizes.ring / link)]
    if sizes.disk:
        assert machine.disk_gb_per_s is not None
        disk = machine.disk_gb_per_s * 1e9
        found.append((sizes.disk / disk, min(sizes.ring, sizes.disk) / disk))
    return found


def _ceiling(sizes: Sizes, machine: Machine, tau: float) -> float | None:
    floor = max(seconds for seconds, _ in _link_seconds(sizes, machine))
    return tau / floor if floor else None
