"""Time of a draft level of the default target on this CPU, by kernel and width, and what it is spent on.

    taskset -c 0 python scripts/cpu_level_benchmark.py [--kernels modules,auto,int4_cpu] [--widths 1,4,6] [--json FILE]

All kernels of a width run in turn in one process, so that other processes disturb them alike. Figures are medians of
wall time and of this thread's CPU time, which leaves out the time that other processes had the core.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from subspec.config.enums import Cache
from subspec.config.schema import (
    Config,
    DecodingConfig,
    EmbeddedTargetConfig,
    HqqConfig,
    OffloadConfig,
    SubstituteDraftConfig,
    Unpack,
)
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.cpu_levels import CpuLevels
from subspec.levels.dense import layer_views
from subspec.quant.cpu_linear import CpuFormat, CpuHeadFormat
from subspec.quant.hqq import hqq_quantizer
from subspec.quant.level_linear import Variant
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.session import assemble
from subspec.store.substitutes import CachedQuantizer, SubstituteStore
from subspec.targets import Target
from subspec.targets.load import load_target
from subspec.utils.cpu import cpu_name

CPU = torch.device("cpu")
DEPTH = 6


def draft_of(target: Target, kernel: str, width: int) -> SubstituteDraft:
    """The substitute with measured kernels (``auto``), or as modules."""
    config = Config(
        draft=SubstituteDraftConfig(name="subspec", unpack=Unpack.auto if kernel == "auto" else Unpack.always),
        quant=HqqConfig(name="hqq"),
        decoding=DecodingConfig(name="greedy"),
        offload=OffloadConfig(name="none"),
    )
    return assemble(config, target, policy=Beam(DEPTH, width)).engine.draft


def drafts_of(target: Target, kernels: list[str]) -> dict[str, SubstituteDraft]:
    """Substitutes with one kernel for all Linears; that of the head has 8 bits, if 4 are not to be."""
    model, quantizer = target.model, hqq_quantizer(format_class=CpuFormat)
    facts = {"target": target.identity, "dtype": str(target.dtype), **quantizer.facts}
    store = SubstituteStore(facts, cache=Cache.auto, folder=None, expected_bytes=1 << 27, note=print)
    known: list[dict[str, QuantizedWeight]] = []
    for index, layer in enumerate(model.get_decoder().layers):
        names = [name for part in ROLES.values() for name in part]
        cached = CachedQuantizer(quantizer, store)
        own = {f"{n}.weight": cached.quantize(layer.get_submodule(n).weight, f"{index}.{n}") for n in names}
        known.append(own)
        cached.end_layer()
    store.close()
    drafts = {}
    for kernel in kernels:
        builder = SubstituteBuilder(
            quantizer,
            formats=dict.fromkeys(ROLES, CpuFormat()),
            kernel=dict.fromkeys(ROLES, Variant(kernel)),
            keep_exact=frozenset(),
            dtype=torch.float32,
        )
        layers = [
            builder.build_layer(layer_views(layer), CPU, known=own)
            for layer, own in zip(model.get_decoder().layers, known, strict=True)
        ]
        own_head = Variant("int8_cpu" if kernel == "int4_cpu" else kernel)
        head = CpuHeadFormat().linear(own_head, model.get_output_embeddings().weight.data, swiglu=False)
        drafts[kernel] = SubstituteDraft(CpuLevels(model, level_model(model, layers, head)))
    return drafts


def parts_of(draft: SubstituteDraft, rows: int) -> dict[str, Callable[[], object]]:
    """A level's Linears and head by themselves; empty of modules."""
    if not isinstance(draft.model, CpuLevels):
        return {}
    levels = draft.model.levels
    x = torch.randn(rows, levels.hidden)
    inner = torch.randn(rows, levels.layers[0].gate_up.stride // 2)

    def linears() -> None:
        for layer in levels.layers:
            layer.qkv(x), layer.out(x), layer.gate_up(x), layer.down(inner)

    return {"linears": linears, "head": lambda: draft.model.logits(x)}


def run_level(draft: SubstituteDraft, tree: Tree, frontier: Tensor) -> Tensor:
    """The logits of a level, whose rows are given back."""
    used = draft.rows.used
    logits = draft.expand(tree, frontier)
    draft.rows.used = used
    return logits


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of wall time and of this thread."""
    wall, own = time.perf_counter(), time.thread_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.thread_time() - own) * 1e3


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default="modules,auto,int4_cpu,int8_cpu,bfloat16,float32")
    parser.add_argument("--widths", default="1,4,6")
    parser.add_argument("--prefix", type=int, default=256, help="tokens in front of the tree")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    target = load_target(EmbeddedTargetConfig(name="smollm2_135m"), CPU)
    result = {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prefix": options.prefix,
        "widths": {},
    }
    print(json.dumps(result))
    prompt = torch.randint(0, target.model.config.vocab_size, (options.prefix,))
    kernels = options.kernels.split(",")
    drafts = drafts_of(target, [kernel for kernel in kernels if kernel not in ("auto", "modules")])
    if "modules" in kernels:
        drafts["modules"] = draft_of(target, "modules", 1)
    for width in map(int, options.widths.split(",")):
        policy, calls = Beam(DEPTH, width), {}
        if "auto" in kernels:
            drafts["auto"] = draft_of(target, "auto", width)
        for kernel, draft in drafts.items():
            exact = TargetModel(target.model)
            cache = exact.new_cache(
                max_length=options.prefix + 1, draft_rows=policy.draft_rows, target_rows=options.prefix
            )
            draft.begin(cache)
            exact.append(prompt, cache)
            tree = Tree(policy.capacity, CPU)
            frontier = tree.plant(prompt[-1:])
            for _ in range(DEPTH - 1):
                frontier = draft.extend(tree, frontier, policy)
            calls[f"{kernel}: level"] = lambda d=draft, t=tree, f=frontier: run_level(d, t, f)
            calls |= {f"{kernel}: {part}": call for part, call in parts_of(draft, width).items()}
        times = {name: [timed(call) for _ in range(2)] for name, call in calls.items()}
        for own in times.values():
            own.clear()
        for _ in range(options.rounds):
            for name, call in calls.items():
                times[name].append(timed(call))
        rows = {name: [round(median(column), 1) for column in zip(*own, strict=True)] for name, own in times.items()}
        result["widths"][width] = rows
        print(f"width {width}: (wall, CPU) ms, medians of {options.rounds}")
        for name, (wall, own) in rows.items():
            print(f"  {name:20} {wall:7.1f} {own:7.1f}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
