"""Figures as text: aligned columns for a terminal, Markdown for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """Aligned columns under a ruled header; columns in `numeric` are flush right."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([aligned(lines[0]), rule, *(aligned(line) for line in lines[1:])])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """The same in Markdown."""
    rule = ["---:" if column in numeric else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decibels(value: float | None) -> str:
    """One decimal; "∞" for None or infinity: the signals are equal."""
    return "∞" if value is None or value == float("inf") else f"{value:.1f}"


def percent(share: float | None) -> str:
    """A share as a whole percentage."""
    return "–" if share is None else f"{100 * share:.0f} %"


def file_size(count: int) -> str:
    """Bytes in decimal megabytes, or kilobytes below one."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


ARM_HEADER = (
    "arm",
    "preset",
    "output SQNR pooled [dB]",
    "median [dB]",
    "end-point PSNR [dB]",
    "confident",
)
ARM_NUMERIC = (2, 3, 4, 5)


def arm_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of ARM_HEADER for one row of a run's "table"."""
    return (
        str(row["title"]),
        str(row["preset"]).upper(),
        decibels(row["sqnr_pooled_db"]),
        decibels(row["sqnr_median_db"]),
        decibels(row["psnr_median_db"]),
        percent(row.get("confident_share")),
    )


def results_markdown(run: Mapping[str, Any]) -> str:
    """The tables of a demo run, for README.md and docs/: quality of every arm, file sizes, what it ran on."""
    sizes = run["sizes"]
    full = sizes["fp32"]
    size_rows = [
        (name.upper(), f"{count:,}", f"{count / full:.3f}") for name, count in sorted(sizes.items(), key=_size_order)
    ]
    machine, settings = run["machine"], run["settings"]
    return "\n".join(
        [
            markdown_table(ARM_HEADER, [arm_cells(row) for row in run["table"]], numeric=ARM_NUMERIC),
            "",
            f"Full precision: {percent(run['reference']['confident_share'])} confident. "
            f"{settings['samples']} samples from the same noise, DDIM-{settings['steps']}; output SQNR on "
            f"{settings['heldout_rows']} held-out inputs at {settings['heldout_timesteps']} timesteps; calibrated on "
            f"{settings['calibration_rows']} inputs of {settings['calibration_timesteps']} timesteps, another seed.",
            "",
            markdown_table(("stored as", "bytes", "of FP32"), size_rows, numeric=(1, 2)),
            "",
            f"Measured by `qdiff-fx demo` in {run['total_seconds']:.0f} s on {machine['processor']} "
            f"({machine['isa'].replace('_', ' ').upper()}), {machine['threads']} threads, torch {machine['torch']}.",
        ]
    )


def shortcuts_markdown(run: Mapping[str, Any]) -> str:
    """Ranges of the parts of every split shortcut, in Markdown."""
    rows = [
        (
            f"`{row['layer']}`",
            " + ".join(str(part["channels"]) for part in row["parts"]),
            ", ".join(f"[{part['minimum']:.2f}, {part['maximum']:.2f}]" for part in row["parts"]),
            f"{row['range_ratio']:.2f}",
        )
        for row in run["shortcuts"]
        if row["range_ratio"] is not None
    ]
    return markdown_table(("shortcut", "channels", "ranges of the parts", "ratio"), rows, numeric=(3,))


def _size_order(item: tuple[str, int]) -> int:
    return -item[1]
