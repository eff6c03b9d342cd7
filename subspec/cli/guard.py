"""How the small commands end: one line and an exit status for what the user can repair, a traceback for a bug."""

import os
import sys
import traceback
from collections.abc import Callable

from subspec.errors import SubspecError


def guarded(call: Callable[[], None]) -> int:
    """Run ``call`` and return the process's exit status. ``SUBSPEC_DEBUG=1`` shows tracebacks in any case."""
    from subspec.config.errors import CONFIG_EXCEPTIONS, explain

    try:
        call()
    except SubspecError as error:
        return _fail(error, str(error), error.exit_code)
    except CONFIG_EXCEPTIONS as error:
        return _fail(error, explain(error), 2)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130)
    return 0


def _fail(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("SUBSPEC_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
