"""``python -m subspec`` and the console script ``subspec``: the commands, or one of them.

``subspec COMMAND ...`` is ``python -m subspec.COMMAND ...``; without a command, arguments are those of ``run``.
"""

import sys
from importlib import import_module

from subspec import __version__

COMMANDS = {
    "run": "subspec.run",
    "chat": "subspec.cli.chat",
    "serve": "subspec.cli.serve",
    "predict": "subspec.cli.predict",
    "report": "subspec.report.__main__",
}
USAGE = f"""\
SubSpec {__version__}: lossless speculative decoding of models that do not fit into GPU memory.

  python -m subspec run       one run or a sweep (run --help lists groups and keys)
  python -m subspec chat      talk to a model, and see its speed
  python -m subspec serve     a model behind the OpenAI API
  python -m subspec predict   tokens per second on a card, before anything is loaded
  python -m subspec report    tables and plots of runs; report compare: are two texts identical?

To begin:  python -m subspec run experiment=smoke     seconds, no download
           python -m subspec run                      the default model (93 MB) on five prompts
"""


def main() -> None:
    """Entry point."""
    arguments = sys.argv[1:]
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return
    command = arguments.pop(0) if arguments[0] in COMMANDS else "run"
    import_module(COMMANDS[command]).main(arguments)


if __name__ == "__main__":
    main()
