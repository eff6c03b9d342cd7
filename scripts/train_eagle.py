"""Train an EAGLE head for a target on text the target wrote, and write it in the published format.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/train_eagle.py --text text/ --minutes 3 --out head/ --kind eagle3

Without --out the result replaces the head that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse
from typing import Any

import torch
from training.corpus import load_corpus
from training.eagle import EagleLesson, balance_inputs, shape_for, usual_states
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

from subspec.drafts.eagle3_head import Eagle3Head
from subspec.drafts.eagle_head import EagleHead

KINDS = {"eagle2": EagleHead, "eagle3": Eagle3Head}

WHAT = {
    "eagle2": """An EAGLE head (arXiv 2401.15077) in the published format: `fc` and one decoder layer without input
norm, fed with the target's last hidden states; embedding and LM head are the target's own. It drafts for
`draft=eagle2`.""",
    "eagle3": """An EAGLE-3 head (arXiv 2503.01840) in the published format: `fc` fuses the target's hidden states of
three layers, and one decoder layer reads them beside the embedding. It drafts for `draft=eagle3`.""",
}

MEANING = """`topK@D`: how often the target's greedy token is among the head's first K, D tokens deep into a draft that
was right so far (fed with its own features). `chain_tau`: tokens per verification pass of a single chain of six."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_target_options(parser)
    add_training_options(parser, lr=1e-3, rows=32, decay=0.01)
    add_vocabulary_options(parser)
    parser.add_argument("--kind", choices=KINDS, default="eagle2")
    parser.add_argument("--passes", type=int, default=3, help="draft levels trained on the head's own features")
    parser.add_argument("--decay", type=float, default=0.9, help="weight of each further level")
    parser.add_argument(
        "--regression", type=float, help="weight of the features' smooth L1 distance (default: eagle2 0.1, eagle3 0)"
    )
    parser.add_argument("--noise", type=float, default=0.0, help="half-width of uniform noise on features")
    parser.add_argument("--kv-heads", type=int, help="of the head's attention (default: the target's)")
    parser.add_argument("--intermediate", type=int, help="width of the head's MLP (default: the target's)")
    parser.add_argument(
        "--feature-layers",
        type=int,
        nargs=3,
        default=(),
        help="eagle3: the target's layers behind which features are taken (default: the usual ones)",
    )
    parser.add_argument(
        "--draft-vocab",
        type=int,
        default=0,
        help="eagle3: ids of an LM head of its own, the most frequent ones (default: the target's LM head)",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    schedule = schedule_of(options)
    target = open_target(options.target, options.device, options.dtype)
    corpus = load_corpus(options.text, held_out=options.held_out)
    print(f"{corpus.tokens:,} tokens of text, {corpus.answer_tokens:,} to learn from", flush=True)
    counts, kind, three = occurrences(corpus, target), KINDS[options.kind], options.kind == "eagle3"
    vocabulary = SampledVocabulary.of(counts.to(target.device), options.frequent, options.sampled)
    table, lm_head = (
        module.weight for module in (target.model.get_input_embeddings(), target.model.get_output_embeddings())
    )
    own: dict[str, Any] = {}
    if three:
        own = {"fc_inputs": 3 * target.model.config.hidden_size, "layers": tuple(options.feature_layers)}
    ids = counts.argsort(descending=True, stable=True)[: options.draft_vocab].sort().values
    if three and len(ids):
        own |= {"draft_vocab": len(ids), "mapped": True, "last_id": int(ids[-1])}
    shape = shape_for(
        target.model, kind.shape_class, kv_heads=options.kv_heads, intermediate=options.intermediate, **own
    )
    head = kind(shape, seed=options.seed)
    with torch.no_grad():
        if isinstance(head, Eagle3Head):
            head.norm.weight.copy_(target.model.get_decoder().norm.weight)
        if three and len(ids):
            head.lm_head.weight.copy_(lm_head[ids.to(lm_head.device)])
            head.d2t.copy_(ids - torch.arange(len(ids)))
    head = head.to(target.device)
    settings = {key: getattr(options, key) for key in ("passes", "decay", "regression", "noise")}
    if options.regression is None:
        settings["regression"] = 0.0 if three else 0.1
    lesson = EagleLesson(target.model, head, **settings, vocabulary=vocabulary, dtype=arithmetic(target))
    states = usual_states(target, corpus, lesson.wants)
    balance_inputs(head, states.chunk(3, dim=-1) if three else (table, states))
    settings |= {key: getattr(options, key) for key in ("frequent", "sampled", "draft_vocab", "feature_layers")}
    train_and_publish(
        options,
        schedule,
        target,
        corpus,
        lesson,
        lambda folder: save_head(head, folder, len(table)),
        folder="eagle3" if three else "eagle",
        checkpoint=f"{options.kind}.ckpt",
        identity=settings | shape.config(),
        settings=settings,
        title=f"{'EAGLE-3' if three else 'EAGLE'} head for {target.name}",
        what=WHAT[options.kind],
        meaning=MEANING,
        parameters=sum(p.numel() for p in head.parameters()),
    )


if __name__ == "__main__":
    report(main)
