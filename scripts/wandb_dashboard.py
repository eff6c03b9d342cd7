"""Make a Weights & Biases workspace of a project's runs: the report's charts, grouped by experiment and method.

    pip install -e ".[dashboard]" && wandb login
    python scripts/wandb_dashboard.py ENTITY [--project subspec]

Runs say what is needed for it when they start (``logger=wandb``): their group is the experiment, ``method`` in their
configuration names draft, bits, tree and offloading, and their summary holds totals, speed-up and roofline. Where the
package or a key is missing, the script prints how to set up the same by hand.
"""

import argparse
import importlib.util
import sys
from typing import Any

GROUPS = ("experiment", "target.name", "benchmark.name", "method")
"""Keys of a run's configuration that runs are grouped by, the outermost first."""

BARS = {
    "Decoding speed (tokens/s)": "tokens_per_s",
    "Acceptance length tau (tokens per target pass)": "tau",
    "Speed-up over the baseline": "speedup/tokens_per_s",
    "Share of the link's roofline": "roofline_share",
    "Peak GPU memory (GiB)": "peak_vram_gib",
    "Audit: tokens the target would not have emitted": "audit/mismatch",
}
"""Bar charts: title and summary figure."""

LINES = {
    "Decoding speed by sample (tokens/s)": "tokens_per_s",
    "tau by sample": "tau",
    "Running total (tokens/s)": "total/tokens_per_s",
    "Share of the roofline by sample": "roofline_share",
}
"""Line charts over ``sample_index``: title and series."""

PICTURES = ("plots/acceptance", "plots/time_split", "plots/roofline")

CAUTION = (
    "Runs whose summary has `context/planted` = true use **planted weights**: real speed, no language model. "
    "`context/source` = sample: **packaged sample prompts**, not the benchmark. Compare neither with published figures."
)


def by_hand(reason: str) -> str:
    """What to do without the package or a key."""
    bars = "\n".join(f"  - bar chart, {title}: summary metric {name}" for title, name in BARS.items())
    lines = "\n".join(f"  - line chart, {title}: {name} over sample_index" for title, name in LINES.items())
    return f"""{reason}

Then run this script again, or set up the workspace of your project by hand, once:
  1. Group the runs by: {", ".join(GROUPS)} (all are in the config).
  2. Add panels:
{bars}
{lines}
  - scatter plot: summary metrics tau (x) and tokens_per_s (y)
  - media: {", ".join(PICTURES)}; table: samples
  3. Save the view. {CAUTION}"""


def workspace(entity: str, project: str) -> Any:
    """The workspace's definition; nothing is sent before ``save()``."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    method = reports.Config("method")
    bars = [
        reports.BarPlot(title=title, metrics=[reports.SummaryMetric(name)], groupby=method, groupby_aggfunc="mean")
        for title, name in BARS.items()
    ]
    lines = [
        reports.LinePlot(
            title=title,
            x="sample_index",
            y=[name],
            title_x="sample",
            groupby=method,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for title, name in LINES.items()
    ]
    scatter = reports.ScatterPlot(
        title="Speed against tau", x=reports.SummaryMetric("tau"), y=reports.SummaryMetric("tokens_per_s")
    )
    media = reports.MediaBrowser(title="Pictures of each run", media_keys=list(PICTURES))
    samples = reports.WeavePanelSummaryTable(table_name="samples")
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="SubSpec: methods compared",
        sections=[
            workspaces.Section(
                name="Totals", panels=[reports.MarkdownPanel(markdown=CAUTION), *bars, scatter], is_open=True
            ),
            workspaces.Section(name="By sample", panels=lines, is_open=True),
            workspaces.Section(name="Each run", panels=[media, samples], is_open=False),
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config(key) for key in GROUPS]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("entity", help="user or team that owns the project")
    parser.add_argument("--project", default="subspec")
    options = parser.parse_args()
    if importlib.util.find_spec("wandb_workspaces") is None:
        print(by_hand("wandb-workspaces is not installed: pip install wandb-workspaces"))
        sys.exit(1)
    from subspec.runs.wandb_service import has_credentials, import_wandb

    if not has_credentials(import_wandb()):
        print(by_hand("no W&B key found: wandb login"))
        sys.exit(1)
    print(workspace(options.entity, options.project).save().url)


if __name__ == "__main__":
    main()
