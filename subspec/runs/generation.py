"""The loop over a run's samples: as many texts at a time as the engine has places, and a record of each that ends.

Samples join in the benchmark's order as places get free, and keep their place until their last turn. A turn starts
when the one before it is on disk. Audits, answer checks and loggers work between passes, when all clocks stand still
(:meth:`~subspec.decoding.engine.Engine.paused`).
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from subspec.benchmarks import Benchmark, Sample, check_answer, extract_answer
from subspec.config.checks import prompt_limit
from subspec.config.schema import Config
from subspec.decoding.audit import Auditor
from subspec.decoding.result import FinishReason, GenerationResult
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.text import Text
from subspec.records.run_folder import RunFolder
from subspec.runs.console import RunProgress
from subspec.runs.environment import device_vram_gib, peak_ram_gib, peak_vram_gib
from subspec.runs.loading import Loaded
from subspec.runs.logger import SafeLogger
from subspec.runs.turn import RunContext, chat_messages, skipped_record, turn_record

PLAIN_TOKENS, PLAIN_TURNS = 4, 5
"""Most passes of plain decoding that are timed for the speed-up behind a text (a fifth of its own passes at most), and
texts of a session that have them: spread over the run, because the machine's load changes, and few, because a streamed
pass may take a second."""


@dataclass(eq=False)
class _Conversation:
    """A sample on its way.

    Attributes:
        index: position of the sample in the run's selection.
        said: user and assistant messages, alternating.
        records: of its turns so far.
        prompt: token ids of the running turn.
        loop_s: the running turn's share of the loop's seconds.
    """

    index: int
    sample: Sample
    said: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    prompt: Sequence[int] = ()
    loop_s: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether no turn is left to ask."""
        skipped = bool(self.records) and self.records[-1].get("skipped")
        return bool(skipped) or len(self.records) == len(self.sample.turns)

    @property
    def place(self) -> dict[str, Any]:
        """Fields of the record of the turn that comes next."""
        sample, turn = self.sample, len(self.records)
        return {"sample_id": sample.id, "sample_index": self.index, "turn": turn, "category": sample.category}

    def answered(self, record: dict[str, Any]) -> None:
        """Go on behind a turn."""
        self.records.append(record)
        self.said.append(record.get("text") or "")


