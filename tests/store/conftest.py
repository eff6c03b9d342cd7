import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and threads of busy machines wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
