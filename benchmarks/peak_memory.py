"""Most memory that loading a model and one step of it take, each in a process of its own.

    python benchmarks/peak_memory.py KIND FOLDER INPUTS

prints the process's peak resident bytes for one kind: import (nothing is loaded), fp32, bf16 (a diffusers folder) or
quantized (what qdiff_fx.save wrote). The step is not compiled: what a compiler takes for itself is not the model's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from torch import Tensor

import qdiff_fx
from qdiff_fx.safe_io import read_tensors, write_tensors

CARRIERS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    kind, folder, inputs_file = sys.argv[1:]
    if kind != "import":
        inputs = read_tensors(Path(inputs_file))
        step(kind, folder, inputs)
    print(peak_bytes())


def step(kind: str, folder: str, inputs: Mapping[str, Tensor]) -> None:
    """Load and run once."""
    if kind in CARRIERS:
        name = "UNet2DConditionModel" if "encoder_hidden_states" in inputs else "UNet2DModel"
        model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=CARRIERS[kind])
    else:
        model = qdiff_fx.load(folder, "x86")
    timestep = torch.full((len(inputs["sample"]),), 500.0)
    with torch.no_grad():
        model(**{key: value.to(model.dtype) for key, value in inputs.items()}, timestep=timestep, return_dict=False)


def peak_bytes() -> int:
    """The process's peak resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def peaks(module: diffusers.ModelMixin, inputs: Mapping[str, Tensor], quantized: Mapping[str, Path]) -> dict[str, int]:
    """Peak bytes of a process that only imports, and of every arm.

    Args:
      quantized: folders that qdiff_fx.save wrote, by the arm's name.
    """
    with tempfile.TemporaryDirectory() as folder:
        full, inputs_file = Path(folder, "full"), Path(folder, "inputs.safetensors")
        module.save_pretrained(full)
        write_tensors(inputs_file, inputs)
        places = {"import": full, "fp32": full, "bf16": full, **quantized}
        return {name: _peak(name, place, inputs_file) for name, place in places.items()}


def _peak(name: str, folder: Path, inputs_file: Path) -> int:
    kind = name if name in ("import", *CARRIERS) else "quantized"
    command = [sys.executable, __file__, kind, str(folder), str(inputs_file)]
    # Big tensors of their own pages: what is freed is given back, and the peak is what was held at once.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
