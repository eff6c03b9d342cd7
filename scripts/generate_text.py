"""Let a target write the text that its drafts learn from: conversations with itself.

    python scripts/generate_text.py --out text/ --minutes 2

Half of the conversations start with a user message that the target makes up, the others with prompts of this
project (scripts/training/prompts.py). Existing shards are not written again, so the same command continues an
interrupted run.
"""

import argparse
import random
import time
from pathlib import Path

from training.chat_writer import ChatFrame, ChatWriter, Start
from training.corpus import shard_path, write_shard
from training.prompts import messages
from training.setup import open_target, report, target_parser

from subspec.errors import SubspecError
from subspec.targets import Target


def parse() -> argparse.Namespace:
    parser = target_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--minutes", type=float, help="start no shard that would end later than this")
    parser.add_argument("--shards", type=int, default=16, help="most shards, those already there included")
    parser.add_argument("--rows", type=int, default=4096, help="conversations per shard, written side by side")
    parser.add_argument("--length", type=int, default=578, help="tokens per conversation")
    parser.add_argument("--max-answer", type=int, default=256, help="tokens after which an answer is cut")
    parser.add_argument("--self-asked", type=float, default=0.5, help="share with a first message by the target")
    parser.add_argument("--greedy", type=float, default=0.8, help="share with greedy answers")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the other answers")
    return parser.parse_args()


def starts(options: argparse.Namespace, target: Target, frame: ChatFrame, shard: int) -> list[Start]:
    """Starts of the conversations of one shard, in seeded order."""
    invented = round(options.self_asked * options.rows)
    asked = [
        Start(tuple(target.chat_ids([{"role": "user", "content": text}])), True)
        for text in messages(options.seed, shard, options.rows - invented)
    ]
    # Prompts that leave no room for an answer are replaced.
    fitting = [start for start in asked if len(start.ids) <= options.length // 2]
    made = fitting + [Start(frame.opening, False)] * (options.rows - len(fitting))
    random.Random(f"starts {options.seed} {shard}").shuffle(made)
    return made


def main() -> None:
    options = parse()
    if not 0 <= options.self_asked <= 1 or not 0 <= options.greedy <= 1:
        raise SubspecError("--self-asked and --greedy are shares between 0 and 1")
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    target = open_target(options)
    frame = ChatFrame.of(target.tokenizer)
    if options.length <= 2 * len(frame.opening):
        raise SubspecError(
            f"--length {options.length} is too short: the chat template alone takes {len(frame.opening)}"
        )
    kept = ("seed", "rows", "length", "max_answer", "self_asked", "greedy", "temperature")
    facts = {key: getattr(options, key) for key in kept} | {"target": target.source, "dtype": str(target.dtype)}
    writer = None
    slowest = 0.0
    for shard in range(options.shards):
        path = shard_path(options.out, shard)
        if path.exists():
            print(f"{path} exists", flush=True)
            continue
        spent = time.perf_counter() - began
        if options.minutes is not None and spent + slowest > 60 * options.minutes:
            break
        writer = writer or ChatWriter(
            target.model, frame, rows=options.rows, length=options.length, max_answer=options.max_answer
        )
        started = time.perf_counter()
        spoke = started

        def tick(steps: int, shard: int = shard, started: float = started) -> None:
            nonlocal spoke
            now = time.perf_counter()
            if now - spoke >= 5:
                pace = steps * options.rows / (now - started)
                print(f"shard {shard}: {steps}/{options.length} steps, {pace:,.0f} tokens/s", flush=True)
                spoke = now

        cool = round(options.greedy * options.rows)
        temperatures = [0.0] * cool + [options.temperature] * (options.rows - cool)
        random.Random(f"temperatures {options.seed} {shard}").shuffle(temperatures)
        begin = starts(options, target, frame, shard)
        ids, learn = writer.write(begin, temperatures, seed=options.seed * 1_000_003 + shard, tick=tick)
        write_shard(path, ids, learn, facts)
        took = time.perf_counter() - started
        slowest = max(slowest, took)
        print(
            f"{path}: {ids.numel():,} tokens, {float(learn.float().mean()):.0%} of them answers, {took:.1f} s, "
            f"{ids.numel() / took:,.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    report(main)
