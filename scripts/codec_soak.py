"""Thousands of coded passes, every decoded layer compared with the original.

    python scripts/codec_soak.py [--target qwen2_5_7b] [--vram 8] [--passes 2000] [--quant higgs]

Loads a planted target with ``offload.codec=substitute``, compares every decoded parameter with the planted original bit
for bit once, and then decodes texts without a draft (one pass per token). After each decoding of a layer in each pass,
sums of every 32 KiB of the whole layer are compared on the device with those of the compared original; another stream
keeps the device busy meanwhile. Ends with status 1 if anything ever differed. Prints one JSON line last.
"""

import argparse
import json
import os
import sys
import time

import psutil
import torch
from torch import Tensor

from subspec.codec.coded_layer import LayerRestorer
from subspec.config.enums import Codec, Kernel
from subspec.config.schema import (
    BeamTreeConfig,
    BenchmarkConfig,
    Config,
    DecodingConfig,
    HiggsConfig,
    HqqConfig,
    NoLoggerConfig,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.engine import Engine
from subspec.levels.build import ROLES
from subspec.offload.bandwidth import measure_link
from subspec.planning.budget import DeviceMemory
from subspec.planning.plan import plan_run
from subspec.session import assemble_streamed, cap_device
from subspec.targets.planted import PlantedSource

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

BLOCK = 4096
"""64-bit words that share a sum."""


def block_sums(buffer: Tensor) -> Tensor:
    """int64 [blocks]: wrapping sums of a buffer's 64-bit words (it has whole ones), a block at a time."""
    words = buffer.flatten().view(torch.int64)
    whole = words.numel() // BLOCK * BLOCK
    return torch.cat([words[:whole].view(-1, BLOCK).sum(1), words[whole:].sum().view(1)])


class Watch:
    """Stands between a layer's decoding and its use.

    Attributes:
        expected: sums of each slice once it was compared with the original. index: the layer in use.
        wrong: int64 on the device, blocks that ever differed.
        decoded: layers decoded.
    """

    def __init__(self, decoding: LayerRestorer, source: PlantedSource) -> None:
        self.decoding, self.source = decoding, source
        self.expected: dict[tuple[int, str, int], Tensor] = {}
        self.index = -1
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.decoded = 0
        self._restore, self._restored = decoding.restore, decoding.restored
        decoding.restore, decoding.restored = self.restore, self.restored  # type: ignore[method-assign]

    def restore(self, index: int, flat: Tensor) -> None:
        """As :meth:`LayerRestorer.restore`, then checked as far as it is restored."""
        self._restore(index, flat)
        self.index = index
        self.decoded += 1
        names = [name for name, tensor in self.decoding.parameters.items() if not tensor.is_meta]
        self._check((index, "", 0), names, [self.decoding.parameters[name] for name in names], slice(None))

    def restored(self, role: str, first: int) -> list[Tensor]:
        """As :meth:`LayerRestorer.restored`, then checked."""
        found = self._restored(role, first)
        names = [f"{name}.weight" for name in ROLES[role]]
        self._check((self.index, role, first), names, found, slice(first, first + len(found[0])))
        return found

    def _check(self, key: tuple[int, str, int], names: list[str], found: list[Tensor], rows: slice) -> None:
        sums = torch.cat([block_sums(tensor) for tensor in found])
        if key in self.expected:
            self.wrong += (sums != self.expected[key]).sum()
            return
        layer = self.source.layer(self.index, torch.device("cuda"))
        for name, tensor in zip(names, found, strict=True):
            if not torch.equal(tensor.view(torch.int16), layer[name][rows].contiguous().view(torch.int16)):
                sys.exit(f"layer {self.index}: {name} was not rebuilt bit for bit")
        self.expected[key] = sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2_5_7b")
    parser.add_argument("--vram", type=float, default=8.0, help="device memory budget in GiB")
    parser.add_argument("--passes", type=int, default=2000)
    parser.add_argument("--text", type=int, default=500, help="tokens, so passes, of each text")
    parser.add_argument("--resident", type=int, help="coded layers on the device; default: what fits")
    parser.add_argument("--quant", choices=("hqq", "higgs"), default="hqq")
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    device = torch.device("cuda")
    if options.quant == "higgs":
        quant, kernel = HiggsConfig(name="higgs", bits=options.bits), Kernel.lut_mma
    else:
        quant = HqqConfig(name="hqq", bits=options.bits)
        kernel = Kernel.int4_mma
    config = Config(
        target=PlantedTargetConfig(name=f"planted_{options.target}", shape=options.target),
        draft=SubstituteDraftConfig(name="subspec", kernel=kernel),
        quant=quant,
        tree=BeamTreeConfig(name="beam", depth=1, width=1),
        decoding=DecodingConfig(
            name="greedy", max_new_tokens=options.text, max_length=options.text + 256, ignore_eos=True
        ),
        offload=StreamOffloadConfig(
            name="stream", vram_gib=options.vram, codec=Codec.substitute, resident_layers=options.resident
        ),
        benchmark=BenchmarkConfig(name="gsm8k"),
        logger=NoLoggerConfig(name="none"),
        run_dir="",
    )
    link = measure_link(device)
    source = PlantedSource(config.target, torch.bfloat16, device)  # type: ignore[arg-type]
    plan = plan_run(
        config,
        source.config,
        link_gb_per_s=link,
        host_free=psutil.virtual_memory().available,
        device=DeviceMemory.measured(device),
    )
    cap_device(options.vram, device)
    assembly = assemble_streamed(config, source, plan, device)
    streamed = assembly.streamed
    assert streamed is not None
    assert streamed.target.restorer is not None
    watch = Watch(streamed.target.restorer, source)
    # What the original and the noise take is not the run's.
    torch.cuda.set_per_process_memory_fraction(1.0)
    engine = Engine(streamed.target, max_length=config.decoding.max_length, prefill_chunk=plan.prefill_chunk)
    generator = torch.Generator().manual_seed(0)
    noise, side = torch.randn(1024, 1024, device=device), torch.cuda.Stream()
    passes, started = 0, time.perf_counter()
    while passes < options.passes:
        with torch.cuda.stream(side):
            for _ in range(200):
                noise = noise @ noise.softmax(-1)
        prompt = torch.randint(0, source.config.vocab_size, (64,), generator=generator).tolist()
        left = options.passes - passes
        engine.generate(prompt, max_new_tokens=min(options.text, left), ignore_eos=True)
        passes = watch.decoded // len(streamed.target.restorer.layers)  # prefill included
        print(f"{passes} passes, {watch.decoded} layers decoded, {int(watch.wrong)} blocks differed", flush=True)
    seconds = time.perf_counter() - started
    wrong = int(watch.wrong)
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "target": source.source,
                "quant": options.quant,
                "bits": options.bits,
                "bits_per_weight": streamed.bits_per_weight,
                "resident_coded_layers": len(streamed.target.restorer.resident),
                "streamed_layers": source.config.num_hidden_layers - len(streamed.target.resident_layers),
                "passes": passes,
                "layers_decoded": watch.decoded,
                "blocks_that_differed": wrong,
                "seconds": seconds,
            }
        )
    )
    assembly.close()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
