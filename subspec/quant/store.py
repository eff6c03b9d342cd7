"""A quantized substitute on disk: one safetensors file per decoder layer, beside a manifest.

The manifest has each file's size and SHA-256, and the facts that the results follow from: the target, the quantizer,
its version and settings. Beside each weight's tensors lies a fingerprint of the exact weight they were made from, which
is checked before they are used: a stale file costs a new quantization, never a worse draft.

The folder is either the cache's own (``<cache>/substitutes/<hash of the facts>/``), where nothing fails a run: a
damaged layer is quantized again, a full disk or a folder that cannot be written to ends caching, and each of these is
said. Or it is the user's (``quant.folder``): then whatever does not fit, is damaged or cannot be written stops the run.

Layers are read ahead and written behind by one thread, because hashing and disks take about as long as the device does.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from subspec.errors import ConfigError, SubspecError
from subspec.quant.cache_limit import cache_limit, limit_cache, touch
from subspec.targets.cache import MANIFEST, build_lock, cache_root, free_space, is_full_disk, replace_file
from subspec.targets.console import Note, print_note

FORMAT = 2
"""Of the files; another number makes other keys."""

SLACK = 1.1
"""Free space asked for, over what the substitute takes."""

SAMPLE = 4096
"""Elements of a weight that its fingerprint looks at, evenly spread."""

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""

Stored = dict[str, dict[str, Tensor]]
"""A layer: tensors by module; ``of`` is the fingerprint, the others are the quantizer's."""


def cache_folder(facts: Mapping[str, Any]) -> Path:
    """Where the cache keeps what follows from ``facts``."""
    text = json.dumps({**facts, "format": FORMAT}, sort_keys=True)
    return cache_root() / "substitutes" / hashlib.sha256(text.encode()).hexdigest()[:24]


