"""Train an EAGLE head for a target on text the target wrote, and write it in the published format.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/train_eagle.py --text text/ --minutes 3 --out head/ --kind eagle3

Without --out the result replaces the head that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse
from typing import Any

import torch
from training.course import Course
from training.eagle import EagleLesson, shape_for
from training.setup import head_parser, report

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
    parser = head_parser(__doc__)
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
    course = Course(options)
    model, kind, three = course.target.model, KINDS[options.kind], options.kind == "eagle3"
    frequent = course.occurrences().argsort(descending=True, stable=True)
    ids = frequent[: options.draft_vocab if three else 0].sort().values
    own: dict[str, Any] = {}
    if three:
        own = {"fc_inputs": 3 * model.config.hidden_size, "layers": tuple(options.feature_layers)}
    if len(ids):
        own |= {"draft_vocab": len(ids), "mapped": True, "last_id": int(ids[-1])}
    shape = shape_for(model, kind.shape_class, kv_heads=options.kv_heads, intermediate=options.intermediate, **own)
    head = kind(shape, seed=options.seed)
    with torch.no_grad():
        if isinstance(head, Eagle3Head):
            head.norm.weight.copy_(model.get_decoder().norm.weight)
        if len(ids):
            lm_head = model.get_output_embeddings().weight
            head.lm_head.weight.copy_(lm_head[ids.to(lm_head.device)])
            head.d2t.copy_(ids - torch.arange(len(ids)))
    settings = course.chosen("passes", "decay", "regression", "noise")
    if options.regression is None:
        settings["regression"] = 0.0 if three else 0.1
    course.publish_head(
        course.head_lesson(EagleLesson, head, **settings),
        settings=settings | course.chosen("draft_vocab", "feature_layers"),
        folder="eagle3" if three else "eagle",
        checkpoint=f"{options.kind}.ckpt",
        title=f"{'EAGLE-3' if three else 'EAGLE'} head for {course.target.name}",
        what=WHAT[options.kind],
        meaning=MEANING,
    )


if __name__ == "__main__":
    report(main)
