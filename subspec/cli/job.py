"""``python -m subspec.cli.job ARGUMENTS``: one job of a sweep, as a process of its own.

It differs from ``python -m subspec.run`` in two ways. It handles SIGINT even if the sweep was started in the background
with SIGINT ignored. And it ends with the sweep: the sweep holds the other end of the job's standard input, and the job
interrupts itself when that end closes, so that it can be resumed.
"""

import os
import signal
import sys
import threading
import time

GRACE_S = 30.0
"""Seconds after which an orphaned job is terminated."""


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    from subspec.cli.run import main as run

    run(sys.argv[1:])


def _end_with_parent() -> None:
    # os.read, because a thread inside a buffered reader would block the interpreter's exit.
    try:
        while os.read(0, 1):
            pass
    except OSError:
        return  # no standard input, no parent to watch
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    main()
