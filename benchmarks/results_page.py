"""docs/results-studies.md, .json and plots from the finished cells of benchmarks/results.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from cells import gathered
from provenance import commits, machines
from qdiff_fx.evaluation import Interval
from qdiff_fx.report import plots
from qdiff_fx.report.tables import decibels, markdown_table, percent
from qdiff_fx.safe_io import read_json, write_bytes, write_json
from results_arms import ARMS
from results_reckoning import Sampling, reckoning

Rows = Mapping[str, Mapping[str, Any]]

FULL = "full precision"
BARS = {"ours W8A8": 1.05, "ours W4A8": 1.25}
"""What a network's Frechet distance may be at most, as a multiple of full precision's."""
LINEAR, RUINED = "linear RTN W4A8", 2.0
"""From this multiple on pictures are called ruined."""
TIE_DB = 0.5
"""Figures closer than this are called level."""
NOTABLE_SHARE = 0.1
"""Of the tensors: from there on an effect is called one."""
PUBLISHED_RATIO = 200
"""How many times the ranges of shortcut parts differ in the published networks."""
CHECKPOINTS = (10, 25, 50, 75, 90, 100)
PLOTS = {"growth": "studies-growth.png", "activations": "studies-activations.png", "shortcuts": "studies-shortcuts.png"}

SPLIT_MODEL = "fashion-uncond"
"""Of the two models in the reconstruction benchmark, the one that the studies are about."""


def write_page(docs: Path, rows: Rows, plan: Mapping[str, Sampling | None]) -> None:
    """Write page, JSON and plots.

    Args:
      docs: the folder of the page.
      rows: finished cells; the page keeps those that it had besides.
      plan: all cells, in order, with the samples that a full run draws for them.
    """
    kept = docs / "results-studies.json"
    known = gathered(rows.values(), kept, itemgetter("cell"), choose=_larger)
    rows = {name: known[name] for name in plan if name in known}
    if not rows:
        return
    write_json(kept, {"cells": list(rows.values())})
    sections = [
        _head(rows),
        _methods(_of(rows, "method/")),
        _calibration(_of(rows, "calibration/")),
        _split(docs / "results-reconstruction.json"),
        _growth(docs, _of(rows, "growth/")),
        _activations(docs, rows.get("activations")),
        _shortcuts(docs, rows.get("shortcuts")),
        _guidance(_of(rows, "guidance/")),
        reckoning(rows, plan),
        _missing([name for name in plan if name not in rows]),
    ]
    write_bytes(docs / "results-studies.md", ("\n\n".join(filter(None, sections)) + "\n").encode())


def _larger(before: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run of a share of the samples takes nothing from the page."""
    return before if before.get("share", 1.0) > new.get("share", 1.0) else new


def _head(rows: Rows) -> str:
    seconds = sum(float(row["seconds"]) for row in rows.values())
    return f"""# The published studies on the bundled models

Written by `make results` (`benchmarks/results.py`); command, commit, machine and seed of every cell are in
`results-studies.json` (commits {commits(rows.values())}; {machines(rows.values())};
beside other work; {seconds / 60:.0f} minutes of cells so far). Every network
starts from the same noise. Whether a published effect shows is worked out from the figures by the command itself."""


def _methods(rows: Rows) -> str:
    if not rows:
        return ""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.values():
        arms.setdefault(row["arm"], []).append(row)
    common = max(set.intersection(*({int(count) for count in row["frechet"]} for row in rows.values())), default=0)
    header = (
        "network",
        "MB",
        "GBops",
        "samples by seed",
        f"distance, {common:,} of seed 1",
        "distance, all",
        "score",
        "SQNR pooled, dB",
        "median, dB",
        "end point, dB",
    )
    lines = [_method_line(arm, arms[arm], common) for arm in ARMS if arm in arms]
    some = next(iter(rows.values()))
    return "\n\n".join(
        [
            "## Methods",
            f"Frechet distance from {some['reference']} of {some['extractor']}, and inception-style score of the same "
            f"network; it is no FID. DDIM-{some['steps']}, unconditional model. The distance falls with the number of "
            "samples, so it is compared at equal numbers only; several seeds: mean and 95 % interval (Student's t). "
            "MB: 10^6 bytes on disk. GBops: multiplications of convs and linears for one sample and step, times weight "
            "bits, times input bits, in 10^9. SQNR on 208 held-out inputs, end point after DDIM-50, 16 samples. "
            '"Ours" has its preset\'s defaults and learned rounding and steps (preset "fast"); "linear RTN" min-max '
            "ranges, no split, boundaries quantized.",
            markdown_table(header, lines, numeric=range(1, len(header))),
            "\n".join(_method_verdicts(arms)),
        ]
    )


