"""The peers' call, and the table that is made of its cells."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peers
import peers_page
import peers_table
from qdiff_fx.safe_io import read_json


def call(unet: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    size, channels = unet.config["sample_size"], unet.config["in_channels"]  # type: ignore[index]
    return torch.randn(2, channels, size, size), torch.tensor(10.0)


def test_full_precision_is_called_like_the_network_and_has_its_bytes(unconditional: nn.Module) -> None:
    network = peers.quantize("full precision", unconditional, [])
    inputs = call(unconditional)
    with torch.no_grad():
        assert torch.equal(network(*inputs)[0], unconditional(*inputs).sample)
        assert torch.equal(network(*inputs, return_dict=False)[0], network(*inputs)[0])
    assert network.bytes == 4 * sum(parameter.numel() for parameter in unconditional.parameters())


def test_a_peer_keeps_fewer_bytes_and_leaves_the_network_as_it_is(unconditional: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in unconditional.state_dict().items()}
    network = peers.quantize("torchao int8 weights, linears", unconditional, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in unconditional.state_dict().items())
    linears = sum(item.weight.numel() for item in unconditional.modules() if isinstance(item, nn.Linear))
    full = peers.quantize("full precision", unconditional, []).bytes
    # Three bytes of four go, scales come: one of 4 bytes a row.
    assert full - 3 * linears < network.bytes < full - 2 * linears
    inputs = call(unconditional)
    with torch.no_grad():
        exact = unconditional(*inputs).sample
    assert 0.0 < float((network(*inputs)[0] - exact).norm() / exact.norm()) < 0.1


def test_a_peer_that_fails_has_its_error_in_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(unet: nn.Module, calls: Any) -> Any:
        raise ImportError("no module | named so")

    monkeypatch.setattr(peers, "PEERS", {"absent": fails})
    bench = peers_table.Bench(tmp_path)
    monkeypatch.setattr(bench, "calls", lambda model: [])
    monkeypatch.setattr(bench, "source", lambda name: type("S", (), {"unet": nn.Identity()}))
    bench.run("fashion-uncond/absent", 0)
    row = read_json(bench.path("fashion-uncond/absent"))
    assert row["error"] == "ImportError: no module | named so"
    peers_page.write_page(
        tmp_path, bench.rows(["fashion-uncond/absent"]), ["fashion-uncond/absent", "fashion-uncond/b"]
    )
    page = (tmp_path / "results-peers.md").read_text()
    assert "error: ImportError: no module / named so" in page
    assert "Not measured yet: fashion-uncond/b." in page


@pytest.mark.parametrize(("given", "rows"), [(40, 16), (2, 2)])
def test_a_network_of_one_batch_is_called_with_that(given: int, rows: int) -> None:
    """Calls of any number of rows, a timestep for all or for each; every call in parts of the same number of rows."""
    calls = [((torch.randn(given, 3), torch.tensor(4.0)), {"states": torch.randn(given, 2), "return_dict": False})]
    fixed = peers._Fixed(peers._Flat.of(nn.Identity(), calls), calls)
    assert [[len(tensor) for tensor in part] for part in fixed.calls] == [[rows] * 3] * -(-given // rows)

    def network(sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        assert len(sample) == len(timestep) == len(states) == rows
        return sample * timestep[:, None] + states.sum(1, keepdim=True)

    for count in (1, rows, rows + 1):
        sample, timestep, states = torch.randn(count, 3), torch.rand(count), torch.randn(count, 2)
        (result,) = fixed.run(network, (sample, timestep), {"states": states})
        assert torch.equal(result, sample * timestep[:, None] + states.sum(1, keepdim=True))


def row(peer: str, pooled: float, endpoint: float, share: float) -> dict[str, Any]:
    return {
        "cell": f"fashion-uncond/{peer}",
        "model": "fashion-uncond",
        "peer": peer,
        "error": None,
        "bits": "W4A8",
        "bytes": int(1000 * share),
        "share": share,
        "pooled_db": pooled,
        "median_db": pooled,
        "endpoint_db": endpoint,
        "ssim": 0.9,
        "cpu_seconds_a_step": 0.1,
        "commit": "abc",
        "seed": 1000,
        "machine": {"processor": "P", "isa": "I", "threads": 1},
        "versions": {"sdnq": "0.2.8", "nncf": None},
    }


@pytest.mark.parametrize(
    ("pooled", "endpoint", "share", "verdict"),
    [
        (30.0, 35.0, 0.15, "- reached: ours W4A8 against SDNQ uint4: output SQNR +10.0 dB, end-point PSNR +11.0 dB"),
        (30.0, 20.0, 0.15, "- NOT reached: ours W4A8"),
        (30.0, 35.0, 0.20, "- NOT reached: ours W4A8"),
    ],
    ids=["ahead", "worse-pictures", "more-bytes"],
)
def test_bars_are_judged_from_the_figures(
    tmp_path: Path, pooled: float, endpoint: float, share: float, verdict: str
) -> None:
    rows = [row("ours W4A8", pooled, endpoint, share), row("SDNQ uint4", 20.0, 24.0, 0.19)]
    cells = {item["cell"]: item for item in rows}
    peers_page.write_page(tmp_path, cells, list(cells))
    page = (tmp_path / "results-peers.md").read_text()
    assert verdict in page
    assert "sdnq 0.2.8" in page and "nncf" not in page


def test_every_peer_has_a_name_of_its_own_and_takes_two_arguments() -> None:
    assert len({peers_table.slug(name) for name in peers.PEERS}) == len(peers.PEERS)
    assert all(callable(entry.func if isinstance(entry, partial) else entry) for entry in peers.PEERS.values())
