"""``draft.vocab``: a draft whose LM head knows the frequent ids only (FR-Spec, arXiv 2502.14856).

Most bytes that a level reads for its logits belong to tokens that are hardly ever drafted. A head of the frequent ids
reads fewer. The other ids are never proposed, and the target still emits them.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from subspec.config.schema import DraftConfig
from subspec.errors import ConfigError

KEY = "draft.vocab"


def draft_ids(vocab: int | str | None, vocab_size: int, width: int = 1) -> tuple[int, ...] | None:
    """The ids that the draft's LM head knows, ascending; None: all of them.

    Args:
        vocab: None, a number (the first ids, which byte-pair tokenizers assign to the most frequent merges), or a file.
        vocab_size: of the target.
        width: of the tree, which needs as many ids.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if vocab is None:
        return None
    if isinstance(vocab, bool) or not isinstance(vocab, int | str):
        raise ConfigError(f"{KEY}={vocab}: give a number of ids, a file of ids, or null")
    ids = tuple(range(vocab)) if isinstance(vocab, int) else _read(str(vocab))
    if ids and not (ids[0] >= 0 and ids[-1] < vocab_size):
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        raise ConfigError(f"{KEY}={vocab} names id {wrong}, and the target's ids are 0..{vocab_size - 1}")
    if len(ids) < width:
        raise ConfigError(f"{KEY}={vocab} holds {len(ids)} ids, fewer than the tree is wide: give at least {width}")
    return ids if len(ids) < vocab_size else None


def known_tokens(draft: DraftConfig, vocab_size: int) -> int:
    """Number of ids that the LM head of ``draft`` knows; arguments and errors as of :func:`draft_ids`."""
    ids = draft_ids(getattr(draft, "vocab", None), vocab_size)
    return vocab_size if ids is None else len(ids)


def file_digest(vocab: int | str | None) -> str | None:
    """Hex digest of the ids in a file; None: no file is given."""
    return ids_digest(_read(vocab)) if isinstance(vocab, str) else None


def ids_digest(ids: Sequence[int]) -> str:
    """Hex digest of ids."""
    return hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _read(name: str) -> tuple[int, ...]:
    """Ids of a file, ascending and distinct: numbers between white space, a JSON list, or what torch saved."""
    path, found = Path(name).expanduser(), list[Any]()
    try:
        if path.suffix in (".pt", ".pth"):
            found = torch.as_tensor(torch.load(path, weights_only=True)).flatten().tolist()
        else:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text) if text.lstrip().startswith("[") else text.split()
        return tuple(sorted({int(one) for one in found}))
    except OSError as error:
        raise ConfigError(f"{KEY}={name}: {error.strerror or error}: give a file that can be read") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ConfigError(f"{KEY}={name} is no list of token ids: give one id per line, or a JSON list") from error
