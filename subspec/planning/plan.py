"""The memory planner: a budget in GiB in, what goes where out, before anything is loaded.

From the target's transformers configuration (no weights), the substitute, the tree and the lengths, the planner
computes every piece of the run, sets 1 % of the budget aside (``HEADROOM`` says why) and then, in this order:

1. reserves what the run cannot do without: substitute, norms, LM head, KV cache, tree, workspaces, ring;
2. reserves the workspace of a prefill chunk of 512 tokens (``CHUNK_GOAL`` says why), smaller only if it must be;
3. keeps as many exact layers resident as still fit, or exactly ``offload.resident_layers``;
4. puts the embedding table on the host if that frees a layer (or the chunk of step 2), else on the device;
5. lets the prefill chunk grow into half of what is left.

A budget that cannot hold step 1, or host memory that cannot hold the streamed layers, is refused with the
arithmetic and the change that would help.

Example::

    plan = plan_run(config, load_target_config(config.target), link_gb_per_s=25.0, host_free=None, device_total=None)
    plan.resident_layers, plan.pass_seconds, plan.ceiling(tau=12)
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.enums import Codec
from subspec.config.schema import Config, Placement
from subspec.errors import ConfigError
from subspec.planning.gpu_specs import Card, find_card
from subspec.planning.layout import CHUNK_STEP, Choice, Item, Layout
from subspec.planning.refusal import least_choice, refuse_device, refuse_host
from subspec.planning.sizes import GIB, headroom

TAUS = (1, 4, 12, 26)
"""Acceptance lengths whose ceilings are shown: no draft, a small head, a small model, the substitute."""

CONTEXT_BYTES = GIB // 2
"""What CUDA takes of a card beside PyTorch's allocations, about; the budget does not cover it."""


