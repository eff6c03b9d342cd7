"""One run, from its composed configuration to its records.

Steps that can fail early (configuration, prompts, the run folder) come before steps that take minutes (the target's
weights, quantization). The loop over samples stands in :mod:`subspec.runs.generation`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig

from subspec.benchmarks import Benchmark, Sample, load_benchmark
from subspec.config.checks import check_keys, prompt_limit
from subspec.config.enums import AUTO
from subspec.config.schema import AccelerateOffloadConfig, Config, Profile, StreamOffloadConfig, to_plain
from subspec.decoding.bitwise_choice import why_not
from subspec.errors import AuditError, SubspecError
from subspec.planning.plan_table import plan_table
from subspec.records.metrics import speedup, summarise
from subspec.records.resume import store_overrides
from subspec.records.run_files import ELSEWHERE, FACTS, PLAN, read_json
from subspec.records.run_folder import RunFolder, read_records
from subspec.records.same_run import check_chosen
from subspec.runs import notes
from subspec.runs.console import RunConsole
from subspec.runs.environment import cuda_vram_gib, device_vram_gib, environment, peak_vram_gib, reserved_vram_gib
from subspec.runs.generation import Generation
from subspec.runs.inputs import WEIGHTS, check_prompts, check_weights, with_first_budget, with_first_texts
from subspec.runs.loading import Loaded, about, load, resolve
from subspec.runs.logger import SafeLogger, make_logger
from subspec.runs.timeline import record_timeline
from subspec.runs.turn import RunContext, chat_messages
from subspec.session import check_draft, check_offload, plan_for, weights_identity
from subspec.targets import resolve_dtype
from subspec.utils.files import write_json, writing

WARMUP_TOKENS = 16
"""Tokens of a warm-up generation: a few iterations of every kind of pass."""


def run(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] = ()) -> float | None:
    """Run a composed configuration; records, summary and resolved configuration go to ``run_dir``.

    Args:
        overrides: overrides of ``cfg``, stored in the folder for ``resume=true``.

    Returns:
        The total named by ``optimise``; None without.

    Raises:
        SubspecError: an expected failure, in one line.
        AuditError: the run finished, but emitted a token that plain decoding would not have.
    """
    check_keys(cfg)
    console = RunConsole()
    config, device, model_config = resolve(cfg, console)
    if config.plan_only:
        _plan_only(config, model_config, device, run_dir, console)
        return None
    check_offload(config, device)
    check_draft(config, model_config, console.note)
    bitwise = not why_not(
        config.decoding.bitwise,
        model_config,
        resolve_dtype(config.target.dtype, device),
        device,
        accelerate=isinstance(config.offload, AccelerateOffloadConfig),
    )
    baseline = _read_baseline(config.baseline)
    benchmark = load_benchmark(config.benchmark, config.seed)
    # Printed before the folder is opened, which is refused if it holds other prompts.
    console.note(notes.prompts(benchmark))
    facts = environment()
    chosen = {"source": benchmark.source.value, "device": device.type, "bitwise": str(bitwise).lower()}
    if config.decoding.texts != AUTO:
        chosen["texts"] = str(config.decoding.texts)

    def check(records: Sequence[Mapping[str, Any]]) -> None:
        check_chosen(run_dir, records, chosen)
        check_prompts(run_dir, records, benchmark)

    with RunFolder.open(run_dir, resume=config.resume, config=to_plain(cfg), environment=facts, check=check) as folder:
        store_overrides(folder.path, overrides)
        for note in folder.notes:
            console.note(note)
        logger = make_logger(config.logger, console.warn)
        logger.start(to_plain(cfg), run_dir, facts, folder.records())
        console.note(logger.inner.note)
        summary, exit_code = None, 1
        try:
            summary = _Run(config, device, benchmark, folder, logger, console).execute()
            compared = baseline and speedup(summary, baseline, notes.shortened(config.baseline))
            if compared:
                summary["speedup"] = compared
            folder.write_summary(summary)
            logger.log_table(folder.records())
            console.table(summary, compared)
            console.note(f"records and summary: {folder.path}")
            console.note(notes.over_plain(summary["totals"]))
            console.note(notes.never_accepted(summary["totals"]))
            errors = (summary["audit"] or {}).get("errors", 0)
            exit_code = AuditError.exit_code if errors else 0
        finally:
            logger.finish(summary, exit_code)
    if exit_code:
        raise AuditError(
            f"the losslessness audit found {errors} token(s) or endings that are not plain decoding's "
            f"(largest gap {summary['audit']['max_gap']:.3g} logits): see the audit fields in {run_dir}/records.jsonl"
        )
    return summary["totals"][config.optimise.value] if config.optimise else None


def _plan_only(
    config: Config, model: PretrainedConfig, device: torch.device, run_dir: Path, console: RunConsole
) -> None:
    """Print and write the plan without loading. A named card needs no GPU."""
    named = isinstance(config.offload, StreamOffloadConfig) and config.offload.card is not None
    plan = plan_for(config, model, None if named else device)
    console.rich.print(plan_table(plan))
    with writing(run_dir / PLAN, ELSEWHERE):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / PLAN, plan.to_dict())
    console.note(f"plan: {run_dir / PLAN}")


@dataclass
class _Run:
    """Preparation, generation and summary."""

    config: Config
    device: torch.device
    benchmark: Benchmark
    folder: RunFolder
    logger: SafeLogger
    console: RunConsole
    facts: dict[str, Any] = field(default_factory=dict)
    loading_peaks: dict[str, float | None] = field(default_factory=dict)

    def execute(self) -> dict[str, Any]:
        """Generate the missing turns; returns the summary of all records in the folder."""
        samples = self.benchmark.samples
        pending = [(index, sample) for index, sample in enumerate(samples) if not self._is_finished(sample)]
        if pending:
            self._prepare(pending[0][1])
            done, texts = len(samples) - len(pending), self.assembly.engine.texts
            with self.console.progress(len(samples), done, texts) as progress:
                self.generation.run(pending, progress)
            self._keep_reserved()
        else:
            self.facts = read_json(self.folder.path / FACTS) or {}
            self.console.note("every sample is finished: nothing to generate")
        return {**summarise(self.folder.records()), "run": self.facts}

    def _is_finished(self, sample: Sample) -> bool:
        for turn in range(len(sample.turns)):
            record = self.folder.finished(sample.id, turn)
            if record is None or record.get("skipped"):
                return record is not None
        return True

    # ------------------------------------------------------------------------------------- preparation

    def _prepare(self, first: Sample) -> None:
        """Load, warm up, and write the run's facts."""
        config, console = with_first_budget(self.config, self.folder.path, self.device), self.console
        config = with_first_texts(config, self.folder.records())
        with about("target"):
            self.weights = weights_identity(config, console.note)
            if self.folder.resumed:
                check_weights(self.folder.path, asdict(config), self.weights)
            self.loaded: Loaded = load(config, self.device, console)
        self.target, self.assembly = self.loaded.target, self.loaded.assembly
        self.dtype = str(self.target.dtype).removeprefix("torch.")
        console.note(f"target {self.target.name} ({self.target.source}), {self.dtype} on {self.device}")
        if self.loaded.plan is not None:
            self.folder.write(PLAN, self.loaded.plan.to_dict())
        if self.assembly.draft_summary:
            console.note(f"draft {config.draft.name}: {self.assembly.draft_summary}")
        if self.assembly.quant is not None:
            console.note(f"draft {config.draft.name}: {notes.quantized(self.assembly.quant)}")
        context = RunContext(
            benchmark=self.benchmark.name,
            source=self.benchmark.source.value,
            target=self.target.name,
            draft=config.draft.name,
            device=self.device.type,
            planted=self.target.planted,
            seed=config.seed,
            bitwise=self.assembly.target.bitwise is not None,
            texts=self.assembly.engine.texts,
        )
        self.generation = Generation(config, context, self.benchmark, self.loaded, self.folder, self.logger)
        self._warm_up(first)
        self._end_loading()
        if config.profile is Profile.timeline:
            self._profile(first)
        self.facts = self._facts()
        self.folder.write(FACTS, self.facts)

    def _facts(self) -> dict[str, Any]:
        """Resolved settings of the run, written before the first record so that a kill keeps them."""
        quant, substitute = self.assembly.quant, None
        if quant is not None:
            counts = {"bits_per_weight": quant.bits_per_weight, "kept_exact": len(quant.kept_exact)}
            substitute = asdict(quant) | counts
        return {
            "target_source": self.target.source,
            WEIGHTS: self.weights,
            "dtype": self.dtype,
            "device": str(self.device),
            "texts": self.assembly.engine.texts,
            "torch_threads": torch.get_num_threads(),
            "substitute": substitute,
            "offload": self.config.offload.name,
            **self.loaded.facts(),
            "benchmark_source": self.benchmark.source.value,
            "benchmark_detail": self.benchmark.source_detail,
            "benchmark_rows": self.benchmark.available,
            "benchmark_note": self.benchmark.note,
            "benchmark_skipped": self.benchmark.skipped,
            "warmup_generations_excluded": self.config.warmup,
            **self.loading_peaks,
            "notes": list(self.target.notes),
        }

    def _warm_up(self, sample: Sample) -> None:
        """Run untimed generations, as many at a time as texts, so that lazy initialisation, kernel selection and caches
        are done."""
        prompt = self._first_prompt(sample)
        engine, scheduler = self.assembly.engine, self.generation.scheduler
        if self.config.warmup:
            engine.prepare(prompt)
        tokens = min(WARMUP_TOKENS, self.config.decoding.max_new_tokens or WARMUP_TOKENS)
        for _ in range(self.config.warmup * engine.texts):
            scheduler.add(prompt, max_new_tokens=tokens, ignore_eos=True)
        while not scheduler.idle:
            for text in scheduler.step():
                if text.error is not None:
                    raise text.error

    def _end_loading(self) -> None:
        """Keep the memory peaks of loading, which a budget bounds too, and reset them for the records."""
        if self.device.type != "cuda":
            return
        self.loading_peaks = {
            "loading_peak_vram_gib": peak_vram_gib(),
            "reserved_vram_gib": reserved_vram_gib(),
            "loading_device_vram_gib": device_vram_gib(),
            "loading_cuda_vram_gib": cuda_vram_gib(),
        }
        if over := notes.over_budget(self.assembly.vram, device_vram_gib()):
            self.console.warn(over)
        torch.cuda.reset_peak_memory_stats(self.device)

    def _keep_reserved(self) -> None:
        """Record the peak of reserved memory over loading and generation."""
        before = self.loading_peaks.get("reserved_vram_gib")
        now = reserved_vram_gib()
        if before is None or now is None:
            return
        self.facts["reserved_vram_gib"] = max(before, now)
        self.folder.write(FACTS, self.facts)

    def _profile(self, sample: Sample) -> None:
        """Trace one text that is in no figure."""
        for file in record_timeline(self.assembly.engine, self._first_prompt(sample), self.folder.path):
            self.console.note(f"timeline: {file}")

    def _first_prompt(self, sample: Sample) -> list[int]:
        return self.target.chat_ids(chat_messages(sample.turns[:1]))[: prompt_limit(self.config)]


def _read_baseline(run_dir: str | None) -> dict[str, Any] | None:
    """Summary of the baseline run, from its records."""
    if run_dir is None:
        return None
    with about("baseline"):
        records, _ = read_records(run_dir)
    if not records:
        raise SubspecError(f"baseline={run_dir} holds no records: give the folder of a finished run")
    return summarise(records)
