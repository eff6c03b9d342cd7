"""Time to rebuild one coded layer, by quantizer and bits, on this card (planted weights of a real shape).

    python scripts/codec_benchmark.py [--target qwen2_5_7b] [--formats hqq4,hqq8,higgs4] [--json FILE]

Codes the first layer of a planted target given each substitute, as loading does (every Linear is restored and compared
bit by bit), and times its restoration. Also prints the layer's bytes, the time that they take over the measured link,
which has to be longer, and the weights restored per second. The last line is JSON.
"""

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from subspec.codec.coded_layer import encode_layer
from subspec.codec.restore import Restorer
from subspec.config.schema import PlantedTargetConfig
from subspec.kernels.timing import graph_time
from subspec.levels.build import ROLES, SubstituteBuilder
from subspec.offload.bandwidth import measure_link
from subspec.quant.codebook_linear import HiggsFormat, higgs_quantizer
from subspec.quant.hqq import HqqFormat, hqq_quantizer
from subspec.quant.weight_format import FormatQuantizer, WeightFormat
from subspec.targets.layer_bytes import PlainCodec, parameter_views
from subspec.targets.planted import PlantedSource

FORMATS = "hqq4,hqq8,hqq3,hqq2,higgs4,higgs3,higgs2"


def substitute_of(name: str) -> tuple[FormatQuantizer, WeightFormat, str]:
    """Quantizer, format and kernel of ``hqq4``, ``higgs3``..."""
    method, bits = name[:-1], int(name[-1])
    if method == "higgs":
        return higgs_quantizer(bits), HiggsFormat(bits), "lut_mma"
    return hqq_quantizer(bits), HqqFormat(bits), "int4_mma"


def measure(name: str, source: PlantedSource, device: torch.device) -> dict[str, float | str]:
    """One layer's figures beside one substitute."""
    quantizer, kept, kernel = substitute_of(name)
    formats = dict.fromkeys(ROLES, kept)
    builder = SubstituteBuilder(quantizer, kernel=kernel, keep_exact=frozenset(), formats=formats)
    codes, tensors = {}, source.layer(0, device)
    substitute = builder.build_layer(tensors, device, index=0, keep=codes)
    coded, flat = encode_layer(tensors, codes, substitute)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    weights = sum(part.shape.numel() for part in coded.parts)
    del tensors, codes
    buffer = torch.empty(PlainCodec().layer_bytes(shapes), dtype=torch.uint8, device=device)
    views = parameter_views(buffer, shapes, torch.bfloat16)
    pieces = [part.piece(views[part.name], getattr(substitute, part.role)) for part in coded.parts]
    decoder = Restorer(pieces)
    taken = graph_time(lambda: decoder(flat))
    return {
        "format": name,
        "ms": taken * 1e3,
        "bits_per_weight": 8 * coded.nbytes / weights,
        "gigabytes": coded.nbytes / 1e9,
        "weights_per_s": weights / taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2_5_7b")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--json", help="rewritten after every format")
    options = parser.parse_args()
    device = torch.device("cuda")
    link = measure_link(device)
    source = PlantedSource(
        PlantedTargetConfig(name=f"planted_{options.target}", shape=options.target), torch.bfloat16, device
    )
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "target": source.source,
        "link_gb_per_s": link,
    }
    rows: list[dict[str, float | str]] = []
    for name in options.formats.split(","):
        rows.append(measure(name, source, device))
        torch.cuda.empty_cache()
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(facts | {"rows": rows}, file, indent=1)
    shown = Table(title=f"one layer of {options.target}, link {link:.1f} GB/s (no language model)")
    for column in ("substitute", "ms", "link ms", "bits per weight", "1e9 weights/s"):
        shown.add_column(column, justify="left" if column == "substitute" else "right")
    for row in rows:
        shown.add_row(
            str(row["format"]),
            f"{row['ms']:.2f}",
            f"{float(row['gigabytes']) / link * 1e3:.2f}",
            f"{row['bits_per_weight']:.2f}",
            f"{float(row['weights_per_s']) / 1e9:.0f}",
        )
    Console(width=120).print(shown)
    print(json.dumps(facts | {"rows": rows}))


if __name__ == "__main__":
    main()
