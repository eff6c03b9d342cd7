"""A quantized substitute on disk: one safetensors file per decoder layer (:mod:`subspec.store.layer_files`).

The facts that it follows from are the target, the quantizer, its version and settings. Beside each weight's tensors
lies a fingerprint of the exact weight they were made from, which is checked before they are used: a stale file costs a
new quantization, never a worse draft.

The folder is either the cache's own (``<cache>/substitutes/<hash of the facts>/``), where nothing fails a run, or it is
the user's (``quant.folder``): then whatever does not fit, is damaged or cannot be written stops the run.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from subspec.errors import ConfigError, SubspecError
from subspec.store.layer_files import UNREADABLE, LayerFiles
from subspec.utils.console import Note, print_note
from subspec.utils.disk import MANIFEST, cache_root

FORMAT = 2
"""Of the files; another number makes other keys."""

SAMPLE = 4096
"""Elements of a weight that its fingerprint looks at, evenly spread."""

SUMMED = 1 << 22
"""Elements of a weight that its fingerprint sums at a time: bounds the temporaries to 32 MiB."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""

Stored = dict[str, dict[str, Tensor]]
"""A layer: tensors by module; ``of`` is the fingerprint, the others are the quantizer's."""


def cache_folder(facts: Mapping[str, Any]) -> Path:
    """Where the cache keeps what follows from ``facts``."""
    text = json.dumps({**facts, "format": FORMAT}, sort_keys=True)
    return cache_root() / "substitutes" / hashlib.sha256(text.encode()).hexdigest()[:24]


