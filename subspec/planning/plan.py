"""The memory planner: from a budget in GiB to the place of every part of a run, before anything is loaded.

The planner reads the target's transformers configuration, not its weights. It sets 1 % of the allocator's budget
aside (:data:`~subspec.memory.allocator.HEADROOM`), and then, in this order:

1. reserves the indispensable: substitute, norms, LM head, KV cache, tree, workspaces, ring;
2. reserves the workspace of a prefill chunk of 512 tokens (:data:`~subspec.planning.run_memory.CHUNK_GOAL`), of a
   smaller one only if it must;
3. keeps as many layers resident as still fit, or exactly ``offload.resident_layers``;
4. puts the embedding table on the host if that frees a layer (or the chunk of step 2), else on the device;
5. lets the prefill chunk grow into half of the rest;
6. leaves as few of the streamed layers to a disk as ``offload.ram_gib`` requires, evenly among the others, so that the
   disk is read while those are copied.

If the budget cannot hold step 1, or host memory the rest, the run is refused with the arithmetic and the change that
would help.

Example::

    plan = plan_run(config, load_target_config(config.target), link_gb_per_s=25.0, host_free=None, device=None)
    plan.resident_layers, plan.pass_seconds, plan.ceiling(tau=12)
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.enums import AUTO, Codec
from subspec.config.schema import Cache, Config, Placement, StreamOffloadConfig
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, headroom
from subspec.planning.budget import Budget, DeviceMemory, budget_of
from subspec.planning.choose import choose, least_decision, with_most_texts, with_tiers
from subspec.planning.gpu_specs import GpuSpec, find_gpu
from subspec.planning.memory_layout import MemoryLayout, spread
from subspec.planning.refusal import refuse_device, refuse_host

TAUS = (1, 4, 12, 26)
"""Acceptance lengths whose ceilings are shown: of no draft, a small head, a small model, the substitute."""


@dataclass(frozen=True)
class Bandwidth:
    """Host-to-device bandwidth in GB/s (1e9 bytes), and its source."""

    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The place of every part of a run. Sizes are bytes.

    Attributes:
        card: the named GPU; None: this machine's.
        vram: the budget of device memory; the device items fit it with its headroom.
        host_limit: host memory that the run may take; None: unknown and not checked.
        items: allocations, the device's first.
        resident_layers, streamed_layers: layer numbers.
        disk_layers: those of the streamed layers that lie on a disk.
        coded_in_files: whether coded layers are kept in the cache's files while loading, not in host memory.
        ring_slots: layer buffers of each ring, on the device and for the disk; 0 if nothing is streamed.
        codec: whether exact layers are coded by their substitute (``layer_bytes`` is then an estimate).
        embedding: place of the embedding table.
        prefill_chunk: prompt tokens per sweep over the streamed layers.
        layer_bytes: of one streamed layer, on the host and over the link.
        streamed_bytes_per_pass: over the link in one target pass.
        plain_bytes_per_pass: the same for plain decoding in this budget; None: it does not fit.
        plain_disk_bytes: of plain_bytes_per_pass, from the disk.
        plain_resident: resident layers of plain decoding in this budget.
        level_read_bytes: device memory that a draft level reads (weights and LM head); 0 without a draft.
        link, disk: bandwidths of the predictions; None: unknown. On a CPU the link is the disk's.
        notes: remarks for people, one line each.
        waiting_layers: first layers of the substitute that are staged on the host until loading has finished.
        coded_head_bytes: of the exact LM head coded by the draft's own (an estimate); 0: it is not coded.
        texts: that run side by side.
        restored_bytes: of the buffer for restored weights.
        spare: of the budget, neither planned nor headroom: for more resident layers, if codes are shorter than
            estimated; None: their number is set by hand.
    """

    target: str
    draft: str
    card: GpuSpec | None
    vram: Budget
    host_limit: int | None
    items: tuple[Allocation, ...]
    resident_layers: tuple[int, ...]
    streamed_layers: tuple[int, ...]
    ring_slots: int
    codec: Codec
    embedding: Placement
    prefill_chunk: int
    layer_bytes: int
    streamed_bytes_per_pass: int
    plain_bytes_per_pass: int | None
    plain_resident: int | None
    level_read_bytes: int
    link: Bandwidth | None
    notes: tuple[str, ...]
    waiting_layers: int = 0
    coded_head_bytes: int = 0
    texts: int = 1
    restored_bytes: int = 0
    disk_layers: tuple[int, ...] = ()
    coded_in_files: bool = False
    plain_disk_bytes: int = 0
    spare: int | None = None
    disk: Bandwidth | None = None

    def total(self, place: Placement) -> int:
        return sum(item.bytes for item in self.items if item.place is place)

    @property
    def budget(self) -> int:
        """Bytes that the device items may take."""
        return self.vram.bytes

    @property
    def headroom(self) -> int:
        """Bytes of the budget that the plan never gives away."""
        return headroom(self.vram.allocator)

    @property
    def disk_bytes_per_pass(self) -> int:
        return len(self.disk_layers) * self.layer_bytes

    @property
    def pass_seconds(self) -> float | None:
        """Seconds the slower link needs for one target pass, its floor; None without known bandwidths."""
        return self._floor(self.streamed_bytes_per_pass, self.disk_bytes_per_pass)

    @property
    def slower_link(self) -> str | None:
        """``disk`` if a pass takes longer over the disk's link than over the device's, else ``link``; None: unknown."""
        if self.pass_seconds is None:
            return None
        return "disk" if self.pass_seconds > (self._floor(self.streamed_bytes_per_pass, 0) or 0) else "link"

    def _floor(self, link_bytes: int, disk_bytes: int) -> float | None:
        """Seconds that both links need at least, at the same time."""
        if self.link is None or (disk_bytes and self.disk is None):
            return None
        seconds = link_bytes / (self.link.gb_per_s * 1e9)
        return max(seconds, disk_bytes / (self.disk.gb_per_s * 1e9)) if self.disk else seconds

    @property
    def level_seconds(self) -> float | None:
        """Seconds a draft level needs at least (its bytes / the card's memory bandwidth); None without a card."""
        return None if self.card is None else self.level_read_bytes / (self.card.memory_gb_per_s * 1e9)

    def ceiling(self, tau: float) -> float | None:
        """tau / pass_seconds, in tokens/s; None when no link is what limits the run, or one is not known."""
        return tau / self.pass_seconds if self.pass_seconds else None

    @property
    def plain_ceiling(self) -> float | None:
        """Tokens/s that plain decoding cannot exceed in the same budget, which holds more resident layers then."""
        seconds = self._floor(self.plain_bytes_per_pass or 0, self.plain_disk_bytes)
        return 1 / seconds if seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Builtin types, for ``plan.json``; predictions included."""
        plain = asdict(self)
        del plain["vram"]
        plain["items"] = [
            {"name": item.name, "bytes": item.bytes, "place": item.place.value, "note": item.note}
            for item in self.items
        ]
        plain["embedding"] = self.embedding.value
        plain["codec"] = self.codec.value
        for name in ("resident_layers", "streamed_layers", "disk_layers", "notes"):
            plain[name] = list(plain[name])
        if self.card is not None:
            plain["card"] = {**asdict(self.card), "link_gb_per_s": self.card.link_gb_per_s}
            plain["card"]["pcie"] = list(self.card.pcie)
            del plain["card"]["tensor"]  # a plan needs none
        return plain | {
            "budget": self.budget,
            "vram_counts": self.vram.counts.value,
            "cuda_bytes": self.vram.cuda.bytes,
            "device_bytes": self.total(Placement.device),
            "headroom_bytes": self.headroom,
            "host_bytes": self.total(Placement.host),
            "disk_bytes_per_pass": self.disk_bytes_per_pass,
            "pass_seconds": self.pass_seconds,
            "slower_link": self.slower_link,
            "level_seconds": self.level_seconds,
            "ceiling_tokens_per_s": {str(tau): self.ceiling(tau) for tau in TAUS},
            "plain_ceiling_tokens_per_s": self.plain_ceiling,
        }


def plan_run(
    config: Config,
    model: PretrainedConfig,
    *,
    link_gb_per_s: float | None,
    host_free: int | None,
    device: DeviceMemory | None,
) -> Plan:
    """Plan a run with ``offload=stream``; nothing is loaded.

    Args:
        model: the target's transformers configuration.
        link_gb_per_s: measured host-to-device bandwidth, GB/s. ``offload.link_gb_per_s`` takes precedence; without
            both, the named GPU's is used.
        host_free: free host memory in bytes (psutil's ``available``); ignored if ``offload.card`` is set.
        device: memory of this machine's device; ignored if ``offload.card`` is set.

    Raises:
        ConfigError: the card cannot hold the budget, or the budget the run, with the arithmetic and the remedy.
    """
    offload = config.offload
    if not isinstance(offload, StreamOffloadConfig):
        raise ConfigError(f"offload={offload.name} has no plan: set offload=stream")
    card = find_gpu(offload.card) if offload.card is not None else None
    vram = budget_of(offload, DeviceMemory.of_card(card) if card else device)
    budget = vram.allocator
    notes: list[str] = []

    def streamed(config: Config) -> int | None:
        found = choose(MemoryLayout(config, model), budget)
        return None if found is None else model.num_hidden_layers - found.resident

    if config.decoding.texts == AUTO:
        config = with_most_texts(config, streamed)
        notes.append(f"decoding.texts=auto: {config.decoding.texts}")
    layout = MemoryLayout(config, model)
    decision = choose(layout, budget)
    if layout.coded and offload.codec is Codec.auto and (decision is None or offload.resident_layers is None):
        # If every layer fits as it is, coding gains nothing. If only the buffer of restored weights does not fit, the
        # target streams uncoded.
        plain = MemoryLayout(replace(config, offload=replace(offload, codec=Codec.none)), model)
        whole = choose(plain, budget)
        if whole is not None and (decision is None or whole.resident == plain.spec.layers):
            layout, decision = plain, whole
        elif decision is None:
            layout = min(layout, plain, key=lambda tried: tried.device_bytes(least_decision(tried)))
    if decision is None:
        raise refuse_device(layout, model, vram)
    resident = layout.spread(decision.resident)
    others = tuple(index for index in range(layout.spec.layers) if index not in resident)
    host_limit = _host_limit(layout, host_free)
    tiered = with_tiers(layout, decision, host_limit)
    if tiered is None:
        raise refuse_host(layout, decision, host_limit or 0, vram)
    decision = tiered
    if decision.in_files and layout.coded and getattr(config.quant, "cache", None) is Cache.off:
        raise ConfigError(
            f"offload.ram_gib={offload.ram_gib} leaves coded layers to a disk, where the cache keeps them: set "
            "quant.cache=auto, offload.codec=none, or a larger offload.ram_gib"
        )

    if offload.vram_gib == AUTO:
        notes.append(f"offload.vram_gib=auto: {vram.bytes / GIB:g} GiB")
    if not others:
        notes.append("every layer fits on the device: nothing is streamed, and the link limits nothing")
    if host_limit is None:
        notes.append("host memory is not checked: set offload.ram_gib to check it")
    plainly = not layout.drafts and not layout.coded
    plain_layout = layout if plainly else layout.without_draft(model)
    plain = decision if plainly else choose(plain_layout, budget)
    plain = plain and with_tiers(plain_layout, plain, host_limit)
    return Plan(
        target=config.target.name,
        draft=config.draft.name,
        card=card,
        vram=vram,
        host_limit=host_limit,
        items=(*vram.items, *layout.allocations(decision)),
        resident_layers=resident,
        streamed_layers=others,
        ring_slots=layout.ring_slots(decision.resident),
        codec=Codec.substitute if layout.coded else Codec.none,
        embedding=decision.embedding,
        prefill_chunk=decision.chunk,
        layer_bytes=layout.layer_bytes,
        streamed_bytes_per_pass=len(others) * layout.layer_bytes,
        plain_bytes_per_pass=plain and (layout.spec.layers - plain.resident) * plain_layout.layer_bytes,
        plain_resident=plain and plain.resident,
        level_read_bytes=layout.draft.level_read(decision.resident),
        link=_link(offload.link_gb_per_s, link_gb_per_s, card),
        notes=tuple(notes),
        waiting_layers=layout.staged_layers(decision),
        coded_head_bytes=layout.coded_head_bytes,
        texts=layout.texts,
        restored_bytes=layout.scratch_bytes,
        disk_layers=spread(others, decision.disk),
        coded_in_files=decision.in_files and layout.coded,
        spare=budget - headroom(budget) - layout.device_bytes(decision) if offload.resident_layers is None else None,
        plain_disk_bytes=plain.disk * plain_layout.layer_bytes if plain else 0,
        disk=offload.disk_gb_per_s and Bandwidth(offload.disk_gb_per_s, "offload.disk_gb_per_s"),
    )


def _host_limit(layout: MemoryLayout, host_free: int | None) -> int | None:
    """Bytes of host memory that the run may take: the smaller of the allowed and the free; None if both are unknown."""
    asked = layout.offload.ram_gib
    if layout.offload.card is not None:
        host_free = None
    known = [limit for limit in (None if asked is None else int(asked * GIB), host_free) if limit is not None]
    return min(known) if known else None


def _link(configured: float | None, measured: float | None, card: GpuSpec | None) -> Bandwidth | None:
    if configured is not None:
        return Bandwidth(configured, "offload.link_gb_per_s")
    if measured is not None:
        return Bandwidth(measured, "measured")
    if card is not None:
        estimated = "measured on one" if card.measured_link else "estimated"
        return Bandwidth(card.link_gb_per_s, f"{card.name}, {estimated}")
    return None
