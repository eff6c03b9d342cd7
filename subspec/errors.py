"""Expected failures: one line for the user, with the remedy, and an exit status.

Everything a user can cause or repair (a wrong key, a missing file, no network) is raised as a
:class:`SubspecError`. The command line prints its message without a traceback (``SUBSPEC_DEBUG=1`` shows
it); any other exception is a bug and keeps its traceback.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SubspecError(Exception):
    """A failure the user can repair. The message names the config key or file, and the remedy.

    Attributes:
        exit_code: status of the process when this ends a run.
    """

    exit_code = 1


class ConfigError(SubspecError):
    """The configuration is wrong or contradicts itself; nothing has been loaded yet."""

    exit_code = 2


class AuditError(SubspecError):
    """The losslessness audit found a token that the target itself would not have emitted."""

    exit_code = 3


@contextmanager
def reworded(change: Callable[[str], str]) -> Iterator[None]:
    """Change the text of a SubspecError."""
    try:
        yield
    except SubspecError as error:
        raise type(error)(change(str(error))) from error


def causes(error: BaseException | None) -> list[BaseException]:
    """``error``, and the exceptions that it was raised from or while handling."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