@dataclass(frozen=True)
class Link:
    """Host-to-device bandwidth in GB/s (1e9 bytes), and where the figure comes from."""

    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Plan:
    """What goes where. Sizes are bytes.

    Attributes:
        budget: ``offload.vram_gib``; the device items never exceed it, less its headroom.
        host_limit: host memory the run may take; None: not known, not checked.
        items: every piece, device first.
        resident_layers, streamed_layers: layer numbers, together all of them.
        ring_slots: layer buffers on the device; 0 when nothing is streamed.
        codec: whether exact layers are coded by their substitute (``layer_bytes`` is then an estimate).
        embedding: where the embedding table lives.
        prefill_chunk: prompt tokens per sweep over the streamed layers.
        layer_bytes: of one streamed layer, on the host and over the link.
        streamed_bytes_per_pass: what crosses the link for one target pass.
        plain_bytes_per_pass: the same for plain decoding in this budget (None: it does not fit).
        plain_resident: resident layers of plain decoding in this budget.
        level_read_bytes: what one draft level reads of the device's memory (its weights and LM head; 0: no draft).
        link: bandwidth of the predictions; None: not known.
        notes: what a reader should know, one line each.
        waiting_layers: of the substitute, the first ones, that are on the host until all are made.
        coded_head_bytes: of the exact LM head, coded by the draft's own (an estimate); 0: it is not coded.
    """

    target: str
    draft: str
    card: Card | None
    budget: int
    host_limit: int | None
    items: tuple[Item, ...]
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
    link: Link | None
    notes: tuple[str, ...]
    waiting_layers: int = 0
    coded_head_bytes: int = 0

    def total(self, place: Placement) -> int:
        """Bytes of all items on ``place``."""
        return sum(item.bytes for item in self.items if item.place is place)

    @property
    def headroom(self) -> int:
        """Bytes of the budget that the plan never gives away."""
        return headroom(self.budget)

    @property
    def pass_seconds(self) -> float | None:
        """Seconds the link needs for one target pass, its floor; None without a known link."""
        return None if self.link is None else self.streamed_bytes_per_pass / (self.link.gb_per_s * 1e9)

    @property
    def level_seconds(self) -> float | None:
        """Seconds a draft level needs at least (its bytes / the card's memory bandwidth); None without a card."""
        return None if self.card is None else self.level_read_bytes / (self.card.memory_gb_per_s * 1e9)

    def ceiling(self, tau: float) -> float | None:
        """tau / pass_seconds, in tokens/s; None when the link is not what limits the run, or is not known."""
        return tau / self.pass_seconds if self.pass_seconds else None

    @property
    def plain_ceiling(self) -> float | None:
        """Tokens/s that plain decoding cannot exceed in the same budget, which holds more resident layers then."""
        if self.link is None or not self.plain_bytes_per_pass:
            return None
        return self.link.gb_per_s * 1e9 / self.plain_bytes_per_pass

    def to_dict(self) -> dict[str, Any]:
        """Builtin types, for ``plan.json``; predictions included."""
        plain = asdict(self)
        plain["items"] = [{**asdict(item), "place": item.place.value} for item in self.items]
        plain["embedding"] = self.embedding.value
        plain["codec"] = self.codec.value
        for name in ("resident_layers", "streamed_layers", "notes"):
            plain[name] = list(plain[name])
        if self.card is not None:
            plain["card"] = {**asdict(self.card), "link_gb_per_s": self.card.link_gb_per_s}
            plain["card"]["pcie"] = list(self.card.pcie)
        return plain | {
            "device_bytes": self.total(Placement.device),
            "headroom_bytes": self.headroom,
            "host_bytes": self.total(Placement.host),
            "pass_seconds": self.pass_seconds,
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
    device_total: int | None,
) -> Plan:
    """Plan a run with ``offload=stream``; nothing is loaded.

    Args:
        model: the target's transformers configuration.
        link_gb_per_s: measured host-to-device bandwidth, GB/s; ``offload.link_gb_per_s`` wins when it is set, and
            the named card's is used when neither is there.
        host_free: free host memory in bytes (psutil's ``available``); not this machine's concern, and ignored,
            when ``offload.card`` names another one.
        device_total: memory of the device in bytes; a named card's own when ``offload.card`` is set.

    Raises:
        ConfigError: the run does not fit, with the arithmetic and what would make it fit.
    """
    layout = Layout(config, model)
    offload = layout.offload
    card = find_card(offload.card) if offload.card is not None else None
    budget = int(offload.vram_gib * GIB)
    total = int(card.vram_gib * GIB) if card else device_total
    whose = card.name if card else "this machine's GPU"
    if total is not None and budget > total:
        raise ConfigError(
            f"offload.vram_gib={offload.vram_gib:g} is more than the {total / GIB:.4g} GiB of {whose}: "
            f"set offload.vram_gib to at most {(total - CONTEXT_BYTES) / GIB:.1f} (CUDA itself takes about 0.5)"
        )
    choice = choose(layout, budget)
    if layout.coded and offload.codec is Codec.auto and (choice is None or offload.resident_layers is None):
        # Where every layer fits as it is, there is nothing to gain from decoding; where the decoded layer beside the
        # ring is what does not fit, decoding cannot be had.
        plain = Layout(replace(config, offload=replace(offload, codec=Codec.none)), model)
        whole = choose(plain, budget)
        if whole is not None and (choice is None or whole.resident == plain.shapes.layers):
            layout, choice = plain, whole
        elif choice is None:
            layout = min(layout, plain, key=lambda tried: tried.device_bytes(least_choice(tried)))
    if choice is None:
        raise refuse_device(layout, model, budget, lambda changed: choose(changed, budget))
    items = tuple(layout.items(choice))
    resident = layout.spread(choice.resident)
    streamed = tuple(index for index in range(layout.shapes.layers) if index not in resident)
    host_limit = _host_limit(layout, host_free)
    if host_limit is not None and sum(i.bytes for i in items if i.place is Placement.host) > host_limit:
        raise refuse_host(layout, items, choice, host_limit, budget)

    notes = []
    if total is not None and budget > total - CONTEXT_BYTES:
        notes.append(f"CUDA itself takes about 0.5 GiB of {whose}, beside the budget: leave room for it")
    if not streamed:
        notes.append("every layer fits on the device: nothing is streamed, and the link limits nothing")
    if host_limit is None:
        notes.append("host memory is not checked: set offload.ram_gib to check it")
    plainly = layout.draft is None and not layout.coded
    plain_layout = layout if plainly else layout.without_draft(model)
    plain = choice if plainly else choose(plain_layout, budget)
    return Plan(
        target=config.target.name,
        draft=config.draft.name,
        card=card,
        budget=budget,
        host_limit=host_limit,
        items=items,
        resident_layers=resident,
        streamed_layers=streamed,
        ring_slots=layout.ring_slots(choice.resident),
        codec=Codec.substitute if layout.coded else Codec.none,
        embedding=choice.embedding,
        prefill_chunk=choice.chunk,
        layer_bytes=layout.layer_bytes,
        streamed_bytes_per_pass=len(streamed) * layout.layer_bytes,
        plain_bytes_per_pass=plain and (layout.shapes.layers - plain.resident) * plain_layout.layer_bytes,
        plain_resident=plain and plain.resident,
        level_read_bytes=layout.draft.level_read(choice.resident) if layout.draft else 0,
        link=_link(offload.link_gb_per_s, link_gb_per_s, card),
        notes=tuple(notes),
        waiting_layers=layout.waiting_layers(choice),
        coded_head_bytes=layout.coded_head_bytes,
    )


