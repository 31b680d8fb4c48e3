"""docs/results-peers.md and .json from the finished cells of benchmarks/peers_table.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from cells import gathered
from provenance import commits, machines
from qdiff_fx.report.tables import decibels, markdown_table
from qdiff_fx.safe_io import write_bytes, write_json

HEADER = (
    "network",
    "bits",
    "of fp32 bytes",
    "SQNR pooled, dB",
    "median, dB",
    "end point, dB",
    "SSIM",
    "Frechet distance",
    "CPU s a step",
)
_PLAIN = ("SDNQ uint4", "SDNQ uint4, SVD", "SDNQ uint4, Hadamard rotation")
UINT4 = tuple(f"{name}{which}" for which in ("", ", every layer") for name in _PLAIN)
INT8 = ("SDNQ int8, dynamic int8 activations", "SDNQ int8, dynamic int8 activations, every layer")
BARS = (
    ("ours W4A8", UINT4, ("pooled_db", "endpoint_db")),
    ("ours W4A8, reconstructed", UINT4, ("pooled_db", "endpoint_db")),
    ("ours W8A8", INT8, ("endpoint_db",)),
    ("ours W8A8, wide slacks", INT8, ("endpoint_db",)),
    ("ours W8A8, small layers left", INT8, ("endpoint_db",)),
    ("ours W8A8, reconstructed", INT8, ("endpoint_db",)),
    ("ours W8A8, wide slacks, reconstructed", INT8, ("endpoint_db",)),
)
"""Who is held against whom, and by what."""
LABELS = {"pooled_db": "output SQNR", "endpoint_db": "end-point PSNR"}


def _measured(before: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool that is not installed takes nothing from the page, nor does a run without distances."""
    return before if new["error"] and not before["error"] else {**before, **new}


def write_page(docs: Path, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write page and JSON.

    Args:
      docs: the folder of the page.
      rows: finished cells by MODEL/PEER; the page keeps those that it had besides.
      names: all cells, in order.
    """
    kept = docs / "results-peers.json"
    known = gathered(rows.values(), kept, itemgetter("cell"), choose=_measured)
    rows = {name: known[name] for name in names if name in known}
    if not rows:
        return
    write_json(kept, {"cells": list(rows.values())})
    models = list(dict.fromkeys(name.partition("/")[0] for name in names))
    parts = [_head(rows)]
    for model in models:
        own = {name.partition("/")[2]: row for name, row in rows.items() if row["model"] == model}
        table = markdown_table(HEADER, [_cells(row) for row in own.values()], numeric=range(2, len(HEADER)))
        parts.append(f"## {model}\n\n{table}\n\n{_distances(own)}{_verdicts(own)}")
    missing = [name for name in names if name not in rows]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    write_bytes(docs / "results-peers.md", ("\n\n".join(parts) + "\n").encode())


def _head(rows: Mapping[str, Mapping[str, Any]]) -> str:
    some = next(iter(rows.values()))
    versions = ", ".join(f"{name} {found}" for name, found in _versions(rows).items())
    return f"""# Against other tools on the bundled models

Written by `benchmarks/peers_table.py`; command, commit and seed of every cell are in `results-peers.json`
(commits {commits(rows.values())}; noise seed {some["seed"]};
{machines(rows.values())}, beside other work; {versions}).

All networks run on the same inputs and start from the same noise; convolutions are quantized where the tool can. What a
tool leaves alone stays fp32. Output SQNR on held-out inputs at 13 timesteps of 16 trajectories; end point: PSNR after
DDIM-50 against full precision, 16 samples, median; SSIM of the same pictures. Networks that want calibration get the
same 320 inputs of 10 timesteps. "Dynamic": activation scales are computed at every call. "Reconstructed": learned
rounding and steps, preset "fast". SDNQ leaves layers of fewer than 16,384 weights alone unless it is told otherwise
("every layer"); "small layers left" is the same choice in our networks. "Wide slacks": whole layers stay in fp32 for at
most 10 % more weight bytes and 25 % of the multiplications, where preset w8a8 keeps none. CPU seconds a step (not
wall: other work ran beside): median over one DDIM-50 run of 16 samples, each tool as it runs by default: PT2E under
torch.compile, NNCF and ONNX Runtime on engines of their own, SDNQ with its dequantization compiled, ours, full
precision and the others not compiled ([compiled steps](results-latency.md))."""


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row.get("error"):
        return (
            row["peer"],
            row.get("bits") or "–",
            *["–"] * (len(HEADER) - 3),
            f"error: {row['error'].replace('|', '/')}",
        )
    distribution = row.get("distribution")
    return (
        row["peer"],
        row["bits"],
        f"{row['share']:.3f}",
        decibels(row["pooled_db"]),
        decibels(row["median_db"]),
        decibels(row["endpoint_db"]),
        f"{row['ssim']:.4f}",
        "–" if distribution is None else f"{distribution['frechet']:.2f}",
        f"{row['cpu_seconds_a_step']:.3f}" if "cpu_seconds_a_step" in row else "–",
    )


def _distances(own: Mapping[str, Mapping[str, Any]]) -> str:
    found = [row["distribution"] for row in own.values() if row.get("distribution")]
    if not found:
        return ""
    counts = ", ".join(dict.fromkeys(f"`{item['samples']:,}`" for item in found))
    return (
        f"Frechet distance of {counts} samples, DDIM-{found[0]['steps']}, from {found[0]['reference']} "
        f"({found[0]['reference_samples']:,} images): {found[0]['extractor']}. It is no FID.\n\n"
    )


def _verdicts(own: Mapping[str, Mapping[str, Any]]) -> str:
    """Every bar that both sides are measured for, in words made from the figures."""
    lines = []
    for ours, others, figures in BARS:
        mine = own.get(ours)
        for other in others:
            theirs = own.get(other)
            if mine is None or theirs is None or mine.get("error") or theirs.get("error"):
                continue
            gains = {figure: (mine[figure] or 999.0) - (theirs[figure] or 999.0) for figure in figures}
            met = all(gain >= 0 for gain in gains.values()) and mine["bytes"] <= theirs["bytes"]
            listed = ", ".join(f"{LABELS[figure]} {gain:+.1f} dB" for figure, gain in gains.items())
            share = f"{mine['share']:.3f} against {theirs['share']:.3f} of the bytes"
            lines.append(f"- {'reached' if met else 'NOT reached'}: {ours} against {other}: {listed}; {share}")
    return "\n".join(lines)


def _versions(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows.values():
        found |= {name: version for name, version in row["versions"].items() if version}
    return found
