"""A target and its server for all tests of the folder. Modules of the extra are imported by the fixtures."""

import pytest

from tests.helpers.tiny import tiny_checkpoint


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    """Random weights: its texts have characters that are split over tokens, and bytes that are no text."""
    from tests.server.servers import target_of

    path = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with target_of("target=hub", f"target.path={path}") as loaded:
        yield loaded


@pytest.fixture(scope="package")
def served(tiny):
    from tests.server.servers import serving

    with serving(tiny) as server:
        yield server
