"""Train a block head of the DSpark kind for a target on text the target wrote, and write it in the published format.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/train_block_head.py --text text/ --minutes 3 --out head/

Without --out the result replaces the head that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse

import torch
from training.block import BlockLesson
from training.corpus import load_corpus
from training.eagle import balance_inputs, shape_for, usual_states
from training.losses import SampledVocabulary
from training.publish import save_head, train_and_publish
from training.setup import (
    add_target_options,
    add_training_options,
    add_vocabulary_options,
    arithmetic,
    occurrences,
    open_target,
    report,
    schedule_of,
)
from training.student import projected

from subspec.drafts.block_head import BlockHead, BlockShape
from subspec.drafts.eagle3_head import usual_layers

WHAT = """A block head of the DSpark kind in the published format: decoder layers over a block of slots, whose keys and
values are made of the target's hidden states of some layers, with a Markov head and a confidence head; embedding and
LM head are the target's own. It drafts for `draft=block_head`."""

MEANING = """`topK@D`: how often the target's greedy token is among the head's first K at slot D of a block that was
right so far. `chain_tau`: tokens per verification pass of a single chain of a block."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_options(parser)
    add_training_options(parser, lr=1e-3, rows=32, decay=0.01)
    add_vocabulary_options(parser)
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
    schedule = schedule_of(options)
    target = open_target(options.target, options.device, options.dtype)
    corpus = load_corpus(options.text, held_out=options.held_out)
    print(f"{corpus.tokens:,} tokens of text, {corpus.answer_tokens:,} to learn from", flush=True)
    counts, config = occurrences(corpus, target), target.model.config
    table = target.model.get_input_embeddings().weight
    layers = usual_layers(options.features, config.num_hidden_layers)
    shape = shape_for(
        target.model,
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
        head.norm.weight.copy_(target.model.get_decoder().norm.weight)
        markov = head.markov_head
        # Tokens of similar embeddings begin with similar continuations: a product of two tables near 0 learns slowly.
        markov["markov_w1"].weight.copy_(projected(table, counts, options.markov_rank, std=0.5))
    head = head.to(target.device)
    settings = {key: getattr(options, key) for key in ("anchors", "decay")}
    vocabulary = SampledVocabulary.of(counts.to(target.device), options.frequent, options.sampled)
    lesson = BlockLesson(target.model, head, **settings, vocabulary=vocabulary, dtype=arithmetic(target))
    states = usual_states(target, corpus, lesson.wants)
    balance_inputs(head, states.chunk(len(layers), dim=-1))
    keys = ("frequent", "sampled", "layers", "features", "block", "markov_rank", "intermediate")
    settings |= {key: getattr(options, key) for key in keys}
    train_and_publish(
        options,
        schedule,
        target,
        corpus,
        lesson,
        lambda folder: save_head(head, folder, len(table)),
        folder="block_head",
        checkpoint="block_head.ckpt",
        identity=settings | shape.config(),
        settings=settings,
        title=f"Block head for {target.name}",
        what=WHAT,
        meaning=MEANING,
        parameters=sum(p.numel() for p in head.parameters()),
    )


if __name__ == "__main__":
    report(main)
