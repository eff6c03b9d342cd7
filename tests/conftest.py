"""Fixtures shared by all tests."""

import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton kernels run in Triton's interpreter; that has to be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers side by side (`-n 2`) and the processes that they start compute with a thread each: threads of tiny models
# mostly wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from subspec.errors import SubspecError
from tests.helpers import hydra_cache

hydra_cache.install()

# A busy machine takes longer for an example than hypothesis allows, and fixtures that examples share are meant to be.
shared = [HealthCheck.function_scoped_fixture]
settings.register_profile("subspec", max_examples=30, deadline=None, suppress_health_check=shared)
settings.load_profile("subspec")

# A shell that starts the tests in the background (`pytest &`, nohup) has them ignore Ctrl-C, and so would the
# processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def substitutes_root(tmp_path_factory):
    """A cache of quantized substitutes for the whole session: tiny models need not fill the user's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_substitutes(monkeypatch, substitutes_root):
    from subspec.store import store

    root = store.cache_root
    own = lambda: root() if "SUBSPEC_CACHE" in os.environ else substitutes_root  # noqa: E731
    monkeypatch.setattr(store, "cache_root", own)


def pytest_collection_finish():
    """Imported modules are a million objects, which the garbage collector would look through again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Tests of a GPU are passed over without one, also those that `-m slow` selects."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a tiny target; treat it as read-only."""
    from tests.helpers.tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", max_positions=8192)


@pytest.fixture(scope="session")
def default_target():
    """The real default target in fp32 on the CPU, from the user's own cache.

    The first test that asks for it, ever, fetches 93 MB and converts them (under a minute); later sessions load
    it in a second. Treat it as read-only: all tests of a session share it. Without a network the tests that
    need it are skipped, except in CI, where they fail.
    """
    from subspec.config.schema import EmbeddedTargetConfig
    from subspec.targets import load_target

    try:
        return load_target(EmbeddedTargetConfig(name="smollm2_135m"), torch.device("cpu"))
    except SubspecError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default target is not here: {error}")
