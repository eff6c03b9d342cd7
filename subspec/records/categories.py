"""Categories of a data set's samples, as figures are grouped by them."""

from collections.abc import Iterable, Mapping
from typing import Any

from subspec.benchmarks.prompts import TASKS


def category_group(benchmark: str | None, category: str | None) -> str | None:
    """The name under which a category is reported: some benchmarks report several as one."""
    task = TASKS.get(str(benchmark))
    return category if task is None or category is None else task.groups.get(category, category)


def by_category(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records by reported category, in alphabetical order; those without one are left out."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        group = category_group(record.get("benchmark"), record.get("category"))
        if group is not None:
            groups.setdefault(group, []).append(record)
    return dict(sorted(groups.items()))