class SubstituteStore(LayerFiles):
    """Reads and writes one substitute's folder, layer by layer; a context manager.

    Args:
        folder: of :func:`cache_folder`, or the user's; None: remember nothing.
        expected_bytes: of the whole substitute.
        facts: what the results follow from (JSON types).
        owned: the folder is the user's: stop instead of doing without it.
        note: told what was wrong and what was done about it.

    Attributes:
        read, quantized: matrices that were found here, and that were not.
        trouble: why nothing (more) is written; None while all is well.

    Raises:
        ConfigError: the user's folder holds something else.
    """

    format = FORMAT
    kind, making, suffix = "quantized substitute", "quantizing", ".safetensors"

    def __init__(
        self,
        folder: Path | None,
        *,
        expected_bytes: int = 0,
        facts: Mapping[str, Any] | None = None,
        owned: bool = False,
        note: Note = print_note,
    ) -> None:
        self.owned = owned
        self.read = self.quantized = 0
        self._layer: str | None = None
        self._stored: Stored = {}
        self._fresh: Stored = {}
        self._ahead: dict[str, Future[Stored]] = {}
        super().__init__(folder, expected_bytes=expected_bytes, facts=facts, note=note)

    def close(self) -> None:
        """See :meth:`LayerFiles.close`; what was read ahead in vain is let go."""
        try:
            super().close()
        finally:
            self._ahead.clear()

    def report(self) -> dict[str, Any]:
        """For the record."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "read": self.read,
            "quantized": self.quantized,
            "trouble": self.trouble,
        }

    # -------------------------------------------------------------------------------------- by the weight

    def stored(self, name: str) -> Mapping[str, Tensor] | None:
        """The tensors kept under a name, on the CPU, whatever weight they were made from; None: there are none.

        Args:
            name: ``LAYER.path.of.module``; layers in ascending order, then any others.
        """
        if self.folder is None:
            return None
        layer, _, module = name.partition(".")
        if layer != self._layer:
            self._begin(layer)
        return self._stored.get(module)

    def find(self, weight: Tensor, name: str) -> Mapping[str, Tensor] | None:
        """A weight's tensors, on the CPU; None when they are not here, or were made from another weight.

        Args:
            name: see :meth:`stored`.
        """
        stored = self.stored(name)
        if stored is not None and not torch.equal(stored.get("of", torch.empty(0)), fingerprint(weight)):
            self.reject(name)
            return None
        return stored

    def reject(self, name: str) -> None:
        """What was found under this name does not belong to the weight."""
        layer, _, module = name.partition(".")
        if self.owned:
            raise self._refusal(f"its layer {layer}, {module} was made from other weights")
        self.note(f"the cached codes of layer {layer}, {module} are of other weights: quantizing again")

    def keep(self, weight: Tensor, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember a weight's tensors; they reach the disk with :meth:`end_layer`."""
        if self.trouble is None:
            self._fresh[name.partition(".")[2]] = {**tensors, "of": fingerprint(weight)}

    def end_layer(self) -> None:
        """Hand what is new to the disk."""
        if self._fresh and self.trouble is None and self._layer is not None:
            tensors = self._stored | self._fresh
            self._write_behind(self._layer, lambda: [_serialized(tensors)])
        self._layer, self._stored, self._fresh = None, {}, {}

    # ------------------------------------------------------------------------------------------- reading

    def _begin(self, layer: str) -> None:
        if self._layer is not None:
            self.end_layer()
        self._layer = layer
        if self._file(layer) not in self._files and not self._locked and self.trouble is None:
            self._lock()
        self._stored = self._ahead.pop(layer).result() if layer in self._ahead else self._load(layer)
        following = str(int(layer) + 1) if layer.isdecimal() else ""
        if following and self._file(following) in self._files:
            self._ahead[following] = self._thread.submit(self._load, following)

    def _load(self, layer: str) -> Stored:
        """A layer's tensors on the CPU; nothing, and said, when its file is not what the manifest says."""
        name = self._file(layer)
        expected = self._files.get(name)
        if expected is None or self.folder is None:
            return {}
        try:
            content = (self.folder / name).read_bytes()
            self._check_size(expected, len(content))
            self._check_content(expected, content)
            stored: Stored = {}
            for key, tensor in load_tensors(content).items():
                module, _, part = key.rpartition(":")
                stored.setdefault(module, {})[part] = tensor
            return stored
        except UNREADABLE as error:
            self._damaged(layer, error)
            return {}

    # ----------------------------------------------------------------------------------- a folder of the user's

    def _open(self) -> None:
        if self.owned:
            self._check_owned()
        else:
            super()._open()

    def _limit(self, folder: Path) -> None:
        if not self.owned:
            super()._limit(folder)

    def _unreadable(self, error: Exception) -> None:
        if self.owned:
            raise self._refusal(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
        super()._unreadable(error)

    def _damaged(self, layer: str, error: Exception) -> None:
        if self.owned:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise self._refusal(f"its layer {layer} is damaged ({why})") from error
        super()._damaged(layer, error)

    def _give_up(self, why: str) -> None:
        if self.owned:
            self.trouble = why
            raise SubspecError(f"quant.folder={self.folder}: the substitute cannot be kept there: {why}")
        super()._give_up(why)

    def _lock(self) -> None:
        if self.owned:
            assert self.folder is not None
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._give_up(error.strerror or str(error))
        super()._lock()

    def _remove(self) -> None:
        """Of a folder of the user's only what is ours."""
        if not self.owned:
            super()._remove()
            return
        assert self.folder is not None
        for name in [*self._files, MANIFEST]:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _check_owned(self) -> None:
        """That the user's folder is empty, or holds what these facts make."""
        assert self.folder is not None
        try:
            file = self.folder / MANIFEST
            if not file.is_file():
                if self.folder.exists() and any(self.folder.iterdir()):
                    raise ConfigError(
                        f"quant.folder={self.folder} holds other files: name an empty or a new folder"
                    )
                return
            found = json.loads(file.read_text(encoding="utf-8"))
            kept, wanted = dict(found["facts"]), json.loads(json.dumps(dict(self.facts)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"it cannot be read ({type(error).__name__})") from error
        if found.get("format") != FORMAT:
            raise self._refusal(f"it has format {found.get('format')}, this version reads {FORMAT}")
        # Which target it is, the weights' fingerprints tell: a checkpoint may have moved.
        for key in sorted((kept.keys() | wanted.keys()) - {"target"}):
            if kept.get(key) != wanted.get(key):
                raise self._refusal(f"it was made with {key} {kept.get(key)}, this run has {wanted.get(key)}")

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"quant.folder={self.folder} cannot be used: {why}; name another folder, where the substitute is then kept"
        )


def fingerprint(weight: Tensor) -> Tensor:
    """uint8 [32]: SHA-256 of the shape, of the sum of all elements, which any change of one changes, and of some,
    evenly spread: of bits, not of values."""
    flat = weight.detach().flatten()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # In parts: summing in 64 bits makes a copy of what is summed, eight bytes for every weight of an LM head.
    for part in flat.view(INTEGERS[weight.element_size()]).split(SUMMED):
        total += part.sum(dtype=torch.int64)
    sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous().view(torch.uint8).cpu()
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {int(total)}".encode())
    digest.update(bytes(sample.numpy()))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _serialized(tensors: Stored) -> bytes:
    return save_tensors(
        {f"{module}:{part}": t for module, parts in tensors.items() for part, t in parts.items()}
    )
