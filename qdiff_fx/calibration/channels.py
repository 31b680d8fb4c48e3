"""What channel factors did for the tensors whose channels differ most, as plain data for the plan and the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def widest_channels(factors: Sequence[Mapping[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """The quantized tensors whose channels differ most in range, before and after their factors.

    Args:
      factors: `CalibrationReport.factors`.
    """
    tried = [row for row in factors if not row["reason"] and row["spread"] > 1.0]
    worst = sorted(tried, key=lambda row: -float(row["spread"]))[:count]
    return [
        {
            "layer": ", ".join(row["layers"]),
            "spread": row["spread"],
            "spread_after": row["spread_after"],
            "gain_db": row["gain_db"],
            "exponent": row["exponent"],
            "shifted": row["shifted"],
            "learned": row["learned"],
        }
        for row in worst
    ]


def left_alone(factors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Why attention operands got no factors: a row a reason, with the operands that it holds for."""
    found: dict[str, list[str]] = {}
    for row in factors:
        if row["reason"]:
            found.setdefault(row["reason"], []).extend(row["layers"])
    return [{"reason": reason, "tensors": tensors} for reason, tensors in found.items()]


def channel_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A row of `widest_channels` as text: spread before and after, the candidate that was taken, the error's fall."""
    before = f"{row['spread']:.1f}×"
    if row["exponent"] is None:
        return before, "off", "", ""
    candidate = ", ".join([f"a = {row['exponent']:g}", *(key for key in ("shifted", "learned") if row.get(key))])
    return before, f"{row['spread_after']:.1f}×", candidate, f"–{row['gain_db']:.1f}"
