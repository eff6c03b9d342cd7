import io

import pytest

from subspec.planning.plan_table import plan_table
from subspec.runs.console import RunConsole
from tests.helpers.planning import planned, settings


def printed(plan, width, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    RunConsole(stream, width=width).rich.print(plan_table(plan))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_plan_is_legible(width, encoding):
    plan = planned(settings(8.0, card="RTX 4060 Ti 16GB", ram_gib=32))
    text = printed(plan, width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text, "nothing is cut"
    assert "?" not in text
    assert "\x1b" not in text
    flat = " ".join(text.replace("|", " ").split())
    assert "plan: target planted, draft subspec, 8.00 GiB on RTX 4060 Ti 16GB" in flat
    for item in plan.items:
        assert f"{item.name} " in flat
    assert "resident layers 5 of 28: 2, 8, 14, 19, 25" in flat
    assert "streamed layers 23 of 28, 0.434 GiB each" in flat
    assert "289 nodes in 320 rows" in flat
    assert "width 6, CUDA graphs" in flat
    assert "0.21 left, 0.08 kept free" in flat
    assert "embedding table on the host" in flat
    assert "link 13.7 GB/s (RTX 4060 Ti 16GB, estimated)" in flat
    assert "target pass 10.72 GB over the link, at least 0.782 s" in flat
    assert "draft level 4.56 GB of device memory, at least 15.8 ms at 288 GB/s" in flat
    assert "1.28 5.11 15.34 33.24 1.96 (13 resident)" in flat
    assert "CUDA itself 0.90" in flat[flat.index(" total ") :], "beside the budget, and below its sum"


def test_what_is_not_known_is_left_out():
    text = printed(planned(settings(8.0)), 100)
    assert "ceiling" not in text
    assert "GB/s" not in text
    assert "host memory is not checked" in text


def test_when_nothing_is_streamed_the_table_says_so():
    text = printed(planned(settings(24.0), link_gb_per_s=25.0), 100)
    assert "nothing is streamed" in text
    assert "ceiling" not in text
    assert "over the link" not in text
    assert "resident layers  all" in text
