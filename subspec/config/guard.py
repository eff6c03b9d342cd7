"""End a command: one line and an exit status for a failure that the user can repair, a traceback for a bug.

``SUBSPEC_DEBUG=1`` shows the traceback of every failure.
"""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from subspec.errors import SubspecError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


def guarded(call: Callable[[], None], unwritable: str | None = None) -> int:
    """Run ``call`` and return the exit status of the process.

    Args:
        unwritable: remedy for an ``OSError`` that names a file; None: it is a bug.
    """
    try:
        call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt as stop:
        fail(stop, f"interrupted: {stop}" if str(stop) else "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of standard output has gone (`| head`). Python would fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        reported = getattr(error, "reported", False)
        failure = expected(error)
        if failure is None and unwritable and isinstance(error, OSError) and error.filename and not reported:
            from subspec.utils.files import write_error

            failure = str(write_error(error, Path(error.filename), unwritable)), 1
        if failure is None:
            raise
        message, code = failure
        if not reported:
            fail(error, message)
        return code
    return 0


def expected(error: Exception) -> tuple[str, int] | None:
    """Message and exit status of a failure that the user can repair; None for a bug."""
    from subspec.config.errors import CONFIG_EXCEPTIONS, explain

    if isinstance(error, SubspecError):
        return str(error), error.exit_code
    if isinstance(error, CONFIG_EXCEPTIONS):
        return explain(error), 2
    if (where := _exhausted(error)) is not None:
        return f"out of {where}: lower decoding.max_length or the tree, or take a smaller target or dtype", 1
    return None


_ALLOCATION = re.compile(
    "can't allocate memory|not enough memory|out of memory|calculation overflowed|overflow when unpacking", re.I
)
"""PyTorch's host allocator, and sizes beyond 64 bits, raise plain RuntimeErrors and TypeErrors."""


def _exhausted(error: Exception) -> str | None:
    """The memory in which an allocation found no room; None for another error."""
    if type(error).__name__ == "OutOfMemoryError":
        return "device memory"
    if isinstance(error, RuntimeError | TypeError) and _ALLOCATION.search(str(error)):
        return "device memory" if "CUDA" in str(error) else "host memory"
    return "host memory" if isinstance(error, MemoryError) else None


def fail(error: BaseException, message: str) -> None:
    """Print ``message`` as one line on standard error."""
    if os.environ.get("SUBSPEC_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
