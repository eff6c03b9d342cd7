"""Capture of CUDA graphs, and the streams that a process keeps."""

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@functools.cache
def _lasting_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def capture_stream() -> torch.cuda.Stream:
    """The stream of all captures on the current device, for as long as the process runs.

    cuBLAS keeps a workspace of 32 MiB for every stream that it was used on, until the process ends: a new stream for
    every run of a process would exhaust its budget.
    """
    return _lasting_stream(torch.cuda.current_device())


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """``torch.cuda.graph(graph, **options)`` on one lasting stream, with Python's cyclic garbage collector disabled.

    A collection in the middle of a capture may destroy an older graph (or an event, or page-locked memory) that lay in
    a reference cycle; CUDA does not permit that while any stream captures, and the capture fails. Other threads, which
    copy layers meanwhile (:mod:`subspec.offload.tiers`), may make any call.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=capture_stream(), capture_error_mode="thread_local", **options):
            yield
    finally:
        if collects:
            gc.enable()


def captured(run: Callable[[], Result], pool: tuple[int, int] | None = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """``run`` as a CUDA graph, and the result that every replay writes.

    Args:
        pool: of an earlier graph, whose memory this one shares; its results are kept apart, its other memory is not.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles what is not compiled yet
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool=pool):
        result = run()
    return graph, result