@dataclass
class Generation:
    """Generates the turns that a run folder lacks.

    Args:
        context: fields that every record repeats.
        loaded: the engine; as many texts run at a time as it has places.
        folder, logger: receive every record when its turn is finished.
    """

    config: Config
    context: RunContext
    benchmark: Benchmark
    loaded: Loaded
    folder: RunFolder
    logger: SafeLogger

    def __post_init__(self) -> None:
        assembly, config, decoding = self.loaded.assembly, self.config, self.config.decoding
        self.engine = assembly.engine
        self.engine.keeps_digests = config.audit and assembly.target.bitwise is not None
        self.scheduler = Scheduler(self.engine, self.engine.texts)
        self.auditor = None
        if config.audit:
            self.auditor = Auditor(assembly.target, assembly.sampling, margin=config.audit_margin)
        self._rules = {
            "max_new_tokens": decoding.max_new_tokens,
            "stop": decoding.stop,
            "ignore_eos": decoding.ignore_eos,
        }
        self._running: dict[Text, _Conversation] = {}
        self._plain_turns = 0

    def run(self, pending: Iterable[tuple[int, Sample]], progress: RunProgress) -> None:
        """Generate the missing turns of ``pending`` samples, given with their positions in the run's selection.

        Raises:
            SubspecError: a text cannot go on, or a record cannot be written. Those that are written stay.
        """
        self._waiting = deque(_Conversation(index, sample) for index, sample in pending)
        self._progress = progress
        self._fill()
        while self._running:
            ended = self._step()
            if not ended:
                continue
            with self.engine.paused():
                for text in sorted(ended, key=lambda text: text.error is not None):  # an error ends the run
                    self._finish(text)
                self._fill()

    def _fill(self) -> None:
        """Start samples while places are free."""
        while self._waiting and len(self._running) < self.scheduler.texts:
            self._ask(self._waiting.popleft())
        self._progress.running = len(self._running)

    def _step(self) -> list[Text]:
        """One pass for the running texts, which share its seconds equally; returns those that ended."""
        begin = time.perf_counter()
        ended = self.scheduler.step()
        share = (time.perf_counter() - begin) / len(self._running)
        for one in self._running.values():
            one.loop_s += share
        return ended

    def _ask(self, one: _Conversation) -> None:
        """Start the first turn that has no record, or report the sample as finished."""
        while not one.ended:
            turn = len(one.records)
            one.said.append(one.sample.turns[turn])
            record = self.folder.finished(one.sample.id, turn)
            if record is None:
                one.prompt, one.loop_s = self.loaded.target.chat_ids(chat_messages(one.said)), 0.0
                if len(one.prompt) <= prompt_limit(self.config):
                    seed = turn_seed(self.config.seed, one.sample.id, turn)
                    self._running[self.scheduler.add(one.prompt, seed=seed, **self._rules)] = one
                    return
                record = skipped_record(
                    self.context,
                    **one.place,
                    messages=chat_messages(one.said),
                    prompt_tokens=len(one.prompt),
                    limit=prompt_limit(self.config),
                )
                self._write(record)
            one.answered(record)
        self._progress.sample_finished(*one.records)

    def _finish(self, text: Text) -> None:
        """Record a text that ended, and go on with its sample."""
        one = self._running.pop(text)
        if text.error is not None:
            raise text.error
        record = self._record(one, text)
        self._write(record)
        one.answered(record)
        self._ask(one)

    def _write(self, record: dict[str, Any]) -> None:
        self.folder.append(record)
        self.logger.log_turn(record, len(self.folder) - 1)
        self._progress.turn(record)

    def _record(self, one: _Conversation, text: Text) -> dict[str, Any]:
        """The record of a finished text."""
        result, benchmark = text.result, self.benchmark.name
        assert result is not None
        answer, cut = result.text or "", result.finish_reason is FinishReason.length
        last = len(one.records) == len(one.sample.turns) - 1
        reference = one.sample.answer if last else None
        return turn_record(
            self.context,
            result,
            **one.place,
            messages=chat_messages(one.said),
            beside=text.beside,
            loop_s=one.loop_s,
            link=self.loaded.link,
            plain=self._time_plain(result),
            audit=self._audit(one, result),
            peak_vram_gib=peak_vram_gib(),
            device_vram_gib=device_vram_gib(),
            peak_ram_gib=peak_ram_gib(),
            correct=check_answer(benchmark, answer, reference, cut),
            extracted=extract_answer(benchmark, answer, cut) if reference is not None else None,
            reference=reference,
        )

    def _time_plain(self, result: GenerationResult) -> tuple[int, float] | None:
        """Time plain decoding behind the text; not with several texts at a time, where others hold the places."""
        engine, passes = self.engine, result.stats.iterations
        if engine.texts > 1 or engine.draft is None or self._plain_turns >= PLAIN_TURNS or not passes:
            return None
        self._plain_turns += 1
        return engine.time_plain(min(PLAIN_TOKENS, max(1, passes // 5)))

    def _audit(self, one: _Conversation, result: GenerationResult) -> dict[str, Any] | None:
        if self.auditor is None:
            return None
        seed = turn_seed(self.config.seed, one.sample.id, len(one.records))
        ending = (self.engine.output_buffer(one.prompt, **self._rules), result.finish_reason)
        found = self.auditor.audit(one.prompt, result.token_ids, seed=seed, digests=result.digests, ending=ending)
        return asdict(found)


def turn_seed(seed: int, sample_id: str, turn: int) -> int:
    """Seed of a turn: independent of other samples and of a resume."""
    digest = hashlib.blake2b(f"{seed}/{sample_id}/{turn}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
