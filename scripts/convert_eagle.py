"""Convert a published EAGLE head once: safetensors with the used tensors only, checked bit for bit.

    python scripts/convert_eagle.py SRC DST [--dtype keep|bfloat16] [--share-tables]

SRC is a folder or hub id of an EAGLE-1, EAGLE-2 or EAGLE-3 checkpoint (config.json with model.safetensors or
pytorch_model.bin, read with weights_only); DST a new folder, for `draft=eagle2 draft.path=DST` or `draft=eagle3 ...`.
The target's embedding table, which every EAGLE-2 checkpoint carries a copy of, is dropped: most of the file's bytes.
An EAGLE-3 head may have tables of its own: --share-tables drops its embedding and its LM head over all of the target's
ids, for heads whose tables are copies of the target's. The result is read back and compared bit for bit.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from subspec.drafts.eagle3_head import D2T, EMBEDDING, LM_HEAD
from subspec.drafts.eagle_checkpoint import (
    kind_of_files,
    locate_head,
    read_config,
    read_tensors,
    shape_of,
    sort_tensors,
)
from subspec.drafts.eagle_head import EagleHead
from subspec.errors import SubspecError
from subspec.targets.weight_files import CONFIG, SINGLE

CONVERTED = SINGLE


def convert(source: str, destination: Path, dtype: torch.dtype | None, *, share_tables: bool = False) -> None:
    """Write the converted head; print what was kept and dropped.

    Args:
        dtype: of the weights written; None: as they are.
        share_tables: leave out the tables for which the target's own can be used.

    Raises:
        SubspecError: the source is no EAGLE head, or the destination is taken or cannot be written.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise SubspecError(f"{destination} is not an empty folder: give a new one, or remove it first")
    files = locate_head(source, print, key="SRC")
    config = read_config(files)
    stored = read_tensors(files)
    kind = kind_of_files(stored, config)
    tensors, dropped = sort_tensors(stored, source, config, kind)
    shared = [EMBEDDING, *[LM_HEAD] * (D2T not in tensors)] if share_tables else []
    dropped += [name for name in shared if tensors.pop(name, None) is not None]
    shape = shape_of(tensors, config, kind)
    written = {
        name: tensor.to(tensor.dtype if name == D2T else dtype or tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    rounded = [name for name, tensor in tensors.items() if not torch.equal(written[name].to(tensor.dtype), tensor)]

    try:
        destination.mkdir(parents=True, exist_ok=True)
        partial = destination / f"{CONVERTED}.{os.getpid()}.part"
        # Copies: tensors of a .bin may share their storage, which safetensors refuses.
        save_file({name: tensor.clone() for name, tensor in written.items()}, partial, {"source": files.source})
        partial.replace(destination / CONVERTED)
        kept = shape.config() | {key: config[key] for key in ("vocab_size",) if key in config}
        (destination / CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SubspecError(f"{destination} cannot be written ({error.strerror}): choose another folder") from error
    verify(destination, written, kept, kind)

    size = (destination / CONVERTED).stat().st_size
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in written.values()}))
    biases = ", ".join(sorted(shape.biases)) or "none"
    before = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    print(f"source:  {files.source}, {before / 1e6:.1f} MB of tensors")
    print(
        f"head:    hidden {shape.hidden}, {shape.heads} heads, {shape.kv_heads} KV heads of {shape.head_dim}, ", end=""
    )
    print(f"MLP {shape.intermediate}; biases: {biases}")
    print(f"dropped: {', '.join(dropped) or 'nothing'}")
    print(f"rounded: {', '.join(rounded) or 'nothing'}")
    print(f"written: {destination / CONVERTED}, {kinds}, {size / 1e6:.1f} MB, read back bit for bit")


def verify(folder: Path, expected: dict[str, Tensor], config: dict[str, object], kind: type[EagleHead]) -> None:
    """Read the folder back as a run would.

    Raises:
        SubspecError: a tensor is not what was written.
    """
    with safe_open(folder / CONVERTED, framework="pt", device="cpu") as handle:
        found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    for name, tensor in expected.items():
        there = found.get(name)
        same = there is not None and there.dtype == tensor.dtype and there.shape == tensor.shape
        if not same or not torch.equal(there.view(torch.uint8), tensor.view(torch.uint8)):
            raise SubspecError(f"{folder / CONVERTED}: {name} was not read back as written; check the disk, try again")
    if found.keys() != expected.keys() or json.loads((folder / CONFIG).read_text()) != config:
        raise SubspecError(f"{folder} was not read back as written; check the disk, try again")
    kind.from_tensors(found, config)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SRC", help="folder or hub id of a published EAGLE head")
    parser.add_argument("destination", metavar="DST", type=Path, help="new folder for the converted head")
    parser.add_argument(
        "--dtype", choices=("keep", "bfloat16"), default="keep", help="of the weights written (default: as they are)"
    )
    parser.add_argument(
        "--share-tables", action="store_true", help="drop an EAGLE-3 head's tables that the target has, too"
    )
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else None
    try:
        convert(options.source, options.destination, dtype, share_tables=options.share_tables)
    except SubspecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
