"""Weights & Biases: a series per turn, one table of samples, the report's figures, and the run's totals.

Runs of one experiment are a group (``logger.group``), job types are the drafts, and ``method`` in the configuration is
the report's label. ``scripts/wandb_dashboard.py`` makes a workspace from these.

``logger.mode=auto`` never prompts. Without a key, or without an answer from the service within
``logger.init_timeout_s``, the run is written offline into its folder, for ``wandb sync``.

A resumed run keeps its W&B id (``wandb_run.json`` in the run folder). Online, W&B continues the run. Offline, a new
folder of the same id holds the earlier turns too, so that uploading the last folder is enough.

``wandb`` is imported when a run starts with this logger, because the import takes half a second.
"""

import io
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from subspec.config.schema import WandbConfig, WandbMode
from subspec.errors import ConfigError
from subspec.records.method import config_group, method_label, quant_label
from subspec.records.metrics import PER_TURN_FIGURES, add_turn, speeds
from subspec.records.run_files import read_json
from subspec.runs.logger import Fields, Logger, describe
from subspec.runs.wandb_service import drop_service, has_credentials, import_wandb, reachable
from subspec.utils.files import plain, write_json

RUN_FILE = "wandb_run.json"

STEP = "sample_index"
"""Axis of every series. The turns of a conversation share a sample and a position."""

SERIES = (
    *PER_TURN_FIGURES,
    *("draft_s", "verify_s", "transfer_s", "roofline_tokens_per_s", "peak_vram_gib", "device_vram_gib", "peak_ram_gib"),
)
"""Record fields that become series; None values are left out."""

COLUMNS = (
    *("sample_id", "turn", "category", "prompt_tokens", "new_tokens", "tokens_per_s", "tau", "finish_reason"),
    *("correct", "audit_mismatch", "audit_max_gap", "skipped", "text"),
)

TEXT_LIMIT = 500
"""Characters of a text in the samples table; ``records.jsonl`` holds the whole text."""


