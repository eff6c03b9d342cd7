"""Train a block head of the DSpark kind for a target on text the target wrote, and write it in the published format.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/train_block_head.py --text text/ --minutes 3 --out head/

Without --out the result replaces the head that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse

import torch
from training.block import BlockLesson
from training.course import Course
from training.eagle import shape_for
from training.setup import head_parser, report
from training.student import projected

from subspec.drafts.block_head import BlockHead, BlockShape
from subspec.drafts.eagle3_head import usual_layers

WHAT = """A block head of the DSpark kind in the published format: decoder layers over a block of slots, whose keys and
values are made of the target's hidden states of some layers, with a Markov head and a confidence head; embedding and
LM head are the target's own. It drafts for `draft=block_head`."""

MEANING = """`topK@D`: how often the target's greedy token is among the head's first K at slot D of a block that was
right so far. `chain_tau`: tokens per verification pass of a single chain of a block."""


def parse() -> argparse.Namespace:
    parser = head_parser(__doc__)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--features", type=int, default=3, help="layers of the target whose states it reads")
    parser.add_argument("--block", type=int, default=7, help="slots")
    parser.add_argument("--markov-rank", type=int, default=16)
    parser.add_argument("--mask-id", type=int, default=16, help="a token id that texts do not use")
    parser.add_argument("--anchors", type=int, default=64, help="drafts per conversation and step")
    parser.add_argument("--decay", type=float, default=0.8, help="weight of each further slot")
    parser.add_argument("--intermediate", type=int, help="width of the MLPs (default: the target's)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    course = Course(options)
    model = course.target.model
    config, table = model.config, model.get_input_embeddings().weight
    layers = usual_layers(options.features, config.num_hidden_layers)
    shape = shape_for(
        model,
        BlockShape,
        intermediate=options.intermediate,
        fc_inputs=len(layers) * config.hidden_size,
        layers=layers,
        qk_norm=True,
        decoder_layers=options.layers,
        block=options.block,
        mask_id=options.mask_id,
        shifted=True,
        markov=(len(table), options.markov_rank),
        confidence=config.hidden_size + options.markov_rank,
        target_layers=config.num_hidden_layers,
    )
    head = BlockHead(shape, seed=options.seed)
    with torch.no_grad():
        head.norm.weight.copy_(model.get_decoder().norm.weight)
        # Tokens of similar embeddings begin with similar continuations: a product of two tables near 0 learns slowly.
        start = projected(table, course.occurrences(), options.markov_rank, std=0.5)
        head.markov_head["markov_w1"].weight.copy_(start)
    settings = course.chosen("anchors", "decay")
    keys = ("layers", "features", "block", "markov_rank", "intermediate")
    course.publish_head(
        course.head_lesson(BlockLesson, head, **settings),
        settings=settings | course.chosen(*keys),
        folder="block_head",
        checkpoint="block_head.ckpt",
        title=f"Block head for {course.target.name}",
        what=WHAT,
        meaning=MEANING,
    )


if __name__ == "__main__":
    report(main)
