"""One run logged to W&B, for a process of its own: the library keeps state for as long as a process lives."""

import json
import time
from pathlib import Path

from subspec.config.schema import WandbConfig, WandbMode
from subspec.errors import SubspecError
from subspec.records.metrics import LinkInfo, speedup, summarise
from subspec.runs.logger import make_logger
from tests.helpers.records import CONFIG, record


def log_run(arguments: list[str]) -> None:
    """``RUN_DIR MODE INIT_TIMEOUT TURNS [FINISHED] [--drawn] [--link]``; prints one line, and one of JSON last."""
    run_dir, mode, timeout, turns, *more = arguments
    turns, done = int(turns), int(more[0]) if more and more[0].isdigit() else 0
    config = WandbConfig(
        name="wandb",
        mode=WandbMode(mode),
        project="tests",
        group="an experiment",
        tags=["a"],
        init_timeout_s=float(timeout),
    )
    link = LinkInfo(50.0, 2_000_000_000) if "--link" in more else None
    records = [record(index, link=link, text="long " * 500) for index in range(turns)]
    warnings: list[str] = []
    logger, started, error = make_logger(config, warnings.append), time.monotonic(), None
    if "--drawn" not in more:
        logger.inner._pictures = lambda records: {}  # they take longer than the rest
    Path(run_dir).mkdir(exist_ok=True)
    try:
        logger.start(CONFIG, Path(run_dir), {"versions": {"torch": "2"}}, finished=records[:done])
        print("the run's own line", flush=True)
        for step, made in enumerate(records[done:], start=done):
            logger.log_turn(made, step)
        logger.log_table(records)
        summary = summarise(records)
        logger.finish({**summary, "speedup": speedup(summary, summary, "itself")}, 0)
    except SubspecError as refused:
        error = str(refused)
        logger.finish(None, refused.exit_code)
    said = {"note": logger.inner.note, "warnings": warnings, "error": error, "seconds": time.monotonic() - started}
    print(json.dumps(said), flush=True)