class WandbLogger(Logger):
    """Logs to Weights & Biases, online or offline.

    Attributes:
        mode: resolved mode: ``online``, ``offline`` or ``disabled``; empty before the start.
    """

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self.mode = ""
        self.note = ""
        # At most two attempts (online, then offline), each with the library's grace period of ten seconds.
        self.deadlines_s = {**Logger.deadlines_s, "start": 2 * (config.init_timeout_s + 15.0) + 15.0}
        self._wandb: Any = None
        self._run: Any = None
        self._described: tuple[Path, Fields, Fields]
        self._step = 0  # the next free row of the run's history
        self._sums: Counter[str] = Counter()

    def start(self, config: Fields, run_dir: Path, environment: Fields, finished: Sequence[Fields] = ()) -> None:
        """Begin or continue the W&B run. Raises ConfigError if ``logger.mode=online`` finds no key or no service."""
        self._wandb = import_wandb()
        run_dir = run_dir.resolve()
        self._setup()
        run_id, known = _run_id(run_dir)
        # "allow" also for a new id: "never" would refuse the second session of a run whose first was killed early.
        arguments = {
            "id": run_id,
            "resume": "allow",
            "dir": str(run_dir),
            "project": self.config.project,
            "entity": self.config.entity,
            "group": self.config.group,
            "tags": list(self.config.tags) or None,
            "job_type": config_group(config, "draft").get("name"),
            "name": run_name(config),
            "config": {**plain(config), "environment": plain(environment), "method": method_label(config)},
        }
        self._described = (run_dir, config, environment)
        self._init(arguments)
        if self._run is None:  # switched off
            return
        # No automatic summary: it would hold the last turn's values. The totals are written at the end.
        self._run.define_metric(STEP, summary="none", hidden=True)
        for pattern in (*SERIES, "correct", "audit/*", "total/*"):
            self._run.define_metric(pattern, step_metric=STEP, summary="none")
        self._step = self._run.step if getattr(self._run, "resumed", False) else 0
        sent = self._step
        for position, record in enumerate(finished):
            add_turn(self._sums, record)
            if position >= sent:  # the service holds the others
                self._log(record, position)
        if known and finished:
            again = "continued" if self.mode == "online" else f"with the {len(finished)} earlier turn(s) again"
            self.note += f"; run {run_id} {again}"

    def log_turn(self, record: Fields, step: int) -> None:
        """Log the turn's series and the running totals; nothing for a skipped prompt."""
        if self._run is not None:
            add_turn(self._sums, record)
            self._log(record, step)

    def log_table(self, records: Sequence[Fields]) -> None:
        """Log the samples table and the report's figures of this run."""
        if self._run is None:
            return
        table = self._wandb.Table(columns=list(COLUMNS), data=[_row(record) for record in records])
        self._run.log({"samples": table}, step=self._take_step(len(records)))
        if pictures := self._pictures(records):
            self._run.log(pictures, step=self._take_step(len(records)))

    def finish(self, summary: Fields | None, exit_code: int = 0) -> None:
        """Log acceptance by depth and the summary, and close the run in any case."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            if summary is not None:
                self._plot_acceptance(run, summary)
                run.summary.update(flat_summary(summary))
        finally:
            run.finish(exit_code=exit_code)

    def abandon(self) -> None:
        """Kill the library's helper process."""
        self._run = None
        if self._wandb is not None:
            drop_service(self._wandb)

    # ---------------------------------------------------------------------------------------- starting

    def _init(self, arguments: dict[str, Any]) -> None:
        wandb, wanted = self._wandb, self.config.mode
        by_environment = os.environ.get("WANDB_MODE", "") if wanted is WandbMode.auto else ""
        if by_environment == "disabled":
            self.mode, self.note = "disabled", "W&B: switched off by WANDB_MODE=disabled"
            return
        reason = ""
        if by_environment in ("offline", "dryrun"):
            reason = "WANDB_MODE=offline"
        elif wanted is not WandbMode.offline:
            reason = self._try_online(arguments)
            if not reason:
                return
            if wanted is WandbMode.online:
                raise ConfigError(
                    f"logger.mode=online, but {reason}: log in with `wandb login`, check the network, or use "
                    "logger.mode=offline (logger.mode=auto goes offline by itself)"
                )
        self._run = wandb.init(mode="offline", settings=self._run_settings(), **arguments)
        self.mode = "offline"
        why = f" ({reason})" if reason else ""
        self.note = f"W&B: offline{why}; upload with `wandb sync {os.path.relpath(Path(self._run.dir).parent)}`"

    def _try_online(self, arguments: dict[str, Any]) -> str:
        """Go online. Returns the reason if that fails, else an empty string."""
        wandb = self._wandb
        if not has_credentials(wandb):
            return "no W&B key found"
        host = wandb.setup().settings.base_url
        if not reachable(host, min(self.config.init_timeout_s, 5.0)):
            return f"{urlsplit(host).hostname} cannot be reached"
        runs = Path(arguments["dir"], "wandb")
        before = set(runs.glob("run-*"))
        try:
            self._run = wandb.init(mode="online", settings=self._run_settings(), **arguments)
        except Exception as error:
            self._forget_attempt(set(runs.glob("run-*")) - before)
            return f"W&B did not let the run start within {self.config.init_timeout_s:g} s, {describe(error)}"
        self.mode = "online"
        self.note = f"W&B: {self._run.url}"
        return ""

    def _setup(self) -> None:
        self._wandb.setup(settings=self._settings(silent=True))

    def _forget_attempt(self, folders: set[Path]) -> None:
        """Clean up after a failed start: the old helper process holds the run's id, so a new one is started."""
        drop_service(self._wandb)
        self._setup()
        for folder in folders:  # no turn was logged; nothing is to be uploaded
            shutil.rmtree(folder, ignore_errors=True)

    def _run_settings(self) -> Any:
        return self._settings(
            silent=True,
            console="off",  # a wrapped stdout breaks the progress bar
            disable_git=True,  # the environment holds the revision; the remote's address stays private
            save_code=False,
            init_timeout=self.config.init_timeout_s,
            finish_timeout=self.deadlines_s["finish"] - 20.0,
        )

    def _settings(self, **values: Any) -> Any:
        """Settings that the installed version of the library supports."""
        settings = self._wandb.Settings
        return settings(**{name: value for name, value in values.items() if name in settings.model_fields})

    # ----------------------------------------------------------------------------------------- logging

    def _take_step(self, position: int) -> int:
        """The row of a position, or the next free row: W&B drops rows that go back."""
        step = max(position, self._step)
        self._step = step + 1
        return step

    def _log(self, record: Fields, position: int) -> None:
        if record.get("skipped"):
            return
        values: dict[str, Any] = {name: record.get(name) for name in SERIES}
        values["correct"] = None if record.get("correct") is None else int(record["correct"])
        audit = record.get("audit") or {}
        values |= {f"audit/{name}": audit.get(name) for name in ("exact", "near_tie", "mismatch", "max_gap")}
        totals = speeds(self._sums) | {"new_tokens": self._sums["new_tokens"]}
        values |= {f"total/{name}": value for name, value in totals.items()}
        values = {name: value for name, value in values.items() if value is not None}
        self._run.log({STEP: record["sample_index"], **values}, step=self._take_step(position))

    def _pictures(self, records: Sequence[Fields]) -> dict[str, Any]:
        """Figures of :func:`~subspec.report.run_figures.run_figures` as ``plots/NAME``."""
        # Lazy imports: matplotlib takes a second.
        from PIL import Image

        from subspec.report.run_figures import run_figures

        images = {}
        for name, figure in run_figures(*self._described, records).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            images[f"plots/{name}"] = self._wandb.Image(Image.open(buffer))
        return images

    def _plot_acceptance(self, run: Any, summary: Fields) -> None:
        rates = summary["totals"]["accept_rate_by_depth"]
        rows = [[depth, rate] for depth, rate in enumerate(rates, start=1) if rate is not None]
        if rows:
            table = self._wandb.Table(columns=["depth", "accept_rate"], data=rows)
            plot = self._wandb.plot.line(table, "depth", "accept_rate", title="Acceptance rate by depth")
            run.log({"accept_rate_by_depth": plot}, step=self._take_step(0))


