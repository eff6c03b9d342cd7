"""``python -m subspec.chat``: talk to a target, and see its speed after every answer.

Modules that import torch are imported after the command line has been checked.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from subspec.config.guard import guarded
from subspec.errors import SubspecError

if TYPE_CHECKING:
    from subspec.decoding.result import GenerationResult
    from subspec.utils.console import Note

HELP = """\
Talk to a model. After every answer: tokens per second, tau (tokens per pass of the target) and passes.

usage: python -m subspec.chat [KEY=VALUE ...]

  python -m subspec.chat
  python -m subspec.chat target=hub target.path=FOLDER offload=stream offload.vram_gib=8
  echo "What is a tree?" | python -m subspec.chat draft=none

Groups and keys of target, draft, quant, tree, offload and decoding are those of `python -m subspec.run` (its --help
lists them). An answer ends by itself, at decoding.max_new_tokens, or with Ctrl-C.

  /clear   forget the conversation
  /exit    leave (also Ctrl-D)
"""

PROMPT = "> "


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m subspec.chat``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: _main(arguments)))


def _main(arguments: list[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from subspec.cli.compose import compose_config, loaded_target

    cfg = compose_config(arguments)
    from subspec.runs.console import RunConsole

    console = RunConsole()
    with loaded_target(cfg, console) as (config, loaded):
        console.note(f"{loaded.target.name}, {loaded.target.source}; /clear forgets, /exit or Ctrl-D leaves")
        generate = partial(
            loaded.assembly.engine.generate, max_new_tokens=config.decoding.max_new_tokens, seed=config.seed
        )
        messages: list[dict[str, str]] = []
        for text in _questions():
            if text == "/clear":
                messages = []
                continue
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(partial(generate, loaded.target.chat_ids(messages)), console.note)
            except SubspecError as error:  # a conversation that is too long
                console.error(f"{error}; /clear forgets the conversation")
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _questions() -> Iterator[str]:
    """Lines of a terminal, after a prompt, or of a pipe, until /exit; blank ones are left out."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (edits the line, and remembers earlier ones)
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def _answer(generate: "Callable[..., GenerationResult]", note: "Note") -> str:
    """Print the answer as it is generated; returns it, or what there is of it after Ctrl-C."""
    pieces: list[str] = []

    def show(_: list[int], text: str) -> None:
        pieces.append(text)
        print(text, end="", flush=True)

    try:
        result = generate(on_tokens=show)
    except KeyboardInterrupt:
        print()
        note("stopped")
        return "".join(pieces)
    text, shown = result.text or "", "".join(pieces)
    print(text[len(shown) :])
    stats = result.stats
    if stats.iterations:
        speed, tau = stats.verified_tokens / stats.decode_s, stats.verified_tokens / stats.iterations
        figures = f"{speed:.1f} tokens/s, tau {tau:.2f}, {stats.iterations} passes"
        note(f"{figures}, first token after {stats.prefill_s:.2f} s, {result.finish_reason.value}")
    return text
