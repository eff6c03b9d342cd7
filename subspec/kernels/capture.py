"""Capture of CUDA graphs that nothing else on the device can spoil."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph(graph, **options)`` with Python's cyclic garbage collector at rest.

    A collection in the middle of a capture may destroy an older graph (or an event, or page-locked memory) that lay in
    a reference cycle; CUDA does not permit that while any stream captures, and the capture fails.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        if collects:
            gc.enable()
