"""``python -m subspec.cli.job ARGUMENTS``: one job of a sweep, as a process of its own.

It is ``python -m subspec.run`` with two differences: Ctrl-C reaches it even where the sweep was started in the
background, and it does not outlive the sweep. The sweep holds the other end of the job's standard input; when that
closes, whatever killed the sweep, the job ends as if interrupted, and can be resumed.
"""

import os
import signal
import sys
import threading
import time

GRACE_S = 30.0
"""Seconds that an orphaned job may take to end by itself."""


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    from subspec.cli.run import main as run

    run(sys.argv[1:])


def _end_with_parent() -> None:
    # os.read, not sys.stdin: a thread that waits inside a buffered reader blocks the interpreter's exit.
    try:
        while os.read(0, 1):
            pass
    except OSError:
        return  # no standard input: nobody to wait for
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    main()
