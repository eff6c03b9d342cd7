"""Where a quantized substitute is kept: the cache, a folder of the user's, or nowhere.

``quant.folder=FOLDER`` is saving and loading in one key: an empty or new folder is filled, one that holds a substitute
is read, bit for bit, and one that holds another model's or other settings' is refused before anything is quantized.
Without it the cache does the same by itself (``quant.cache=auto``), in a folder of its own for everything that differs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspec.config.schema import Cache
from subspec.store.substitutes import SubstituteStore, cache_folder
from subspec.utils.console import Note


def open_store(
    cache: Cache, folder: str | None, facts: Mapping[str, Any], expected_bytes: int, note: Note
) -> SubstituteStore:
    """The store of a run.

    Args:
        cache, folder: ``quant.cache`` and ``quant.folder``.
        facts: of the target and the quantizer.
        expected_bytes: of the whole substitute on disk.

    Raises:
        ConfigError: the folder holds something else.
    """
    if folder is not None:
        place: Path | None = Path(folder).expanduser().absolute()
    else:
        place = None if cache is Cache.off else cache_folder(facts)
    return SubstituteStore(
        place, expected_bytes=expected_bytes, facts=facts, owned=folder is not None, note=note
    )
