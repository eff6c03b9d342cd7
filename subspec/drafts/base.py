"""What a builder of drafts is given and what it hands back: one builder per kind of draft, two ways to run a target.

A kind of draft is a configuration (:mod:`subspec.config.schema`), a file in ``conf/draft``, a :class:`DraftBuilder` in
:mod:`subspec.drafts.build`, and, for ``offload=stream``, its sizes in :mod:`subspec.planning.draft_sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from subspec.config.schema import Config
from subspec.decoding.draft import Draft
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.quant.base import QuantReport
from subspec.targets.source import LayerSource
from subspec.targets.target import Target
from subspec.utils.console import Note, print_note

if TYPE_CHECKING:
    from subspec.codec.coded_cache import CodedCache
    from subspec.levels.build import LayerFuser
    from subspec.offload.loader import LoadedStream, LoadingPlan

Progress = Callable[[int, int], None]
"""Called with (layers done, layers)."""


@dataclass
class BuiltDraft:
    """A draft and what was built for it.

    Attributes:
        quant: what was quantized; None: nothing was.
        facts: builtin types for the record (invariant 5): where the draft's weights come from, its layers, its cache.
        summary: the same on one line for people, without the draft's name; empty: ``quant`` says it all.
    """

    draft: Draft
    quant: QuantReport | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class WholeContext:
    """A target that is whole on one device (``offload=none``)."""

    config: Config
    growth: TreePolicy
    target: Target
    decoder: TargetModel
    progress: Progress | None = None
    note: Note = print_note


@dataclass(frozen=True)
class StreamContext:
    """A target that is about to be loaded as ``plan`` says (``offload=stream``); the device is still empty."""

    config: Config
    growth: TreePolicy
    source: LayerSource
    plan: LoadingPlan
    device: torch.device
    note: Note = print_note


class StreamedBuild:
    """A draft in the making, around the loading of a streamed target.

    A context manager, left when the target's layers are loaded: it may hold files open until then.

    Attributes:
        fuser: takes every exact layer while it passes through the device; None: the draft takes nothing of them.
        skip_layers: layers that the fuser keeps exact.
        coded: keeps what the target's exact layers are coded to; None: they are not coded, or not kept.
    """

    fuser: LayerFuser | None = None
    skip_layers: frozenset[int] = frozenset()
    coded: CodedCache | None = None

    def __enter__(self) -> StreamedBuild:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def finish(self, streamed: LoadedStream) -> BuiltDraft:
        """The target is loaded, and the context left: hand over the draft."""
        raise NotImplementedError


class DraftBuilder(Protocol):
    """Builds one kind of draft."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        """For a target that is whole on one device."""

    def streamed(self, context: StreamContext) -> StreamedBuild:
        """For a target that streams. What can fail, fails here: nothing large is loaded yet."""