def _method_line(arm: str, rows: Sequence[Mapping[str, Any]], common: int) -> tuple[str, ...]:
    first = next((row for row in rows if row["seed"] == 1), rows[0])
    known = first.get("facts", {})
    counts = [row["samples"] for row in rows]
    least = str(min(int(max(row["frechet"], key=int)) for row in rows))
    distance = Interval.over([row["frechet"][least] for row in rows if least in row["frechet"]])
    score = Interval.over([row["score"] for row in rows])
    return (
        arm,
        f"{known['bytes'] / 1e6:.2f}" if known else "–",
        f"{known['gbops']:,.1f}" if known else "–",
        " + ".join(f"{count:,}" for count in counts),
        f"{first['frechet'][str(common)]:.2f}" if common else "–",
        f"{distance.text(2)} ({int(least):,} each)",
        score.text(2),
        *(decibels(first[key]) if key in first else "–" for key in ("pooled_db", "median_db", "endpoint_db")),
    )


def _method_verdicts(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    for arm, limit in BARS.items():
        ratios, count = _ratios(arms, arm)
        if ratios:
            interval = Interval.over(ratios)
            met = "reached" if interval.mean <= limit else "NOT reached"
            certain = "" if interval.high is None else f"; upper end of the interval {interval.high:.3f}"
            yield (
                f"- {met}: {arm} at most {limit:.2f}x of full precision's distance: {interval.text(3)}x over "
                f"{len(ratios)} seed(s) of {count:,} samples{certain}"
            )
    ratios, count = _ratios(arms, LINEAR)
    if ratios:
        interval = Interval.over(ratios)
        shows = "shows" if interval.mean >= RUINED else "does NOT show"
        yield (
            f"- Published: linear W4A8 ruins the pictures (FID 188 against 4.2). The effect {shows} in the "
            f"distance: {interval.text(3)}x of full precision's over {len(ratios)} seed(s) of {count:,} samples"
        )


def _ratios(arms: Mapping[str, Sequence[Mapping[str, Any]]], arm: str) -> tuple[list[float], int]:
    """Distances as multiples of full precision's from the same noise, a seed each, and the number of samples."""
    full = {row["seed"]: row["frechet"] for row in arms.get(FULL, ())}
    pairs = [(row["frechet"], full[row["seed"]]) for row in arms.get(arm, ()) if row["seed"] in full]
    counts = [int(count) for mine, other in pairs for count in mine.keys() & other.keys()]
    if not counts:
        return [], 0
    count = max(item for item in counts if all(str(item) in mine and str(item) in other for mine, other in pairs))
    return [mine[str(count)] / other[str(count)] for mine, other in pairs], count


def _calibration(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [
        (
            row["strategy"],
            f"{row['rows']:,}",
            *(decibels(row[key]) for key in ("pooled_db", "median_db", "endpoint_db")),
        )
        for row in rows.values()
    ]
    header = ("timesteps", "samples", "SQNR pooled, dB", "median, dB", "end point, dB")
    verdicts = []
    for count in dict.fromkeys(row["rows"] for row in rows.values()):
        found = {row["strategy"]: row for row in rows.values() if row["rows"] == count}
        if "uniform" in found and len(found) > 1:
            verdicts.append(_against_uniform(count, found))
    return "\n\n".join(
        [
            "## Which timesteps calibrate",
            "Activations at 8 bits alone, min-max ranges, 10 of DDIM-50's timesteps: the first (noisiest), middle or "
            "last ones, normally distributed (PTQ4DM) or evenly spaced. Published: samples of one part of the "
            "trajectory do not do, evenly spaced ones do best.",
            markdown_table(header, lines, numeric=range(1, len(header))),
            "\n".join(verdicts),
        ]
    )


def _against_uniform(count: int, found: Mapping[str, Mapping[str, Any]]) -> str:
    uniform = found["uniform"]
    gaps = {name: uniform["pooled_db"] - row["pooled_db"] for name, row in found.items() if name != "uniform"}
    ahead = all(gap >= -TIE_DB for gap in gaps.values())
    shows = "shows" if ahead and max(gaps.values()) > TIE_DB else "does NOT show"
    listed = ", ".join(f"{name} {gap:+.1f} dB" for name, gap in gaps.items())
    return f"- {count:,} samples: the effect {shows} (uniform over {listed}, pooled)"


def _split(path: Path) -> str:
    rows = read_json(path)["cells"] if path.is_file() else []
    cells = {row["cell"]: row for row in rows if row["model"] == SPLIT_MODEL}
    lines, gains = [], []
    for width in ("W8A8", "W4A32", "W4A8", "W4A6", "W4A4"):
        off, on = cells.get(f"{width}/RTN MSE"), cells.get(f"{width}/split")
        if off is not None and on is not None:
            pairs = [(off[key], on[key]) for key in ("pooled_db", "median_db", "endpoint_db")]
            lines.append((width, *(f"{before:.1f} -> {after:.1f}" for before, after in pairs)))
            gains.append(on["pooled_db"] - off["pooled_db"])
    if not lines:
        return ""
    verdict = "shows" if max(gains) > 3.0 else "does NOT show"
    return "\n\n".join(
        [
            "## Shortcuts whole or split",
            "Cells of `benchmarks/quality.py` (commit and seed in `results-reconstruction.json`): MSE ranges, rounded "
            "to nearest, the same with every shortcut split. Published: at 4 bits the network fails without the split.",
            markdown_table(("width", "SQNR pooled, dB", "median, dB", "end point, dB"), lines, numeric=(1, 2, 3)),
            f"The effect {verdict}: the split gains {min(gains):+.1f} to {max(gains):+.1f} dB of pooled SQNR.",
        ]
    )


def _growth(docs: Path, rows: Rows) -> str:
    if not rows:
        return ""
    colours = dict(zip(("8", "5", "4"), ("ours", "mse", "rtn"), strict=True))
    curves = [
        {"label": f"W{row['bits']}A8", "colour": colours[str(row["bits"])], "errors": row["errors"]}
        for row in rows.values()
    ]
    plots.plot_error_growth(docs / "images" / PLOTS["growth"], curves)
    some = next(iter(rows.values()))
    lines = [(f"W{row['bits']}A8", *(f"{row['mse'][step - 1]:.2e}" for step in CHECKPOINTS)) for row in rows.values()]
    grows = all(row["errors"][-1] > row["errors"][len(row["errors"]) // 2] for row in rows.values())
    ordered = sorted(rows.values(), key=lambda row: row["bits"])
    worse = all(a["mse"][-1] >= b["mse"][-1] for a, b in itertools.pairwise(ordered))
    return "\n\n".join(
        [
            "## Error over the trajectory",
            f"Mean squared error of the sample against full precision from the same noise, DDIM-{len(some['errors'])}, "
            f"{some['images']} samples, noise seed {some['seed']}; weights rounded to nearest, min-max, activations at "
            "8 bits. Published: the error grows along the trajectory, the more the fewer bits.",
            f"![error growth](images/{PLOTS['growth']})",
            markdown_table(
                ("", *(f"step {step}" for step in CHECKPOINTS)), lines, numeric=range(1, len(CHECKPOINTS) + 1)
            ),
            f"The effect {'shows' if grows and worse else 'does NOT show'}: the error "
            f"{'grows' if grows else 'does not grow'} over the second half, fewer bits end "
            f"{'worse' if worse else 'no worse'}.",
        ]
    )


def _activations(docs: Path, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    plots.plot_activation_ranges(docs / "images" / PLOTS["activations"], row["shown"])
    largest = ", ".join(f"`{name}` {ratio:.1f}x" for name, ratio in row["largest"])
    verdict = "shows" if row["over_two"] >= NOTABLE_SHARE * row["tensors"] else "does NOT show in most tensors"
    return "\n\n".join(
        [
            "## Activations over the timesteps",
            "Width of each quantized tensor's range, the widest timestep's over the narrowest's (10 timesteps, 320 "
            "samples). Published: distributions change gradually and a great deal along the trajectory.",
            f"![activation ranges](images/{PLOTS['activations']})",
            f"The effect {verdict}: of {row['tensors']} tensors, {row['over_two']} change by more than 2x, the median "
            f"by {row['median_ratio']:.2f}x; the most: {largest}.",
        ]
    )


def _shortcuts(docs: Path, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    plots.plot_shortcut_ranges(docs / "images" / PLOTS["shortcuts"], row["shortcuts"])
    lines, ratios = [], []
    for shortcut in row["shortcuts"]:
        weights = row["weights"].get(shortcut["layer"], [])
        spans = [high - low for low, high in weights]
        ratio = max(spans) / min(spans) if spans else None
        parts = ", ".join(f"[{part['minimum']:.2f}, {part['maximum']:.2f}]" for part in shortcut["parts"])
        own = ", ".join(f"[{low:.2f}, {high:.2f}]" for low, high in weights)
        ratios += [value for value in (shortcut["range_ratio"], ratio) if value is not None]
        lines.append(
            (
                f"`{shortcut['layer']}`",
                parts,
                f"{shortcut['range_ratio']:.2f}",
                own or "–",
                "–" if ratio is None else f"{ratio:.2f}",
            )
        )
    header = ("shortcut", "activations of the parts", "ratio", "weights of the parts", "ratio")
    verdict = "shows" if max(ratios) >= PUBLISHED_RATIO / 2 else "does NOT show"
    return "\n\n".join(
        [
            "## Parts of the shortcuts",
            f"Published: the two parts of a shortcut differ up to {PUBLISHED_RATIO}x in range.",
            f"![shortcut ranges](images/{PLOTS['shortcuts']})",
            markdown_table(header, lines, numeric=(2, 4)),
            f"The effect {verdict}: {min(ratios):.2f}x to {max(ratios):.2f}x.",
        ]
    )


def _guidance(rows: Rows) -> str:
    if not rows:
        return ""
    header = (
        "guidance",
        "network",
        "samples",
        "distance",
        "score",
        "asked class",
        "SQNR pooled, dB",
        "median, dB",
        "end point, dB",
    )
    lines = []
    for row in rows.values():
        count = max(row["frechet"], key=int)
        lines.append(
            (
                f"{row['guidance']:g}",
                row["arm"],
                f"{row['samples']:,}",
                f"{row['frechet'][count]:.2f}",
                f"{row['score']:.2f}",
                percent(row["asked_class_share"]),
                *(decibels(row[key]) if key in row else "–" for key in ("pooled_db", "median_db", "endpoint_db")),
            )
        )
    return "\n\n".join(
        [
            "## The conditional model, with and without guidance",
            "As in the method table, one seed, at the guidance scale that the model's card names and at 1; samples "
            "take the ten classes in turn. Calibrated on guided trajectories.",
            markdown_table(header, lines, numeric=(0, *range(2, len(header)))),
        ]
    )


def _of(rows: Rows, prefix: str) -> Rows:
    return {name: row for name, row in rows.items() if name.startswith(prefix)}


def _missing(names: Sequence[str]) -> str:
    return f"Not measured yet: {', '.join(names)}." if names else ""
