"""Predictions beside the measurements in ``experiments/gpu``: how far off is ``python -m subspec.predict``?

    python experiments/predict/check.py

Needs no GPU. Every prediction gets what a user would have (card, target, budget, tree, the measured tau and link) and
the resident layers that the run had. What it printed is in this folder's README.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from subspec.config.enums import Codec
from subspec.config.quant_checks import HEAD, USUAL_MODULES
from subspec.config.schema import (
    BeamTreeConfig,
    BenchmarkConfig,
    Config,
    DecodingConfig,
    HqqConfig,
    NoLoggerConfig,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.planning.gpu_specs import find_gpu
from subspec.planning.predict_timing import EFFICIENCY, LEVEL_LAYER_S
from subspec.predict import Acceptance, Iteration, Machine, predict
from subspec.targets.planted import SHAPES

GPU = Path(__file__).resolve().parents[1] / "gpu"
ROOM = 0.25
"""GiB more than a run's budget, whose resident layers are given."""

FILES = ("uncoded_h200.json", "../codec/default_h200.json")
"""Runs of today's kernels."""
ROWS = "../rows/int4_rows_h200.json"
"""Times of levels of many rows."""
LEVELS = (
    ("qwen2_5_7b", "level_7b_h200.json"),
    ("llama3_1_8b", "level_8b_h200.json"),
    ("qwen2_5_32b", "level_32b_h200.json"),
)
"""Targets and times of single levels (``scripts/level_benchmark.py``) that the constants of a level come from, with the
exact LM head and others. No whole run went into the fit."""
LINEARS = "linears_h200.json"
"""Times of single Linears."""


@dataclass(frozen=True)
class Compared:
    """A run and its prediction: tokens/s, seconds drafting and in the pass, tau; None where nothing was measured."""

    run: str
    measured: tuple[float, float | None, float | None, float]
    predicted: Iteration
    note: str

    @property
    def error(self) -> float:
        """Predicted over measured tokens per second, less one."""
        return self.predicted.tokens_per_s / self.measured[0] - 1


def config(
    shape: str, vram: float, depth: int, width: int, resident: int | None, codec: Codec = Codec.none, head_bits: int = 0
) -> Config:
    """A run of ``scripts/gpu_benchmark.py``."""
    quant = HqqConfig(name="hqq", modules=[*USUAL_MODULES, *[HEAD] * (head_bits > 0)])
    quant = replace(quant, bits_by=replace(quant.bits_by, lm_head=head_bits or None))
    return Config(
        target=PlantedTargetConfig(name=f"planted_{shape}", shape=shape),
        draft=SubstituteDraftConfig(name="subspec"),
        quant=quant,
        tree=BeamTreeConfig(name="beam", depth=depth, width=width),
        decoding=DecodingConfig(name="greedy", max_new_tokens=None),
        offload=StreamOffloadConfig(name="stream", vram_gib=vram, resident_layers=resident, codec=codec),
        benchmark=BenchmarkConfig(name="gsm8k"),
        logger=NoLoggerConfig(name="none"),
    )


def _way(run: Config, link: float, acceptance: Acceptance) -> Iteration:
    machine = Machine(link, find_gpu("H200").memory_gb_per_s, tensor=find_gpu("H200").tensor)
    (one,) = predict(run, SHAPES[run.target.shape](), machine, acceptance, depths=()).depths
    return one.iteration


def streamed_runs() -> Iterator[tuple[str, dict, dict]]:
    """(file, its head, a result) of every committed run with a substitute."""
    for file in FILES:
        content = json.loads((GPU / file).read_text(encoding="utf-8"))
        for result in content["results"]:
            if result["mode"].startswith("subspec"):
                yield file, content, result


def compare() -> list[Compared]:
    """Every committed run, and plain streaming."""
    found = []
    for file, content, result in streamed_runs():
        mode = result["mode"]
        # Runs of earlier versions have a fourth part: levels drafted while the target streamed.
        said = re.search(r"(beam|adaptive):(\d+):(\d+)(?::(\d+))?", mode)
        kind = said[1] if said else "adaptive" if mode == "adaptive" else "beam"
        if said and int(said[4] or 0):
            continue
        depth, width = (int(said[2]), int(said[3])) if said else (content["depth"], content["width"])
        # An adaptive tree stops where it likes: the prediction gets how deep it went on average.
        levels = round(result["levels"]) if kind == "adaptive" else depth
        codec = Codec(content.get("codec", "none"))
        layers = result["resident_layers"]
        head = content.get("head_bits") or (8 if result.get("bits_per_coded_head_weight") else 0)
        # Shorter codes than estimated leave room for a layer that the plan has no room for.
        run = config(content["target"], content["vram"] + ROOM, levels, width, layers, codec, head)
        way = _way(run, content["link_gb_per_s"], Acceptance.from_tau(result["tau"], levels))
        measured = (result["tokens_per_s"], result["draft_s"], result["verify_s"], result["tau"])
        note = f"given its mean depth of {levels}" if kind == "adaptive" else ""
        coded = ", coded" if codec is Codec.substitute else ""
        coded += f", own {head}-bit head" if head else ""
        name = f"{content['target']} in {content['vram']:g} GiB{coded}, {kind} {depth} x {width}"
        found.append(Compared(f"{name} (`{file.removeprefix('../')}`)", measured, way, note))
    return [*found, _plain()]


