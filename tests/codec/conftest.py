import pytest
import torch

from subspec.codec import format


@pytest.fixture
def quick(request, monkeypatch):
    """A tiny model gains nothing from threads; the torch reference takes a step per weight of a chunk.

    Chunks of real length stay in tests on a GPU, in slow tests, and in tests of the format.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    real = any(request.node.get_closest_marker(name) for name in ("gpu", "slow"))
    if not real and "format" not in request.node.name:
        monkeypatch.setattr(format, "CHUNK", 16)
    yield
    torch.set_num_threads(threads)
