"""Collected rows are exactly what the UNet sees in its own sampler, evenly over timesteps, and reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from torch import nn

from qdiff_fx.calibration import CalibrationSet
from qdiff_fx.errors import CheckpointError, ConfigError, InputError, NonFiniteError

SMALL: dict[str, Any] = {"num_inference_steps": 8, "num_timesteps": 4, "samples_per_timestep": 6, "batch_size": 4}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class _FailsAtCall(Exception):
    pass


def _fail_at_call(module: nn.Module, number: int) -> Any:
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise _FailsAtCall

    return module.register_forward_pre_hook(hook)


def test_every_sampler_gives_an_even_share_of_steps_with_both_ends(unet: Any, scheduler: Any) -> None:
    before = dict(scheduler.config)
    data = CalibrationSet.collect(unet, scheduler=scheduler, **SMALL)
    steps = type(scheduler).from_config(scheduler.config)
    steps.set_timesteps(8)
    distinct = sorted({float(t) for t in steps.timesteps})
    assert len(data) == 24
    assert len(data.timesteps) == 4
    assert set(data.timesteps) <= set(distinct)
    assert (data.timesteps[0], data.timesteps[-1]) == (distinct[0], distinct[-1])
    assert all(int((data.row_timesteps == t).sum()) == 6 for t in data.timesteps)
    assert dict(scheduler.config) == before and scheduler.num_inference_steps is None


def test_rows_are_the_inputs_of_the_same_sampler_written_by_hand(unet: Any, scheduler: Any) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with unet.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone()))):
        data = CalibrationSet.collect(unet, scheduler=scheduler, **SMALL | {"samples_per_timestep": 4})
    # The loop of diffusers' pipelines, from the first recorded input.
    loop = type(scheduler).from_config(scheduler.config)
    loop.set_timesteps(8)
    sample, inputs = None, {}
    with torch.no_grad():
        for t in loop.timesteps:
            if sample is None:
                first = loop.scale_model_input(torch.ones(1), t)
                sample = seen[0][0] / first
            scaled = loop.scale_model_input(sample, t)
            inputs[float(t)] = scaled
            sample = loop.step(unet(scaled, t).sample, t, sample).prev_sample
    for t in data.timesteps:
        rows = (data.row_timesteps == t).nonzero().flatten()
        stored = data.gather(rows)[0][0]
        # Only the division of the first input by its scale is not the same arithmetic; the trajectory carries it on.
        torch.testing.assert_close(stored, inputs[t], rtol=1e-4, atol=1e-4)


def test_initial_noise_is_scaled_as_the_scheduler_asks(unet: Any) -> None:
    scheduler = EulerDiscreteScheduler()
    data = CalibrationSet.collect(unet, scheduler=scheduler, **SMALL | {"strategy": "first", "num_timesteps": 1})
    first = data.gather(range(6))[0][0]
    # Scaled input at the start: sigma_max / sqrt(sigma_max^2 + 1) * noise, so deviation 1; 768 values: 5 sigma is 0.13.
    assert abs(float(first.std()) - 1) < 0.13


def test_two_calls_at_a_timestep_count_once(unet: Any) -> None:
    data = CalibrationSet.collect(unet, scheduler=HeunDiscreteScheduler(), **SMALL)
    assert [int((data.row_timesteps == t).sum()) for t in data.timesteps] == [6, 6, 6, 6]


@pytest.mark.parametrize("samples", [6, 7])
def test_guidance_keeps_both_branches_of_the_same_trajectories(conditional_unet: Any, samples: int) -> None:
    context, negative = torch.ones(3, 5, 6), torch.zeros(1, 5, 6)
    data = CalibrationSet.collect(
        conditional_unet,
        scheduler=DDIMScheduler(),
        guidance_scale=3.0,
        encoder_hidden_states=context,
        negative_encoder_hidden_states=negative,
        **SMALL | {"samples_per_timestep": samples},
    )
    assert len(data) == 4 * samples
    for t in data.timesteps:
        (sample, _), kwargs = data.gather((data.row_timesteps == t).nonzero().flatten())
        conditional = kwargs["encoder_hidden_states"].flatten(1).eq(1).all(1)
        assert int(conditional.sum()) == (samples + 1) // 2
        for row in sample[~conditional]:
            assert sample[conditional].eq(row).flatten(1).all(1).any()


def test_guided_step_is_the_pipelines_formula(conditional_unet: Any) -> None:
    scheduler, context, negative = DDIMScheduler(), torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    data = CalibrationSet.collect(
        conditional_unet,
        scheduler=scheduler,
        guidance_scale=3.0,
        encoder_hidden_states=context,
        negative_encoder_hidden_states=negative,
        num_inference_steps=2,
        num_timesteps=2,
        samples_per_timestep=2,
    )
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    start = data.gather((data.row_timesteps == float(t)).nonzero().flatten()[:1])[0][0]
    with torch.no_grad():
        u, c = (conditional_unet(start, t, encoder_hidden_states=x).sample for x in (negative, context))
    expected = scheduler.step(u + 3.0 * (c - u), t, start).prev_sample
    row = (data.row_timesteps == float(scheduler.timesteps[1])).nonzero().flatten()[:1]
    assert torch.equal(data.gather(row)[0][0], expected)


def test_contexts_of_two_lengths_are_kept_apart_and_resume(conditional_unet: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = SMALL | {
        "scheduler": DDIMScheduler(),
        "guidance_scale": 3.0,
        "encoder_hidden_states": torch.ones(3, 5, 6),
        "negative_encoder_hidden_states": torch.zeros(1, 2, 6),
        "batch_size": 1,
    }
    whole = CalibrationSet.collect(conditional_unet, **arguments)
    assert len(whole) == 24
    assert {leaf.shape for leaf in whole.signature if leaf.name == "encoder_hidden_states"} == {(5, 6), (2, 6)}
    with _fail_at_call(conditional_unet, 20), pytest.raises(_FailsAtCall):
        CalibrationSet.collect(conditional_unet, path=tmp_path / "a", **arguments)
    assert CalibrationSet.collect(conditional_unet, path=tmp_path / "a", **arguments).fingerprint == whole.fingerprint


def test_same_seed_gives_the_same_bytes_and_another_seed_others(unet: Any, scheduler: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # the global generator must not matter
        CalibrationSet.collect(unet, scheduler=scheduler, seed=seed, path=tmp_path / name, **SMALL)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert CalibrationSet.load(tmp_path / "a").fingerprint != CalibrationSet.load(tmp_path / "c").fingerprint


def test_folder_and_memory_hold_the_same_rows(unet: Any, tmp_path: Path) -> None:
    on_disk = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)
    in_memory = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), **SMALL)
    assert on_disk.fingerprint == in_memory.fingerprint
    assert on_disk.metadata == in_memory.metadata == CalibrationSet.load(tmp_path / "a").metadata


@pytest.mark.parametrize("call", [1, 9, 14], ids=["in the first batch", "in the second", "in its last call"])
def test_killed_collection_goes_on_and_gives_the_same_bytes(unet: Any, tmp_path: Path, call: int) -> None:
    arguments: dict[str, Any] = SMALL | {"scheduler": EulerDiscreteScheduler(), "batch_size": 3}
    CalibrationSet.collect(unet, path=tmp_path / "whole", **arguments)
    with _fail_at_call(unet, call), pytest.raises(_FailsAtCall):
        CalibrationSet.collect(unet, path=tmp_path / "killed", **arguments)
    with pytest.raises(CheckpointError, match="unfinished; call collect again"):
        CalibrationSet.load(tmp_path / "killed")
    calls: list[None] = []
    with unet.register_forward_pre_hook(lambda *_: calls.append(None)):
        CalibrationSet.collect(unet, path=tmp_path / "killed", **arguments)
    assert len(calls) == (14 if call <= 7 else 7)  # 7 calls a batch: the last step's output is not needed
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


def test_finished_collection_is_not_run_again(unet: Any, tmp_path: Path) -> None:
    first = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)
    with _fail_at_call(unet, 1):
        again = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)
    assert again.fingerprint == first.fingerprint


def test_another_request_in_the_folder_is_refused_with_the_reason(unet: Any, tmp_path: Path) -> None:
    CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)
    with pytest.raises(InputError, match="collected with seed=0, now 1"):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), seed=1, path=tmp_path / "a", **SMALL)
    with pytest.raises(InputError, match="collected with scheduler="):
        CalibrationSet.collect(unet, scheduler=EulerDiscreteScheduler(), path=tmp_path / "a", **SMALL)
    with torch.no_grad():
        unet.conv_in.weight.add_(1e-3)
    with pytest.raises(InputError, match="collected with weights="):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)


def test_folder_with_other_files_is_refused(unet: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path, **SMALL)


def test_damaged_shard_is_not_built_upon(unet: Any, tmp_path: Path) -> None:
    CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)
    shard = next((tmp_path / "a").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="SHA-256"):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), path=tmp_path / "a", **SMALL)


def test_pipeline_is_taken_with_its_scheduler(conditional_unet: Any) -> None:
    class Pipeline:
        unet = conditional_unet
        scheduler = DPMSolverMultistepScheduler()

    contexts = {"encoder_hidden_states": torch.ones(2, 5, 6), "negative_encoder_hidden_states": torch.zeros(1, 5, 6)}
    data = CalibrationSet.collect(Pipeline(), guidance_scale=2.0, **contexts, **SMALL)
    assert len(data) == 24
    assert data.metadata["scheduler"]["class"] == "DPMSolverMultistepScheduler"
    assert data.metadata["model"]["config"]["cross_attention_dim"] == 6


def test_model_runs_in_eval_mode_and_gets_its_modes_back(unet: Any) -> None:
    unet.train()
    unet.mid_block.eval()
    modes = [module.training for module in unet.modules()]
    seen: list[tuple[bool, bool]] = []
    with unet.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled()))):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), **SMALL)
    assert set(seen) == {(False, False)}
    assert [module.training for module in unet.modules()] == modes


@pytest.mark.parametrize("strategy", ["normal", "first", "middle", "last"])
def test_strategies_keep_even_shares(unet: Any, strategy: str) -> None:
    data = CalibrationSet.collect(unet, scheduler=DDIMScheduler(), strategy=strategy, **SMALL)
    assert [int((data.row_timesteps == t).sum()) for t in data.timesteps] == [6, 6, 6, 6]
    assert data.metadata["strategy"] == strategy


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"scheduler": None}, InputError, "needs scheduler="),
        ({"samples_per_timestep": 0}, InputError, "samples_per_timestep=0: want 1 or more"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"num_inference_steps": 0}, InputError, "num_inference_steps=0"),
        ({"num_inference_steps": 5000}, InputError, "num_inference_steps=5000: DDIMScheduler"),
        ({"num_timesteps": 9}, InputError, "num_timesteps=8 or less"),
        ({"strategy": "all"}, ConfigError, "want one of uniform"),
        ({"guidance_scale": 2.0}, InputError, "needs both branches"),
        ({"guidance_scale": float("nan")}, InputError, "want a finite number"),
        ({"sample_shape": (2, 8)}, InputError, r"wants \(2, H, W\)"),
        ({"sample_shape": (3, 8, 8)}, InputError, r"wants \(2, H, W\)"),
        ({"sample_shape": (2, 7, 7)}, InputError, r"refused a sample \[4, 2, 7, 7\]"),
        ({"conditions": {"class_labels": torch.ones(2)}}, InputError, "class_labels"),
        ({"prompts": ["a"]}, InputError, "takes no prompt; pass encoder_hidden_states="),
    ],
)
def test_bad_arguments_get_one_line_with_the_remedy(
    unet: Any, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        CalibrationSet.collect(unet, **SMALL | {"scheduler": DDIMScheduler()} | changes)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_and_what_is_quantized_is_refused(unet: Any) -> None:
    class Quantized(nn.Module):
        qdiff_stage = "quantized"

    with pytest.raises(InputError, match="got a str"):
        CalibrationSet.collect("unet", scheduler=DDIMScheduler(), **SMALL)
    with pytest.raises(InputError, match="is a quantized model"):
        CalibrationSet.collect(Quantized(), scheduler=DDIMScheduler(), **SMALL)


def test_missing_context_says_what_to_pass(conditional_unet: Any) -> None:
    with pytest.raises(InputError, match=r"pass encoder_hidden_states= \[N, L, 6\]"):
        CalibrationSet.collect(conditional_unet, scheduler=DDIMScheduler(), **SMALL)


def test_diverging_trajectory_is_an_error_not_data(unet: Any) -> None:
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"conv_out: its output at timestep \d+ holds NaN or infinity"):
        CalibrationSet.collect(unet, scheduler=DDIMScheduler(), **SMALL)
    assert not any(module._forward_hooks for module in unet.modules()), "the search for the layer leaves no hooks"
