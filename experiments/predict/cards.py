"""Predicted speeds of a planted 7B in 8 GiB on an RTX 4090 and an RTX 3060: which settings help, and what is missing.

    python experiments/predict/cards.py

Needs no GPU; no such card was measured. What it printed is in this folder's README.
"""

from subspec.cli.predict import parse
from subspec.cli.predict_inputs import predict_command
from subspec.planning.predict import Prediction

CARDS = ("rtx_4090", "rtx_3060")
BARS = {"rtx_4090": (75, 100), "rtx_3060": (40, 55)}
"""Tokens per second wanted, and hoped for."""

RUN = ["target=planted_qwen2_5_7b", "offload.vram_gib=8", "depths=[8,10,15,21,24,28,31,36,42]"]
TAU = ["tau=24", "tau_depth=48"]
HEAD = ["quant.modules=[attention,mlp,lm_head]"]
VOCABULARY = ["draft.vocab=32768"]

LEVELS = {
    "exact LM head": [*TAU, "quant.modules=[attention,mlp]"],
    "8-bit LM head, the default": TAU,
    "4-bit LM head": [*TAU, *HEAD],
    "`draft.vocab=32768`": [*TAU, *VOCABULARY],
    "the last two": [*TAU, *HEAD, *VOCABULARY],
    "the same, width 4 (tau 22.3)": ["tree.width=4", "tau=22.3", "tau_depth=48", *HEAD, *VOCABULARY],
    "8-bit LM head, adaptive tree (tau 23.2 at 34 levels)": ["tau=23.2", "tau_depth=34"],
    "4-bit LM head, adaptive tree (tau 20.6 at 30 levels)": [*HEAD, "tau=20.6", "tau_depth=30"],
}
"""Levels without a proposer."""

CASCADES = {
    "prompt_lookup, 10 nodes": ("prompt_lookup", 10, (0.7, 0.5, 0.4)),
    "prompt_lookup, 26 nodes": ("prompt_lookup", 26, (0.61, 0.4)),
    "eagle3, 10 nodes": ("eagle3", 10, (0.59,)),
    "eagle3, 26 nodes": ("eagle3", 26, (0.46,)),
}
"""Proposer, ``draft.proposed`` and passes per level: first what real text had at width 4 (``../drafts/cascade.md``)."""


def predicted(card: str, *settings: str) -> Prediction:
    """The prediction of one command."""
    return predict_command(parse([*RUN, f"card={card}", *settings]), lambda _: None)[0]


def cascade(card: str, name: str, passes: float) -> Prediction:
    """With a proposer, and a 4-bit LM head."""
    proposer, nodes, _ = CASCADES[name]
    path = ["draft.proposer_path=planted"] if proposer == "eagle3" else []
    own = [f"draft.proposer={proposer}", f"draft.proposed={nodes}", f"passes={passes}", *path]
    return predicted(card, *TAU, *HEAD, *own)


def cells(found: Prediction) -> str:
    """Milliseconds of a level or pass, of its proposals, and of the rest of an iteration; best depth and speed."""
    best = found.best
    way = best.iteration
    return (
        f"{1e3 * found.level_s:.1f} | {1e3 * found.proposals_s:.1f} | {1e3 * way.pass_s:.0f} | {best.depth} "
        f"| {way.tokens_per_s:.1f}"
    )


def most_passes(found: Prediction, speed: float) -> float:
    """Most passes per level that reach a speed, at the best depth for it."""
    wanted = []
    for one in found.depths:
        way = one.iteration
        per_pass = way.draft_s / found.acceptance.passes
        wanted.append((way.tau / speed - way.pass_s) / per_pass)
    return max(wanted)


def needed(card: str, name: str) -> str:
    """Passes per level at which the bars are reached."""
    found = cascade(card, name, 0.5)
    return " | ".join(f"{most_passes(found, bar):.2f}" for bar in BARS[card])


def row(label: str) -> str:
    """A row of the first table."""
    return f"| {label} | " + " | ".join(cells(predicted(card, *LEVELS[label])) for card in CARDS) + " |"


def cascade_row(name: str, passes: float) -> str:
    """A row of the second table."""
    return f"| {name} | {passes:g} | " + " | ".join(cells(cascade(card, name, passes)) for card in CARDS) + " |"


def needed_row(name: str) -> str:
    """A row of the third table."""
    return f"| {name} | " + " | ".join(needed(card, name) for card in CARDS) + " |"


def main() -> None:
    """Print the three tables."""
    for label in LEVELS:
        print(row(label), flush=True)
    print()
    for name, (_, _, passes) in CASCADES.items():
        for own in passes:
            print(cascade_row(name, own), flush=True)
    print()
    for name in CASCADES:
        print(needed_row(name), flush=True)


if __name__ == "__main__":
    main()
