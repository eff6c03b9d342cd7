"""The folder of the configuration tree: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

from subspec.errors import SubspecError

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package."""


def conf_dir() -> Path:
    """The folder with ``config.yaml`` and the config groups."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise SubspecError(f"no conf/config.yaml beside {PACKAGE}: reinstall subspec")
