"""Text on disk: shards of token ids with a mask of the tokens to learn, each written atomically."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from subspec.errors import SubspecError


def shard_path(folder: Path, index: int) -> Path:
    """File of shard ``index``."""
    return folder / f"shard-{index:04d}.safetensors"


def write_shard(path: Path, ids: Tensor, learn: Tensor, facts: Mapping[str, Any]) -> None:
    """Write ids [rows, length] (below 65536) and the mask [rows, length], atomically, with ``facts`` beside them."""
    if int(ids.max()) >= 2**16:
        raise SubspecError(f"{path.name}: token id {int(ids.max())} does not fit 16 bits; vocabularies end at 65536")
    part = path.with_suffix(".part")
    arrays = {"ids": ids.cpu().numpy().astype(np.uint16), "learn": learn.cpu().numpy().astype(np.uint8)}
    save_file(arrays, part, metadata={"facts": json.dumps(dict(facts), sort_keys=True)})
    os.replace(part, path)


@dataclass(frozen=True)
class Corpus:
    """All shards of a folder, split by rows.

    Attributes:
        ids, learn: int32 and bool [rows, length], for training.
        held_ids, held_learn: the same of the rows kept back.
        facts: settings that the text was made with.
    """

    ids: Tensor
    learn: Tensor
    held_ids: Tensor
    held_learn: Tensor
    facts: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Token ids to train on, given and chosen ones."""
        return self.ids.numel()

    @property
    def answer_tokens(self) -> int:
        """Ids that the target chose as the assistant."""
        return int(self.learn.sum())


def load_corpus(folder: Path, *, held_out: int) -> Corpus:
    """Read every whole shard into memory; the first ``held_out`` rows of the first one are kept back.

    Raises:
        SubspecError: no shard, shards of different settings, or too few rows.
    """
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise SubspecError(f"--text {folder}: no shard there; write some with scripts/generate_text.py")
    ids, learn, settings = [], [], []
    for path in paths:
        with safe_open(path, "np") as file:
            ids.append(torch.from_numpy(file.get_tensor("ids").astype(np.int32)))
            learn.append(torch.from_numpy(file.get_tensor("learn").astype(bool)))
            settings.append(json.loads(file.metadata()["facts"]))
    for path, facts in zip(paths, settings, strict=True):
        if facts != settings[0]:
            raise SubspecError(f"--text {folder}: {path.name} was written with other settings than {paths[0].name}")
    all_ids, all_learn = torch.cat(ids), torch.cat(learn)
    if len(all_ids) <= held_out:
        raise SubspecError(f"--text {folder}: {len(all_ids)} rows, of which --held-out takes {held_out}: write more")
    return Corpus(all_ids[held_out:], all_learn[held_out:], all_ids[:held_out], all_learn[:held_out], settings[0])


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, copied asynchronously."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Batches:
    """Rows in a seeded order, a new one for every epoch; a step's batch depends on the step alone.

    Args:
        corpus: to draw from.
        rows: per batch, at most as many as there are.
        seed: of the orders.
    """

    def __init__(self, corpus: Corpus, rows: int, seed: int) -> None:
        self.corpus, self.rows, self.seed = corpus, min(rows, len(corpus.ids)), seed
        self.per_epoch = len(corpus.ids) // self.rows
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """ids int64 and mask bool, [rows, length] each, on the CPU."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.corpus.ids), generator=generator)
            self._epoch = epoch
        index = self._order[batch * self.rows : (batch + 1) * self.rows]
        return self.corpus.ids[index].long(), self.corpus.learn[index]
