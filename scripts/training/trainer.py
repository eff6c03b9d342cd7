"""The training loop: AdamW on float32 weights, bf16 arithmetic, warm-up and cosine decay.

A step's batch and noise depend on the seed and the step's number alone, and a checkpoint holds everything else. So a
resumed run ends with the weights of an uninterrupted one (with ``steps``; a budget in minutes ends by the clock).
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subspec.errors import SubspecError
from training.corpus import Batches, Corpus

Note = Callable[[str], None]

SPEAK_EVERY_S, SAVE_EVERY_S = 10.0, 30.0


class Lesson(Protocol):
    """A module to train, and its losses.

    Attributes:
        module: its parameters are trained, in float32.
    """

    module: nn.Module

    def loss(self, ids: Tensor, learn: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (int64 and bool [rows, length], on the CPU), and figures for the progress line."""

    def evaluate(self, ids: Tensor, learn: Tensor) -> dict[str, float]:
        """Figures on held-out text."""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run.

    Attributes:
        steps: most optimizer steps; None: no limit.
        minutes: most time, over all resumed parts; None: no limit.
        rows: conversations per step.
        lr: peak learning rate.
        warmup: share of the run in which it rises; it falls to ``lr * floor`` along a cosine.
        weight_decay: of matrices; clip: largest norm of the gradient.
        seed: of order and noise.
    """

    steps: int | None = None
    minutes: float | None = None
    rows: int = 32
    lr: float = 1e-3
    warmup: float = 0.03
    floor: float = 0.01
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise SubspecError("training needs an end: give --steps, --minutes or both")

    def progress(self, step: int, seconds: float) -> float:
        """Finished share of the run, at most 1."""
        by_steps = step / self.steps if self.steps else (1.0 if self.steps == 0 else 0.0)
        by_time = seconds / (60 * self.minutes) if self.minutes else (1.0 if self.minutes == 0 else 0.0)
        return min(1.0, max(by_steps, by_time))

    def rate(self, progress: float) -> float:
        """Learning rate at a point of the run."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 0.01)
        rest = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * rest)))


@contextmanager
def _stop_request() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the current step is finished and saved first."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains one lesson on one corpus.

    Args:
        checkpoint: file that training can be resumed from.
        settings: of the lesson; a checkpoint of other settings is refused.
        note: receives progress lines.
    """

    def __init__(
        self,
        lesson: Lesson,
        corpus: Corpus,
        schedule: Schedule,
        checkpoint: Path,
        settings: dict[str, Any],
        note: Note = print,
    ) -> None:
        self.lesson, self.corpus, self.schedule = lesson, corpus, schedule
        self.checkpoint, self.note = checkpoint, note
        self.batches = Batches(corpus, schedule.rows, schedule.seed)
        # The end may change when resuming; everything else determines the weights.
        kept = {key: value for key, value in asdict(schedule).items() if key not in ("steps", "minutes")}
        self.settings = {**settings, **kept, "text": corpus.facts, "rows_of_text": len(corpus.ids)}
        parameters = [p for p in lesson.module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.parameters, self.device = parameters, parameters[0].device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95), fused=fused)
        self.step, self.seconds = 0, 0.0
        self._norm = torch.zeros(())

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            SubspecError: it belongs to other settings.
        """
        if not self.checkpoint.exists():
            self.note(f"no checkpoint {self.checkpoint}: starting at step 0")
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["settings"] != self.settings:
            mine, other = self.settings, state["settings"]
            changed = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
            raise SubspecError(
                f"--resume: {self.checkpoint} was made with other settings ({', '.join(changed)}): give the same "
                "options, or leave --resume out to start again"
            )
        self.lesson.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.note(f"resumed {self.checkpoint} at step {self.step}, after {self.seconds:.0f} s of training")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            SubspecError: the gradient is not finite; the old checkpoint stays.
        """
        # Checked only here: reading it back makes the host wait for the device.
        if not bool(torch.isfinite(self._norm)):
            raise SubspecError(f"step {self.step}: the gradient is not finite; lower --lr and start again")
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {
            "module": self.lesson.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings,
        }
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def run(self) -> dict[str, float]:
        """Train to the end of the schedule; figures on the held-out rows.

        Raises:
            KeyboardInterrupt: asked to stop (Ctrl-C, SIGTERM), after saving.
        """
        started = time.perf_counter() - self.seconds
        spoke = saved = time.perf_counter()
        spoke_step, running = self.step, {}
        with _stop_request() as asked:
            while (progress := self.schedule.progress(self.step, self.seconds)) < 1.0:
                figures = self._one_step(progress)
                self.step += 1
                for name, value in figures.items():
                    running[name] = running.get(name, 0.0) + value
                now = time.perf_counter()
                self.seconds = now - started
                if now - spoke >= SPEAK_EVERY_S:
                    self._speak(running, self.step - spoke_step, now - spoke)
                    spoke, spoke_step, running = time.perf_counter(), self.step, {}
                if asked or now - saved >= SAVE_EVERY_S:
                    self.save()
                    saved = time.perf_counter()
                if asked:
                    self.note(f"stopped at step {self.step} and saved {self.checkpoint}: --resume continues")
                    raise KeyboardInterrupt
        if self.step > spoke_step:
            self._speak(running, self.step - spoke_step, time.perf_counter() - spoke)
        self.save()
        return self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """Figures on the held-out rows, also noted."""
        figures = self.lesson.evaluate(self.corpus.held_ids.long(), self.corpus.held_learn)
        self.note("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        return figures

    def _one_step(self, progress: float) -> dict[str, Tensor]:
        schedule = self.schedule
        generator = torch.Generator(self.device).manual_seed(schedule.seed * 1_000_003 + self.step)
        rate = schedule.rate(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, figures = self.lesson.loss(*self.batches[self.step], generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, schedule.clip)
        self._norm = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **figures, "gradient": norm.detach()}

    def _speak(self, running: dict[str, Tensor], steps: int, seconds: float) -> None:
        tokens = steps * self.batches.rows * self.corpus.ids.shape[1]
        means = ", ".join(f"{name} {float(total) / steps:.3f}" for name, total in running.items())
        share = self.schedule.progress(self.step, self.seconds)
        pace = tokens / max(seconds, 1e-9)
        self.note(
            f"step {self.step} ({share:.0%}, epoch {self.step / self.batches.per_epoch:.2f}): {means}; "
            f"{pace:,.0f} tokens/s"
        )
