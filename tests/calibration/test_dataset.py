"""Batches and gathered rows reproduce calls; splits and orders are seeded and spread over timesteps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CalibrationError, InputError


def _numbered(timesteps: list[float], rows: int, kind: str) -> CalibrationSet:
    """Row r of timestep number i holds 100 i + r in its sample."""
    make: Any = {"0-d": torch.tensor, "float": float, "int": int, "row": lambda t: torch.full((rows,), float(t))}[kind]
    calls = []
    for i, t in enumerate(timesteps):
        sample = (100.0 * i + torch.arange(rows)).reshape(rows, 1, 1, 1).expand(rows, 2, 3, 3)
        calls.append(((sample, make(t)), {"context": sample[:, :, 0], "return_dict": False}))
    return CalibrationSet.from_samples(calls)


@pytest.mark.parametrize("kind", ["0-d", "float", "int", "row"])
def test_a_batch_is_the_call_that_was_made(kind: str) -> None:
    data = _numbered([7, 3], 4, kind)
    batch = next(data.batches(4))
    sample, timestep = batch.args
    assert (batch.timestep, batch.size) == (7.0, 4)
    assert sample[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch.kwargs["context"].shape == (4, 2, 3) and batch.kwargs["return_dict"] is False
    expected = {"0-d": torch.tensor(7), "float": 7.0, "int": 7, "row": torch.full((4,), 7.0)}[kind]
    assert type(timestep) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert timestep.dtype == expected.dtype and torch.equal(timestep, expected)
    else:
        assert timestep == expected


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_every_row_once_and_timesteps_take_turns(seed: int | None) -> None:
    data = _numbered([9, 5, 1], 5, "0-d")
    batches = list(data.batches(2, seed=seed))
    assert sorted(x for batch in batches for x in batch.args[0][:, 0, 0, 0].tolist()) == [
        100.0 * i + r for i in range(3) for r in range(5)
    ]
    assert all(batch.args[0][:, 0, 0, 0].div(100, rounding_mode="floor").unique().numel() == 1 for batch in batches)
    assert [batch.size for batch in batches] == [2] * 6 + [1] * 3
    for turn in range(3):
        assert {batch.timestep for batch in batches[3 * turn : 3 * turn + 3]} == {9.0, 5.0, 1.0}


def test_shuffled_batches_follow_the_seed() -> None:
    data = _numbered([9, 5, 1], 8, "0-d")

    def order(seed: int | None) -> list[float]:
        return [x for batch in data.batches(3, seed=seed) for x in batch.args[0][:, 0, 0, 0].tolist()]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in (None, 0, 1)}) == 3


@pytest.mark.parametrize(
    ("kind", "dtype"), [("0-d", torch.int64), ("float", torch.float32), ("int", torch.int64), ("row", torch.float32)]
)
def test_gathered_rows_carry_their_own_timesteps(kind: str, dtype: torch.dtype) -> None:
    data = _numbered([7, 3], 4, kind)
    (sample, timestep), kwargs = data.gather([5, 0, 2])
    assert sample[:, 0, 0, 0].tolist() == [101, 0, 2]
    assert timestep.tolist() == [3, 7, 7] and timestep.dtype == dtype
    assert torch.equal(kwargs["context"], sample[:, :, 0])
    assert data.row_timesteps.tolist() == [7.0] * 4 + [3.0] * 4


def test_rows_that_cannot_share_a_call_are_refused_by_gather_and_kept_apart_by_batches() -> None:
    def calls(shape: tuple[int, ...], scale: float) -> Any:
        return (torch.zeros(shape), torch.tensor(1)), {"scale": scale}

    scales = CalibrationSet.from_samples([calls((2, 3, 4, 4), 0.5), calls((2, 3, 4, 4), 0.7)])
    assert [(batch.size, batch.kwargs["scale"]) for batch in scales.batches(8)] == [(2, 0.5), (2, 0.7)]
    with pytest.raises(InputError, match="scale differs"):
        scales.gather([0, 3])
    shapes = CalibrationSet.from_samples([calls((2, 3, 4, 4), 0.5), calls((2, 3, 6, 4), 0.5)])
    assert [tuple(batch.args[0].shape) for batch in shapes.batches(8)] == [(2, 3, 4, 4), (2, 3, 6, 4)]
    with pytest.raises(InputError, match="different shapes"):
        shapes.gather([0, 3])
    assert [leaf.shape for leaf in shapes.signature if leaf.name == "0"] == [(3, 4, 4), (3, 6, 4)]


@pytest.mark.parametrize("indices", [[], [8], [-1]])
def test_rows_outside_the_set_are_refused(indices: list[int]) -> None:
    with pytest.raises(InputError, match=r"0\.\.7"):
        _numbered([7, 3], 4, "0-d").gather(indices)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_split_is_disjoint_complete_seeded_and_even_over_timesteps(fraction: float) -> None:
    data = _numbered([9, 5, 3, 1], 10, "0-d")
    rest, part = data.split(fraction, seed=1)
    values = [sorted(x.gather(range(len(x)))[0][0][:, 0, 0, 0].tolist()) for x in (rest, part)]
    assert sorted(values[0] + values[1]) == [100.0 * i + r for i in range(4) for r in range(10)]
    assert len(part) == round(40 * fraction)
    counts = [int((part.row_timesteps == t).sum()) for t in data.timesteps]
    assert max(counts) - min(counts) <= 1
    assert part.fingerprint == data.split(fraction, seed=1)[1].fingerprint
    assert part.fingerprint != data.split(fraction, seed=2)[1].fingerprint


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.001, float("nan")])
def test_split_that_leaves_one_side_empty_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="want a fraction in"):
        _numbered([7, 3], 4, "0-d").split(fraction)


def test_fingerprint_is_of_rows_and_order_not_of_storage(unet: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_inference_steps": 4, "num_timesteps": 2, "samples_per_timestep": 6}
    data = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), batch_size=2, **sizes)
    data.save(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1  # three shards became one
    assert CalibrationSet.load(tmp_path / "a").fingerprint == data.fingerprint


def test_batches_of_a_collected_set_run_the_model(unet: Any) -> None:
    sizes: dict[str, Any] = {"num_inference_steps": 4, "num_timesteps": 2, "samples_per_timestep": 6}
    data = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), batch_size=4, **sizes)
    args, kwargs = data.gather(range(len(data)))
    with torch.no_grad():
        whole = unet(*args, **kwargs).sample
        for batch in data.batches(6):
            rows = (data.row_timesteps == batch.timestep).nonzero().flatten()
            # Another batch size may pick another convolution kernel: a few units in the last place.
            torch.testing.assert_close(unet(*batch.args, **batch.kwargs).sample, whole[rows], rtol=1e-5, atol=1e-5)


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="empty"):
        CalibrationSet.from_samples([])


def test_bad_batch_size_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size=0"):
        next(_numbered([1], 2, "0-d").batches(0))


_READ_ALL = """
import sys
from qdiff_fx.calibration import CalibrationSet

def kibibytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = kibibytes("RssAnon:")
data = CalibrationSet.load(sys.argv[1])
most = 0
for batch in data.batches(4, seed=0):
    most = max(most, kibibytes("RssAnon:"))
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_reading_a_set_takes_memory_for_a_batch_not_for_the_set(tmp_path: Path) -> None:
    rows_mib, rows = 1, 96
    calls = [((torch.full((1, rows_mib * 2**18), float(t)), torch.tensor(t)), {}) for t in range(rows)]
    CalibrationSet.from_samples(calls).save(tmp_path / "set")
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(tmp_path / "set")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # A batch is 1 MiB here (one row a timestep); the set is 96 MiB. What is left is the allocator's.
    assert int(done.stdout) < 24 * 1024
