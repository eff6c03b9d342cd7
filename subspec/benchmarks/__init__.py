"""Benchmarks: where prompts come from, how they are worded, and how answers are checked.

Rows come from the hub, from a local JSON-lines file with the hub's columns, or from a few packaged prompts written for
this project. The result names the source used; only ``source=auto`` chooses by itself.

    benchmark = load_benchmark(config.benchmark, config.seed)
    for sample in benchmark.samples:
        ...                                              # one or more user turns
        check_answer(benchmark.name, text, sample.answer)    # True, False, or None: not checkable
"""

from subspec.benchmarks.loader import Benchmark, Sample, load_benchmark
from subspec.benchmarks.prompts import TASKS, check_answer, extract_answer

__all__ = ["TASKS", "Benchmark", "Sample", "check_answer", "extract_answer", "load_benchmark"]