def _plain() -> Compared:
    content = json.loads((GPU / FILES[0]).read_text(encoding="utf-8"))
    (result,) = (one for one in content["results"] if one["mode"].startswith("plain"))
    machine = Machine(content["link_gb_per_s"], find_gpu("H200").memory_gb_per_s)
    run = config("qwen2_5_7b", 8.0, 48, 6, None)
    found = predict(run, SHAPES["qwen2_5_7b"](), machine, Acceptance.from_tau(20, 48), depths=()).plain
    assert found is not None
    measured = result["tokens_per_s"], 0.0, result["verify_s"], 1.0
    return Compared(f"qwen2_5_7b in 8 GiB, plain streaming (`{FILES[0]}`)", measured, found, "")


def levels() -> Iterator[tuple[str, int, float, float]]:
    """(name, layers, seconds of the bytes at the data sheet's bandwidth, seconds as measured) of single levels."""
    for shape, file in LEVELS:
        content, model = json.loads((GPU / file).read_text(encoding="utf-8")), SHAPES[shape]()
        for name, one in content["formats"].items():
            head = int(name.partition("+head:")[2] or 0)
            run = config(shape, 32.0, 48, 6, 0, head_bits=head)
            plan = predict(run, model, Machine(55.5, 4800.0), Acceptance.from_tau(20, 48), depths=()).plan
            read = plan.level_read_bytes / (find_gpu("H200").memory_gb_per_s * 1e9)
            yield f"{shape} {name}", model.num_hidden_layers, read, one["ms_per_level"] / 1e3


def fitted() -> tuple[float, float]:
    """(seconds per layer, share of the memory bandwidth): least squares of the relative errors of all levels."""
    points = [(layers / ms, read / ms) for _, layers, read, ms in levels()]
    layer, inverse = np.linalg.lstsq(np.array(points), np.ones(len(points)), rcond=None)[0]
    return float(layer), 1 / float(inverse)


def linears() -> tuple[float, float, float]:
    """(seconds per launch, share of the memory bandwidth, largest relative error) of single 4-bit Linears, as above."""
    found = json.loads((GPU / LINEARS).read_text(encoding="utf-8"))["us"]
    points = []
    for name, us in found.items():
        n, k = map(int, name.split()[1].split("x"))
        points.append((1e6 / us, n * k * 4.25 / 8 / (find_gpu("H200").memory_gb_per_s * 1e3) / us))
    (launch, inverse), *_ = np.linalg.lstsq(np.array(points), np.ones(len(points)), rcond=None)
    worst = np.abs(np.array(points) @ [launch, inverse] - 1).max()
    return float(launch), 1 / float(inverse), float(worst)


def rows() -> list[tuple[int, float, float]]:
    """(rows, seconds as measured, as predicted) of a level of the 7B by its number of rows."""
    content = json.loads((GPU / ROWS).read_text(encoding="utf-8"))["rows"]
    gpu, model = find_gpu("H200"), SHAPES["qwen2_5_7b"]()
    machine = Machine(55.5, gpu.memory_gb_per_s, tensor=gpu.tensor)
    found = []
    for count, one in content.items():
        run = config("qwen2_5_7b", 24.0, 48, int(count), 0)
        level = predict(run, model, machine, Acceptance.from_tau(20, 48), depths=()).level_s
        found.append((int(count), one["ms"] / 1e3, level))
    return found


def lines() -> list[str]:
    """The table of the README."""
    head = [
        "| run | tokens/s: measured | predicted | error | tau | draft s | pass s | note |",
        "|---|---:|---:|---:|---|---|---|---|",
    ]
    rows = []
    for one in compare():
        speed, draft, verify, tau = one.measured
        way = one.predicted
        times = f"{draft:.3f} / {way.draft_s:.3f} | {verify:.3f} / {way.pass_s:.3f}"
        rows.append(
            f"| {one.run} | {speed:.1f} | {way.tokens_per_s:.1f} | {100 * one.error:+.0f} % "
            f"| {tau:.1f} / {way.tau:.1f} | {times} | {one.note} |"
        )
    return head + rows


def main() -> None:
    """Print the tables and the fit."""
    print("\n".join(lines()))
    layer, share = fitted()
    print(
        f"\nfitted: {1e6 * layer:.1f} microseconds per layer and {share:.3f} of the memory bandwidth; "
        f"used: {1e6 * LEVEL_LAYER_S:.1f} and {EFFICIENCY:.2f}"
    )
    for name, layers, read, ms in levels():
        print(f"{name}: {1e3 * ms:.3f} ms measured, {1e3 * (layers * LEVEL_LAYER_S + read / EFFICIENCY):.3f} predicted")
    launch, share, worst = linears()
    print(f"single Linears: {1e6 * launch:.1f} microseconds and {share:.3f} of the bandwidth, errors up to {worst:.0%}")
    for count, measured, level in rows():
        print(f"{count} rows: {1e3 * measured:.2f} ms measured, {1e3 * level:.2f} predicted")


if __name__ == "__main__":
    main()
