"""A run's document, with names that would break out of HTML, attributes or scripts if they were not escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qdiff_fx.report.pictures import LabelledRow
from qdiff_fx.report.strips import save_strips

HOSTILE = "\"'><img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;"
LAYERS = 20
BLOCKS = 5


def arm(name: str, preset: str, psnr: float) -> dict[str, Any]:
    return {
        "arm": name,
        "title": f"{name} {HOSTILE}",
        "preset": preset,
        "sqnr_pooled_db": 20.0,
        "sqnr_median_db": None,
        "sqnr_by_timestep": [[0, 9.0], [500, None], [900, 20.0]],
        "psnr_median_db": psnr,
        "error_by_step": [0.0, 0.1, 0.2],
        "confident_share": 0.5,
    }


def layer(index: int) -> dict[str, Any]:
    return {
        "name": f"layer{index}.{HOSTILE}" if index == 0 else f"block{index % BLOCKS}.layer{index}",
        "weight_bits": (4, 8, None)[index % 3],
        "activation_bits": 8 if index % 3 < 2 else None,
        "bytes": 1000 + 7 * (index * 13 % LAYERS),
        "bytes_before": 4000,
        "kernel": "qdiff.conv2d" if index % 2 else "aten.linear on dequantized weight",
        "fallback": f"dropped: {HOSTILE}" if index == 3 else "",
        "reason": f"because {HOSTILE}" if index == 1 else "",
        "block": index % BLOCKS,
        "error": None if index == 2 else 10.0 ** -(index % 7 + 2),
    }


def demo_document(folder: Path) -> dict[str, Any]:
    """A demo's document with all that a page can show; its pictures are written to `folder`."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        LabelledRow(title=title, detail=HOSTILE, images=torch.rand(3, 1, 4, 4, generator=generator))
        for title in ("FP32", HOSTILE)
    ]
    layers = [layer(index) for index in range(LAYERS)]
    names = [[row["name"] for row in layers if row["block"] == index] for index in range(BLOCKS)]
    return {
        "kind": "demo",
        "model": {"name": HOSTILE, "preset": "w4a8", "parameters": 1000, "layers": LAYERS},
        "machine": {"processor": HOSTILE, "isa": "avx2", "threads": 2, "torch": "2.13"},
        "settings": {
            "steps": 3,
            "samples": 3,
            "heldout_rows": 6,
            "heldout_timesteps": 2,
            "calibration_rows": 8,
            "calibration_timesteps": 2,
            "calibration_seed": 0,
            "evaluation_seed": 1,
            "backend": "reference",
        },
        "reference": {"confident_share": 0.6},
        "table": [arm("rtn", "w4a8", 31.0), arm("ours", "w4a8", 30.0), arm("ours", "w8a8", 40.0)],
        "sizes": {"fp32": 4000, "fp16": 2000, "w4a8": 600, "w8a8": 1000},
        "integer_sqnr_pooled_db": 19.9,
        "samples": save_strips(folder, rows),
        "layers": layers,
        "graph": {
            "blocks": [
                {"index": index, "name": f"block {HOSTILE}", "layers": names[index], "level": (0, 1, 2, 1, 0)[index]}
                for index in range(BLOCKS)
            ],
            "edges": [[0, 1], [0, 4], [1, 2], [1, 3], [2, 3], [3, 4]],
        },
        "raises": [{"kind": "weight", "target": "t", "layers": [HOSTILE], "bits": None, "reason": "allocated"}],
        "shortcuts": [
            {
                "layer": f"up_blocks.{HOSTILE}",
                "parts": [
                    {"channels": 4, "minimum": -1.0, "maximum": 2.0},
                    {"channels": 8, "minimum": 0.5, "maximum": 6.0},
                ],
                "range_ratio": 2.0,
            },
            {"layer": "unknown", "parts": [], "range_ratio": None},
        ],
        "ranges": [
            {
                "name": f"conv.{HOSTILE}",
                "bits": 8,
                "scale": 0.02,
                "zero_point": 100,
                "minimum": -2.0,
                "maximum": 3.0,
                "by_timestep": [[0, -2.0, 3.0], [500, -1.0, 1.0]],
            }
        ],
        "channels": [{"layer": HOSTILE, "spread": 9.0, "spread_after": 2.0, "gain_db": 1.5, "exponent": 0.5}],
        "reconstruction": [
            {"name": HOSTILE, "phase": "weights", "initial_loss": 2.0, "learned_loss": 0.5, "index": 0},
            {"name": "mid", "phase": "weights", "initial_loss": 3.0, "learned_loss": 0.01, "index": 1},
        ],
        "quality": {
            "samples": 4,
            "pooled_db": 5.0,
            "median_db": 6.0,
            "by_timestep": [[0, 4.0], [500, 12.0]],
            "accepted": False,
        },
        "calibration": {"rows": 8, "timesteps": [0, 500]},
        "total_seconds": 12.0,
    }
