"""Write the golden file of the current format version: `python tests/golden/make_golden.py`.

A golden file is written once, when its format version is released, and never again: it is the promise that files of
that version keep loading. A change of the format gets a new version and a new folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import qdiff_fx
from qdiff_fx.checkpoint.plan import FORMAT_VERSION
from qdiff_fx.fake_quantize import ActivationQuantizer, WeightQuantizer
from qdiff_fx.safe_io import write_tensors

FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"


class GoldenNet(nn.Module):
    """One of every kind: conv2d (grouped, strided), conv1d, linear, a shortcut, an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.query_key_value = nn.Conv1d(8, 24, 1)
        self.project = nn.Linear(8, 8, bias=False)
        self.skip = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        level = timestep[:, None] / 1000
        first = self.stem(sample)
        h = first + self.embed(torch.cat([torch.sin(level), torch.cos(level)], dim=1))[:, :, None, None]
        h = h + self.grouped(nn.functional.silu(self.norm(h)))
        low = self.down(h)
        batch, channels, height, width = low.shape
        q, k, v = self.query_key_value(low.reshape(batch, channels, -1)).transpose(1, 2).chunk(3, dim=2)
        attended = self.project(nn.functional.scaled_dot_product_attention(q, k, v))
        low = low + attended.transpose(1, 2).reshape(batch, channels, height, width)
        high = nn.functional.interpolate(low, scale_factor=2.0, mode="nearest")
        return self.head(nn.functional.silu(self.skip(torch.cat([high, first], dim=1))))


def golden_inputs() -> tuple[Tensor, Tensor]:
    """A batch of 3, not square."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 2, 8, 12, generator=generator), torch.tensor([0.0, 250.0, 999.0])


def golden_model() -> qdiff_fx.QuantizedUNet:
    """GoldenNet at W4A8 with a channel factor and a shift on every 4-bit layer."""
    torch.manual_seed(0)
    # No allocation: it would choose factors and widths of its own.
    config = qdiff_fx.QDiffConfig.preset("w4a8", weight_slack=0.0, activation_slack=0.0, equalize=False)
    example = (torch.zeros(2, 2, 8, 8), torch.zeros(2))
    prepared = qdiff_fx.prepare(GoldenNet().eval(), config, example_inputs=example)
    calls = [((torch.randn(4, 2, 8, 8), torch.full((4,), level)), {}) for level in (0.0, 500.0, 999.0)]
    qdiff_fx.calibrate(prepared, calls, progress=False)
    plant_channel_factors(prepared)
    return qdiff_fx.convert(prepared, backend="reference")


def plant_channel_factors(prepared: qdiff_fx.PreparedUNet) -> None:
    """Give every 4-bit weight and its input the factor m_c = e_c * 2^k_c, e_c in {0.5, 1, 2}, k_c in 0..3."""
    modules = dict(prepared.graph_module.named_modules())
    for node in prepared.graph_module.graph.nodes:
        if node.op != "call_function" or len(node.args) < 2:
            continue
        pair = [modules.get(str(item.target)) if hasattr(item, "target") else None for item in node.args[:2]]
        activation, weight = pair
        if not isinstance(activation, ActivationQuantizer) or not isinstance(weight, WeightQuantizer):
            continue
        if weight.spec.bits != 4:
            continue
        source = prepared.graph_module.get_parameter(str(node.args[1].args[0].target))
        channels = source.shape[1] * weight.groups
        shift = (torch.arange(channels) % 4).to(torch.uint8)
        factor = 2.0 ** (shift.float() + torch.arange(channels).remainder(3) - 1)
        activation.channel_factor = factor
        weight.channel_factor, weight.channel_shift = factor, shift
        weight.fit(source)


def main() -> None:
    """Write the folder, unless it is there."""
    if any(FOLDER.glob("*.json")):
        sys.exit(f"{FOLDER} is there; a golden file is never rewritten")
    model = golden_model()
    sample, timestep = golden_inputs()
    qdiff_fx.save(model, FOLDER)
    with torch.no_grad():
        output = model(sample, timestep)
    write_tensors(FOLDER / "call.safetensors", {"sample": sample, "timestep": timestep, "output": output})


if __name__ == "__main__":
    main()
