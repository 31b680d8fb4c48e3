"""Loading goes straight to lowered weights: full-precision ones are never held, integers stay mapped to their file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

import qdiff_fx
from qdiff_fx.kernels import BACKENDS

_REASON = BACKENDS["x86"].unavailable("cpu")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

RESIDENT, PEAK = 0.27, 1.2
"""Anonymous memory after loading, as a share of the fp32 weights, and its peak as a multiple of that."""

SHARD = 2**23
"""Bytes of a file: the large network is spread over several."""

_LOAD = """
import gc, json, sys, threading, time
import qdiff_fx

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

small, large = sys.argv[1:]
def integer_bytes(model):
    weights = [item for item in (*model.plan.buffers(), *model.plan.parameters()) if not item.is_floating_point()]
    return sum(item.nbytes for item in weights)

first = qdiff_fx.load(small, "x86")  # whatever libraries keep is there now
gc.collect()
empty = anonymous()
second = qdiff_fx.load(small, "x86")  # the same graph with weights of a sixty-fourth: what Python holds of it
gc.collect()
before, peak, done = anonymous(), [0], threading.Event()
graph = max(0, before - empty - 2 * integer_bytes(second))
watcher = threading.Thread(target=watch)
watcher.start()
model = qdiff_fx.load(large, "x86")
done.set()
watcher.join()
gc.collect()
after = anonymous() - before - graph
print(json.dumps({"after": after, "peak": peak[0] - before - graph, "graph": graph, "integers": integer_bytes(model)}))
"""


def unet(widths: tuple[int, int]) -> UNet2DModel:
    """Two stages; 44.6 M parameters at widths of 256 and 512, in few layers, so that Python's share is small."""
    return UNet2DModel(
        sample_size=16,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()


def stored(folder: Path, preset: str, widths: tuple[int, int]) -> int:
    """Write a quantized network into the folder; returns the bytes of its weights in fp32."""
    network = unet(widths)
    observers = {"weight_observer": "minmax", "activation_observer": "minmax", "equalize": False}
    prepared = qdiff_fx.prepare(network, qdiff_fx.QDiffConfig.preset(preset, **observers))
    with torch.no_grad():
        prepared(torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]))
    quantized = qdiff_fx.convert(prepared, backend="reference", dtype=torch.bfloat16)
    qdiff_fx.save(quantized, folder, max_shard_bytes=SHARD)
    return 4 * sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_loading_holds_a_quarter_of_full_precision(tmp_path: Path, preset: str) -> None:
    stored(tmp_path / "small", preset, (32, 64))
    full_precision = stored(tmp_path / "large", preset, (256, 512))
    assert len(list((tmp_path / "large").glob("model-*.safetensors"))) > 2
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    # What malloc frees goes back to the system at once, so that what is seen is what is held.
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["integers"] >= full_precision * (0.2 if preset == "w8a8" else 0.1)
    assert seen["after"] <= RESIDENT * full_precision, (seen, full_precision)
    assert seen["peak"] <= PEAK * RESIDENT * full_precision, (seen, full_precision)