def choose(layout: Layout, budget: int) -> Choice | None:
    """The best choice whose device items and headroom fit ``budget`` bytes: most resident layers first; None: none
    does."""
    best: Choice | None = None
    for placement in layout.placements():
        found = _choose(layout, budget - headroom(budget), placement)
        # Only what counts more than the place of the table: layers, and the chunk as far as it was asked for.
        if found and (best is None or _rank(found, layout) > _rank(best, layout)):
            best = found
    return best


def _rank(choice: Choice, layout: Layout) -> tuple[int, int]:
    return choice.resident, min(choice.chunk, layout.goal)


def _choose(layout: Layout, room: int, embedding: Placement) -> Choice | None:
    def used(resident: int, chunk: int) -> int:
        return layout.device_bytes(Choice(resident, chunk, embedding))

    least, most = len(layout.forced), layout.shapes.layers
    if layout.offload.resident_layers is not None:
        least = most = layout.offload.resident_layers
    chunks, ceiling = _chunks(layout.goal, layout.most_chunk), room
    resident = next((n for n in range(most, least - 1, -1) if used(n, layout.goal) <= room), None)
    if resident is not None:
        taken = used(resident, layout.goal)
        ceiling = taken + (room - taken) // 2
    elif used(least, layout.least_chunk) <= room:
        resident, chunks = least, _chunks(layout.least_chunk, layout.goal)
    else:
        return None
    return Choice(resident, _largest(chunks, lambda chunk: used(resident, chunk) <= ceiling), embedding)


def _chunks(least: int, most: int) -> list[int]:
    """Chunk sizes to choose from, ascending: the ends, and the multiples of 64 between them."""
    first = (least // CHUNK_STEP + 1) * CHUNK_STEP
    return sorted({least, *range(first, most, CHUNK_STEP), most})


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The largest of ``sizes`` that fits; the first one does, and what is larger needs more."""
    return sizes[bisect_left(sizes, True, lo=1, key=lambda size: not fits(size)) - 1]


def _host_limit(layout: Layout, host_free: int | None) -> int | None:
    """Bytes of host memory the run may take, the smaller of what was allowed and what is there."""
    asked = layout.offload.ram_gib
    if layout.offload.card is not None:
        host_free = None
    known = [limit for limit in (None if asked is None else int(asked * GIB), host_free) if limit is not None]
    return min(known) if known else None


def _link(configured: float | None, measured: float | None, card: Card | None) -> Link | None:
    # A value somebody wrote down is never overruled: the schema says null means "measured, or the card's".
    if configured is not None:
        return Link(configured, "offload.link_gb_per_s")
    if measured is not None:
        return Link(measured, "measured")
    if card is not None:
        estimated = "measured on one" if card.measured_link else "estimated"
        return Link(card.link_gb_per_s, f"{card.name}, {estimated}")
    return None
