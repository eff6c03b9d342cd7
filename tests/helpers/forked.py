"""Code against another copy of the package, in a process that has imported torch and transformers already.

A fresh one takes ten seconds for that. The package itself is forgotten and imported again, from the copy.
"""

import os
import sys
import traceback
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

import subspec.session  # noqa: F401  (with what it imports)
from tests.helpers.cli import ROOT, Ran

PACKAGES = ("subspec", "hydra_plugins")


def run_forked(copy: Path, code: str, folder: Path, **environment: str) -> Ran:
    """Executes ``code`` in ``folder`` with the packages in ``copy``; ``environment`` is set besides."""
    names = [folder / "forked.out", folder / "forked.err"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for target, name in enumerate(names, 1):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
            sys.stdout, sys.stderr = (os.fdopen(target, "w", encoding="utf-8") for target in (1, 2))
            _forget(copy)
            os.environ.update(environment)
            os.environ.pop("PYTHONPATH", None)
            os.chdir(folder)
            exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return Ran(os.waitstatus_to_exitcode(status), *(name.read_text(encoding="utf-8") for name in names))


def _forget(copy: Path) -> None:
    torch.set_num_threads(1)  # the threads of the parent's pool are not here
    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGES:
            del sys.modules[name]
    GlobalHydra.instance().clear()
    Singleton._instances.pop(Plugins, None)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() != ROOT)]
