"""The drafts that ship with the project, trained for the embedded default target (``subspec/drafts/weights``)."""

from pathlib import Path

from subspec.utils.disk import sha256

FOLDER = Path(__file__).parent / "weights"
"""A folder per draft: configuration, weights in bfloat16, and a model card that says how they were made."""

HEADS = {"eagle2": FOLDER / "eagle", "eagle3": FOLDER / "eagle3", "block_head": FOLDER / "block_head"}
"""Folders of the heads, by the draft that reads them."""

SMALL_MODEL = FOLDER / "small_model"


def shipped_source(weights: Path) -> str:
    """The name of a shipped draft in records, with its digest: a new training replaces the file in a checkout."""
    return f"shipped with subspec (sha256 {sha256(weights)[:12]})"
