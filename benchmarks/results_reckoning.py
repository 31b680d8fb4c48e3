"""What a full run of benchmarks/results.py costs, reckoned from the cells that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdiff_fx.report.tables import markdown_table

CORES, LIMIT_HOURS = 2, 3.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a full run draws for one cell.

    Args:
      arm: cells with the same arm cost as much a sample and step.
      samples: pictures.
      steps: of the sampler.
    """

    arm: str
    samples: int
    steps: int


def reckoning(rows: Mapping[str, Mapping[str, Any]], plan: Mapping[str, Sampling | None]) -> str:
    """The section of the page, in Markdown; "" as long as no cell knows its cost.

    Args:
      rows: finished cells.
      plan: all cells.
    """
    known: dict[str, float] = {}
    for name, row in rows.items():
        drawn = plan.get(name)
        cost = row.get("sampling", {}).get("cpu_ms")
        if drawn is not None and cost is not None:
            known.setdefault(drawn.arm, cost)
    if not known:
        return ""
    dearest = max(known.values())
    calls: dict[str, int] = {}
    for drawn in plan.values():
        if drawn is not None:
            calls[drawn.arm] = calls.get(drawn.arm, 0) + drawn.samples * drawn.steps
    hours = {arm: count * known.get(arm, dearest) / 3.6e6 for arm, count in calls.items()}
    lines = [
        (
            arm,
            f"{count:,}",
            f"{known[arm]:.2f}" if arm in known else f"({dearest:.2f})",
            f"{hours[arm]:.2f}",
        )
        for arm, count in calls.items()
    ]
    others = [row for row in rows.values() if "cpu_seconds" in row]
    rest = sum(row["cpu_seconds"] - row.get("sampling", {}).get("cpu_seconds", 0.0) for row in others) / 3600
    total = sum(hours.values()) + rest
    return "\n\n".join(
        [
            "## What a full run costs",
            "CPU time, so that other work beside it does not count. In brackets: not measured yet, taken as the "
            "dearest that was.",
            markdown_table(("network", "samples x steps", "CPU ms each", "CPU hours"), lines, numeric=range(1, 4)),
            f"Sampling {sum(hours.values()):.2f} h; making, compiling and measuring networks {rest:.2f} h in the "
            f"{len(others)} of {len(plan)} cells that say so; together {total:.2f} h, {total / CORES:.2f} h on {CORES} "
            f"cores (to be under {LIMIT_HOURS:g}).",
        ]
    )
