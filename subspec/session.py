"""From the configuration to the objects that run: draft, target and engine."""

from dataclasses import dataclass, field
from typing import Any

import torch

from subspec.codec.coding import decoding_only
from subspec.config.enums import Codec
from subspec.config.schema import (
    Config,
    NoDraftConfig,
)
from subspec.decoding.bitwise_choice import Bitwise, choose_bitwise
from subspec.decoding.engine import Engine
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.base import BuiltDraft, Progress, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.build import draft_builder
from subspec.offload.loader import LoadedStream, load_streamed
from subspec.planning.plan import Plan
from subspec.quant.base import QuantReport
from subspec.targets import Target
from subspec.targets.source import LayerSource
from subspec.utils.console import Note, print_note


@dataclass
class Assembly:
    """An engine ready to run, and what was built for it (for the record: invariant 5).

    Attributes:
        quant: what was quantized for the draft; None: nothing was, whatever ``quant`` says.
        draft_facts, draft_summary: what the draft is made of (``BuiltDraft.facts``), for records and for people.
        bitwise: whether the target's passes are batch-invariant.
    """

    engine: Engine
    decoder: TargetModel
    sampling: Sampling
    quant: QuantReport | None
    streamed: LoadedStream | None = None
    draft_facts: dict[str, Any] = field(default_factory=dict)
    draft_summary: str = ""
    bitwise: Bitwise = field(default_factory=Bitwise)

    def close(self) -> None:
        """Give back page-locked host memory; the engine must not be used any more."""
        if self.streamed is not None:
            self.streamed.close()


def assemble_streamed(
    config: Config,
    source: LayerSource,
    plan: Plan,
    device: torch.device,
    progress: Progress | None = None,
    note: Note = print_note,
) -> Assembly:
    """Load a target as ``plan`` says and put an engine around it.

    Args:
        source: of the exact weights.
        plan: of :func:`subspec.planning.plan.plan_run`.
        note: told what takes long and what went wrong without ending the run.
    """
    # While the device is empty: the first run on a card measures.
    bitwise = choose_bitwise(config.decoding.bitwise, source.config, source.dtype, device, note)
    growth: TreePolicy | None = None
    built: BuiltDraft | None = None
    build = StreamedBuild()  # takes nothing of the layers
    if plan.codec is Codec.substitute and isinstance(config.draft, NoDraftConfig):
        # Nothing drafts, but what decodes the exact layers is the substitute all the same.
        decoding = decoding_only(config)
        context = StreamContext(decoding, build_tree_policy(config.tree), source, plan, device, note)
        build = draft_builder(decoding.draft).streamed(context)
    if not isinstance(config.draft, NoDraftConfig):
        growth = build_tree_policy(config.tree)
        context = StreamContext(config, growth, source, plan, device, note)
        build = draft_builder(config.draft).streamed(context)
    with build:
        streamed = load_streamed(
            source,
            plan,
            device,
            fuser=build.fuser,
            skip_layers=build.skip_layers,
            coded=build.coded,
            progress=progress,
        )
    bitwise.apply(streamed.decoder)
    if growth is not None:
        built = build.finish(streamed)
    sampling = build_sampling(config)
    engine = Engine(
        streamed.decoder,
        built.draft if built else None,
        growth,
        sampling=sampling,
        max_length=config.decoding.max_length,
        prefill_chunk=plan.prefill_chunk,
        eos_token_ids=source.eos_token_ids,
        tokenizer=source.tokenizer,
    )
    return _assembly(engine, streamed.decoder, sampling, built, bitwise, streamed)


def assemble(
    config: Config, target: Target, progress: Progress | None = None, note: Note = print_note
) -> Assembly:
    """Everything a run needs besides its prompts."""
    decoder = TargetModel(target.model)
    bitwise = choose_bitwise(
        config.decoding.bitwise,
        target.model.config,
        target.dtype,
        target.device,
        note,
        loaded=target.model,
    )
    bitwise.apply(decoder)
    growth: TreePolicy | None = None
    built: BuiltDraft | None = None
    if not isinstance(config.draft, NoDraftConfig):
        growth = build_tree_policy(config.tree)
        context = WholeContext(config, growth, target, decoder, progress, note)
        built = draft_builder(config.draft).whole(context)
    sampling = build_sampling(config)
    engine = Engine(
        decoder,
        built.draft if built else None,
        growth,
        sampling=sampling,
        max_length=config.decoding.max_length,
        prefill_chunk=config.decoding.prefill_chunk,
        eos_token_ids=target.eos_token_ids,
        tokenizer=target.tokenizer,
    )
    return _assembly(engine, decoder, sampling, built, bitwise)


def _assembly(
    engine: Engine,
    decoder: TargetModel,
    sampling: Sampling,
    built: BuiltDraft | None,
    bitwise: Bitwise,
    streamed: LoadedStream | None = None,
) -> Assembly:
    if built is None:
        return Assembly(engine, decoder, sampling, None, streamed, bitwise=bitwise)
    return Assembly(
        engine, decoder, sampling, built.quant, streamed, built.facts, built.summary, bitwise=bitwise
    )
