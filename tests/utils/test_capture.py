"""Captures must survive garbage that is collected at the wrong moment."""

import gc
from contextlib import contextmanager

import pytest
import torch

from subspec.utils import capture
from subspec.utils.capture import capturing


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_rests_while_a_graph_is_captured_and_wakes_again(monkeypatch, fails):
    seen = []

    @contextmanager
    def graph(_, **options):
        seen.append((gc.isenabled(), options))
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(capture, "capture_stream", lambda: "the one")
    assert gc.isenabled()
    try:
        with capturing(None, pool=3):
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert seen == [(False, {"pool": 3, "stream": "the one", "capture_error_mode": "thread_local"})]
    assert gc.isenabled()


@pytest.mark.gpu
def test_a_graph_that_becomes_garbage_does_not_spoil_a_capture():
    x = torch.ones(8, device="cuda")

    def record() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph):
            x.add_(1)
            for _ in range(5000):
                [[] for _ in range(3)]  # what would make the collector run
        return graph

    thresholds = gc.get_threshold()
    gc.set_threshold(10, 1, 1)
    try:
        for _ in range(5):
            cycle = {"graph": record()}
            cycle["itself"] = cycle
            del cycle
    finally:
        gc.set_threshold(*thresholds)
    torch.cuda.synchronize()