class SubstituteStore:
    """Reads and writes one substitute's folder, layer by layer; a context manager.

    Args:
        folder: of :func:`cache_folder`, or the user's; None: remember nothing.
        expected_bytes: of the whole substitute; nothing is written unless so much and a tenth is free.
        facts: what the results follow from (JSON types).
        owned: the folder is the user's: stop instead of doing without it.
        note: told what was wrong and what was done about it.

    Attributes:
        read, quantized: matrices that were found here, and that were not.
        trouble: why nothing (more) is written; None while all is well.

    Raises:
        ConfigError: the user's folder holds something else.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        expected_bytes: int = 0,
        facts: Mapping[str, Any] | None = None,
        owned: bool = False,
        note: Note = print_note,
    ) -> None:
        self.folder, self.expected_bytes, self.facts, self.note = folder, expected_bytes, facts or {}, note
        self.owned = owned
        self.read = self.quantized = 0
        self.trouble: str | None = "quant.cache=off" if folder is None else None
        self._files: dict[str, dict[str, Any]] = {}
        self._layer: str | None = None
        self._stored: Stored = {}
        self._fresh: Stored = {}
        self._ahead: dict[str, Future[Stored]] = {}
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "substitute")
        self._held = ExitStack()
        self._locked = False
        self._wrote = False
        if folder is not None:
            if owned:
                self._check_owned()
            else:
                cache_limit()  # a limit that is no number is refused before anything is done
            self._files = self._manifest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, let other processes have their turn, and keep the cache in its limits."""
        try:
            self._wait()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._held.close()
        if self.folder is not None and not self.owned:
            touch(self.folder)
            if self._wrote:
                limit_cache(self.folder.parent, keep=self.folder, note=self.note)

    def report(self) -> dict[str, Any]:
        """For the record."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "read": self.read,
            "quantized": self.quantized,
            "trouble": self.trouble,
        }

    # -------------------------------------------------------------------------------------- by the weight

    def find(self, weight: Tensor, name: str) -> Mapping[str, Tensor] | None:
        """A weight's tensors, on the CPU; None when they are not here, or were made from another weight.

        Args:
            name: ``LAYER.path.of.module``; layers in ascending order, then any others.
        """
        if self.folder is None:
            return None
        layer, _, module = name.partition(".")
        if layer != self._layer:
            self._begin(layer)
        stored = self._stored.get(module)
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
            self._wait()
            if not self._locked:  # a damaged layer of a complete folder
                self._lock()
            if self.trouble is None:
                self._writing = self._thread.submit(self._write, self._layer, self._stored | self._fresh)
        self._layer, self._stored, self._fresh = None, {}, {}

    # ------------------------------------------------------------------------------------------- reading

    def _begin(self, layer: str) -> None:
        if self._layer is not None:
            self.end_layer()
        self._layer = layer
        if _file(layer) not in self._files and not self._locked and self.trouble is None:
            self._lock()
        self._stored = self._ahead.pop(layer).result() if layer in self._ahead else self._load(layer)
        following = str(int(layer) + 1) if layer.isdecimal() else ""
        if following and _file(following) in self._files:
            self._ahead[following] = self._thread.submit(self._load, following)

    def _load(self, layer: str) -> Stored:
        """A layer's tensors on the CPU; nothing, and said, when its file is not what the manifest says."""
        name = _file(layer)
        expected = self._files.get(name)
        if expected is None or self.folder is None:
            return {}
        try:
            content = (self.folder / name).read_bytes()
            if len(content) != expected["bytes"]:
                raise ValueError(f"{len(content)} bytes instead of {expected['bytes']}")
            if hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise ValueError("its content has changed")
            stored: Stored = {}
            for key, tensor in load_tensors(content).items():
                module, _, part = key.rpartition(":")
                stored.setdefault(module, {})[part] = tensor
            return stored
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            if self.owned:
                raise self._refusal(f"its layer {layer} is damaged ({why})") from error
            self.note(f"the cached substitute's layer {layer} is damaged ({why}): quantizing it again")
            return {}

    def _manifest(self) -> dict[str, dict[str, Any]]:
        assert self.folder is not None
        try:
            files = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return {str(name): dict(entry) for name, entry in files.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self.owned:
                raise self._refusal(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error
            self.note(f"{self.folder / MANIFEST} cannot be read ({type(error).__name__}): quantizing again")
            return {}

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

    # ------------------------------------------------------------------------------------------- writing

    def _lock(self) -> None:
        """Be the only one who writes here. Whoever had to wait finds what the other has written."""
        assert self.folder is not None
        try:
            if self.owned:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(build_lock(self.folder, self.note))
        except (SubspecError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._give_up(reason)
            return
        self._locked = True
        for part in self.folder.glob("*.safetensors.*"):  # of a process that was killed
            part.unlink(missing_ok=True)
        self._files = self._manifest()
        there = sum(int(entry.get("bytes", 0)) for entry in self._files.values())
        needed = int(max(0, self.expected_bytes - there) * SLACK)
        free = free_space(self.folder)
        if free < needed:
            self._give_up(f"it needs {needed / 1e9:.1f} GB in {self.folder} and {free / 1e9:.1f} GB are free")

    def _write(self, layer: str, tensors: Stored) -> None:
        """In the thread: one layer's file, then the manifest that vouches for it."""
        assert self.folder is not None
        name = _file(layer)
        try:
            content = save_tensors(
                {f"{module}:{part}": t for module, parts in tensors.items() for part, t in parts.items()}
            )
            # No fsync: after a crash the manifest's hash tells a file that did not get to the disk.
            replace_file(self.folder / name, content)
            self._files = {
                **self._files,
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
            }
            self._wrote = True
            manifest = {"facts": self.facts, "format": FORMAT, "files": self._files}
            replace_file(self.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        except (OSError, MemoryError, SafetensorError) as error:
            if is_full_disk(error):
                # A full disk harms more than this run: give back what was taken.
                if self.owned:
                    self._remove_own_files()
                else:
                    shutil.rmtree(self.folder, ignore_errors=True)
                self._files = {}
                self._give_up(f"the disk of {self.folder} is full")
            else:
                self._give_up(f"cannot write to {self.folder} ({getattr(error, 'strerror', None) or error})")

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _remove_own_files(self) -> None:
        assert self.folder is not None
        for name in [*self._files, MANIFEST]:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _give_up(self, why: str) -> None:
        self.trouble = why
        if self.owned:
            raise SubspecError(f"quant.folder={self.folder}: the substitute cannot be kept there: {why}")
        self.note(f"the quantized substitute is not cached: {why}")


def fingerprint(weight: Tensor) -> Tensor:
    """uint8 [32]: SHA-256 of the shape, of the sum of all elements, which any change of one changes, and of some,
    evenly spread: of bits, not of values."""
    flat = weight.detach().flatten()
    total = int(flat.view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64))
    sample = flat[:: max(1, flat.numel() // SAMPLE)].contiguous().view(torch.uint8).cpu()
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype} {total}".encode())
    digest.update(bytes(sample.numpy()))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _file(layer: str) -> str:
    return f"layer_{int(layer):03}.safetensors" if layer.isdecimal() else f"{layer}.safetensors"
