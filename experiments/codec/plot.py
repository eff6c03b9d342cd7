"""Measured speeds against both ceilings of the link: ``roofline.png`` from the JSON files beside this script."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
WEIGHTS = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)
"""Of Qwen2.5-7B's decoder Linears."""


def main() -> None:
    plain = json.loads((HERE.parent / "gpu" / "benchmark_h200.json").read_text())
    coded = json.loads((HERE / "fast_level_h200.json").read_text())
    own_head = json.loads((HERE / "trees_h200.json").read_text())
    link = coded["link_gb_per_s"] * 1e9
    bits = coded["results"][0]["bits_per_coded_weight"]
    figure, axes = pyplot.subplots(figsize=(11.5, 6), constrained_layout=True)
    taus = [1, 32]
    ceilings = {
        "bf16, everything streamed": (2 * WEIGHTS, "#888888", "--"),
        f"coded ({bits:.2f} bits), everything streamed": (bits / 8 * WEIGHTS, "#b07aa1", "--"),
        "coded, with the resident layers of 8 GiB": (coded["results"][0]["gb_per_pass"] * 1e9, "#7b5aa6", ":"),
    }
    for name, (streamed, colour, style) in ceilings.items():
        axes.plot(taus, [tau * link / streamed for tau in taus], style, color=colour, label=f"ceiling: {name}")
    markers = {
        "plain": "D",
        "beam:48:6:0": "^",
        "adaptive:48:6:0": "o",
        "beam:24:6:48": "s",
        "beam:32:6:10": "s",
        "beam:32:6:0": "v",
    }
    names = {
        "plain": "plain decoding",
        "beam:48:6:0": "beam 48 x 6",
        "adaptive:48:6:0": "adaptive, up to 48 x 6",
        "beam:24:6:48": "beam 24 x 6, up to 48 ahead",
        "beam:32:6:10": "beam 32 x 6, up to 10 ahead",
        "beam:32:6:0": "beam 32 x 6",
    }
    for results, colour, how in (
        (plain["results"], "#2a7f62", "as they are"),
        (coded["results"], "#d1495b", "coded"),
        (own_head["results"], "#e8a33d", "coded, own LM head"),
    ):
        for result in results:
            tree = result["mode"].removeprefix("subspec ")
            if tree not in names:
                continue  # accelerate, which knows no link; widths of 8 and the adaptive tree ahead lie on the others
            label = f"weights {how}: {names[tree]}, {result['tokens_per_s']:.0f} tokens/s"
            axes.plot(result["tau"], result["tokens_per_s"], markers[tree], color=colour, label=label, alpha=0.85)
    axes.set(
        xscale="log", yscale="log", xlabel="tau (tokens per target pass)", ylabel="tokens per second",
        title="planted Qwen2.5-7B (no language model) in 8 GiB, one H200, PCIe 5 x16",
    )  # fmt: skip
    axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_yticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    figure.savefig(HERE / "roofline.png", dpi=120)


if __name__ == "__main__":
    main()
