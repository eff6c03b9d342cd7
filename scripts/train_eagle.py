"""Train an EAGLE head for a target on text the target wrote, and write it in the published format.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/train_eagle.py --text text/ --minutes 3 --out head/

Without --out the result replaces the head that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from training.corpus import load_corpus
from training.eagle import EagleLesson, balance_inputs, shape_for
from training.publish import train_and_publish
from training.setup import (
    add_target_options,
    add_training_options,
    arithmetic,
    open_target,
    report,
    schedule_of,
)

from subspec.drafts.eagle_head import EagleHead

WHAT = """An EAGLE head (arXiv 2401.15077) in the published format: `fc` and one decoder layer without input norm, fed
with the target's last hidden states; embedding and LM head are the target's own. It drafts for `draft=eagle2`."""

MEANING = """`topK@D`: how often the target's greedy token is among the head's first K, D tokens deep into a draft that
was right so far (fed with its own features). `chain_tau`: tokens per verification pass of a single chain of six."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_target_options(parser)
    add_training_options(parser, lr=1e-3, rows=32, decay=0.01)
    parser.add_argument(
        "--passes", type=int, default=3, help="draft levels trained on the head's own features"
    )
    parser.add_argument("--decay", type=float, default=0.9, help="weight of each further level")
    parser.add_argument(
        "--regression", type=float, default=0.1, help="weight of the features' smooth L1 distance"
    )
    parser.add_argument("--noise", type=float, default=0.0, help="half-width of uniform noise on features")
    parser.add_argument("--kv-heads", type=int, help="of the head's attention (default: the target's)")
    parser.add_argument("--intermediate", type=int, help="width of the head's MLP (default: the target's)")
    return parser.parse_args()


def save_head(head: EagleHead, folder: Path) -> int:
    """Write ``model.safetensors`` (bf16) and ``config.json``; bytes of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().bfloat16().cpu().contiguous() for name, tensor in head.state_dict().items()
    }
    part = folder / "model.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(part, folder / "model.safetensors")
    config = head.shape.config() | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    options = parse()
    schedule = schedule_of(options)
    target = open_target(options.target, options.device, options.dtype)
    corpus = load_corpus(options.text, held_out=options.held_out)
    print(f"{corpus.tokens:,} tokens of text, {corpus.answer_tokens:,} to learn from", flush=True)
    shape = shape_for(target.model, kv_heads=options.kv_heads, intermediate=options.intermediate)
    head = EagleHead(shape, seed=options.seed).to(target.device)
    settings = {key: getattr(options, key) for key in ("passes", "decay", "regression", "noise")}
    lesson = EagleLesson(target.model, head, **settings, dtype=arithmetic(target))
    with torch.no_grad():
        some = lesson.features(corpus.held_ids[:8].long().to(target.device)).flatten(0, 1)
    balance_inputs(head, target.model.get_input_embeddings().weight, some)
    train_and_publish(
        options,
        schedule,
        target,
        corpus,
        lesson,
        lambda folder: save_head(head, folder),
        folder="eagle",
        checkpoint="eagle.ckpt",
        identity=settings | shape.config(),
        settings=settings,
        title=f"EAGLE head for {target.name}",
        what=WHAT,
        meaning=MEANING,
        parameters=sum(p.numel() for p in head.parameters()),
    )


if __name__ == "__main__":
    report(main)
