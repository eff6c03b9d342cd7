"""Packages with kernels of their own that may be missing or not fit the installed torch."""

import importlib
import importlib.util


def import_problem(package: str, install: str, *modules: str) -> str | None:
    """Why a package cannot be used, in a few words; None if it can.

    Args:
        install: how to install it.
        modules: the modules that are needed of it.
    """
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed ({install})"
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:
        return f"{package} cannot be imported: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None