# ------------------------------------------------------------------------------------------------ parts


def run_name(config: Fields) -> str:
    """Name of a run: target, draft with its quantizer, benchmark and seed."""
    target, draft, benchmark = (config_group(config, group).get("name") for group in ("target", "draft", "benchmark"))
    quant = quant_label(config)
    return f"{target} {draft}{f'-{quant}' * bool(quant)} {benchmark} seed{config['seed']}"


def flat_summary(summary: Fields) -> dict[str, Any]:
    """Figures of a summary: totals without prefix, others as ``audit/exact``; without lists and nulls."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{prefix}/{key}" if prefix else str(key), item)
        elif value is not None and not isinstance(value, list):
            flat[prefix] = value

    add("", plain(summary["totals"]))
    for name, value in summary.items():
        if name not in ("totals", "config", "environment"):
            add(name, plain(value))
    return flat


def _run_id(run_dir: Path) -> tuple[str, bool]:
    """The W&B id of this run folder, and whether it existed before."""
    file = run_dir / RUN_FILE
    run_id = (read_json(file) or {}).get("id")
    if isinstance(run_id, str) and run_id.isalnum():
        return run_id, True
    # A W&B agent has chosen the id already; another id would not belong to its sweep.
    assigned = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    run_id = assigned if assigned.isalnum() else secrets.token_hex(4)
    write_json(file, {"id": run_id})
    return run_id, False


def _row(record: Fields) -> list[Any]:
    audit, text = record.get("audit") or {}, record.get("text")
    if text is not None and len(text) > TEXT_LIMIT:
        text = text[:TEXT_LIMIT] + "…"
    special = {
        "audit_mismatch": audit.get("mismatch"),
        "audit_max_gap": audit.get("max_gap"),
        "skipped": (record.get("skipped") or {}).get("reason"),
        "text": text,
    }
    return [special[name] if name in special else record.get(name) for name in COLUMNS]
