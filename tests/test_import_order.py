"""Packages import in one direction only, lazily or not (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "subspec"

ORDER = (
    *("errors", "utils", "config", "kernels", "quant", "store", "decoding", "targets", "levels", "codec"),
    *("offload", "memory", "drafts", "planning", "session", "api", "benchmarks", "records", "report", "runs"),
    *("sweeps", "server", "cli"),
)
"""A package imports from itself and from those before it."""

ENTRANCES = dict.fromkeys(("__init__", "__main__", "run", "chat", "serve", "predict"), "cli")
"""Modules that only start something: ``python -m subspec.run`` and the names of ``import subspec``."""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The package of a module, as :data:`ORDER` has it."""
    for name in (module, module.partition(".")[0]):
        if name in ENTRANCES:
            return ENTRANCES[name]
    return module.partition(".")[0]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and name below ``subspec`` of every import, wherever it stands; of strings that name modules, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "subspec":
                yield node.lineno, rest or "__init__"


def offences(module: str, source: str) -> list[str]:
    own = ORDER.index(room(module))
    found = []
    for line, name in imports(source):
        target = room(name)
        if target not in ORDER:  # a name of the package itself: `from subspec import generate`
            target = ENTRANCES["__init__"]
        if ORDER.index(target) > own and name != "__version__":
            found.append(f"{module}:{line} imports {name}, and {ORDER[own]} comes before {target}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up(module):
    assert room(module) in ORDER, f"{module} belongs to no package of the order"
    assert offences(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from subspec.drafts.eagle import EagleDraft",
        "def late():\n    import subspec.cli.run",
        "if TYPE_CHECKING:\n    from subspec.planning.plan import Plan",
        "from subspec import api",
    ],
)
def test_an_import_that_points_down_is_found(statement):
    assert offences("quant.hqq", f"from subspec.errors import ConfigError\n{statement}\n")
