"""The command line, end to end on a tiny pipeline folder, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from qdiff_fx.cli import VERBS, main
from subjects import conditional_unet, pipeline_folder, unconditional_unet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder: unet/ and scheduler/."""
    return pipeline_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` made of it."""
    folder = tmp_path_factory.mktemp("quantized")
    data = str(tmp_path_factory.mktemp("data") / "set")
    sizes = ["--steps", "5", "--timesteps", "3", "--samples", "4"]
    assert main(["collect", str(model), "--out", data, *sizes]) == 0
    assert main(["quantize", str(model), "--preset", "w8a8", "--calibration", data, "--out", str(folder)]) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON document on stdout of a call with --json that says nothing else."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line on stderr of a call that must fail with exit status 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert re.search(rf"example:\n  qdiff-fx {verb}\b", capsys.readouterr().out)


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)


def test_inspect_lists_shortcuts_with_channels_and_ratio(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert "shortcuts: 4" in out
    assert "attentions: 4" in out
    assert re.search(r"conv_shortcut +16 \+ 16 +\[-?\d.*\] +\d+\.\d\d\n", out)
    assert re.search(r"\n *all +[\d,]+ .*kB .*\(0\.\d+\)", out)


def test_inspect_prints_json_for_machines(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["shortcuts"]) == 4
    assert all(row["range_ratio"] >= 1 for row in found["shortcuts"])
    assert {block["index"] for block in found["blocks"]} == {row["block"] for row in found["layers"]}


def test_a_quantized_folder_can_be_inspected(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized), "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert any(node["dtype"] == "int8" for node in nodes)


def test_a_quantized_folder_tells_its_quality_and_decisions(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(quantized)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"output SQNR on held-out inputs: [\d.]+ dB pooled, [\d.]+ dB in the median", out)
    assert re.search(r"raised above the config: \d+", out)
    assert "allocated:" in out and "why these widths" in out
    assert re.search(r"channels that differ most: [1-5]\n", out)
    assert re.search(r"attention operands without channel factors: \d+", out)


def test_equal_seeds_give_nearly_equal_pictures_of_model_and_quantized(
    model: Path, quantized: Path, tmp_path: Path
) -> None:
    pictures = []
    for name, source in (("a.png", model), ("b.png", quantized)):
        assert main(["sample", str(source), "--out", str(tmp_path / name), "--samples", "4", "--steps", "4"]) == 0
        with Image.open(tmp_path / name) as picture:
            pictures.append(torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float64))
    assert float((pictures[0] - pictures[1]).abs().mean()) < 0.05 * 255  # other seeds differ by 30 %


def test_evaluate_writes_figures_that_report_renders(
    model: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", "2", "--steps", "4", "--timesteps", "3", "--out", str(tmp_path)]
    assert main(["evaluate", str(model), str(quantized), *arguments]) == 0
    assert "output SQNR, pooled" in capsys.readouterr().out
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["table"][0]["sqnr_pooled_db"] > 20  # W8A8
    assert figures["sizes"]["quantized"] < figures["sizes"]["fp32"]
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "end-point" in html
    assert html.count("data:image/png;base64,") == 2  # pictures of both networks
    assert "skip connections" in html and "conv_shortcut#1" in html


def test_evaluate_measures_parts_distributions_and_intervals_on_request(
    model: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", "2", "--steps", "2", "--timesteps", "2", "--seeds", "2", "--out", str(tmp_path)]
    asked = ["--layers", "--sensitivity", "--frechet", "6", "--extractor", "evaluation_plugins:pixels"]
    metric = ["--metric", "L1=evaluation_plugins:l1"]
    assert main(["evaluate", str(model), str(quantized), *arguments, *asked, *metric]) == 0
    printed = capsys.readouterr().out
    for expected in ("over 2 seeds", "Frechet distance", "four pixels", "samples of the full-precision network", "L1"):
        assert expected in printed
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert {part["kind"] for part in figures["parts"]["parts"]} == {"layer", "attention", "block"}
    assert {row["kind"] for row in figures["sensitivity"]["rows"]} == {"weight", "input", "attention", "block"}
    assert len(figures["picture_metrics"]) == 2 and len(figures["picture_metrics"][0]["by_picture"]["L1"]) == 2
    ours, full = (figures["distribution"][name] for name in ("quantized", "full precision"))
    assert len(ours["by_seed"]) == 2 and ours["by_seed"][0]["extractor"] == "four pixels"
    assert full["frechet"]["mean"] == pytest.approx(ours["frechet"]["mean"], rel=0.1)  # W8A8, the same noise
    # Finished samples stay: pictures of three seeds of full precision (one is the reference), two of ours.
    assert len(list((tmp_path / "samples").glob("*/chunk-0000.safetensors"))) == 5


def test_evaluate_asks_for_an_extractor_of_networks_that_are_not_bundled(
    model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--samples", "1", "--steps", "1", "--timesteps", "1", "--frechet", "2"]
    assert "name --extractor MODULE:NAME" in error_line(capsys, "evaluate", str(model), str(quantized), *few)
    assert "cannot be imported" in error_line(capsys, "evaluate", "a", "b", "--extractor", "no_such_module:thing")
    assert "want NAME=MODULE:NAME" in error_line(capsys, "evaluate", "a", "b", "--metric", "json:dumps")


def test_quantize_leaves_a_run_that_report_renders(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((quantized / "calibration.json").read_text())
    assert any(row["error"] is not None and row["error"] > 0 for row in document["layers"])
    assert main(["report", str(quantized), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(quantized / "report.html")
    assert any(item["text"].startswith("12 calibration inputs at 3 timesteps are too few") for item in told["advice"])
    html = (quantized / "report.html").read_text()
    assert "conv_shortcut#1" in html
    assert 'class="heat"' in html


def test_a_saved_network_alone_has_a_report_too(quantized: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(quantized, alone, ignore=shutil.ignore_patterns("calibration.json", "report.html"))
    assert main(["report", str(alone), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    assert "conv_shortcut#1" in html and "skip connections" in html and "dB SQNR" in html


def test_collect_quantize_and_sample_print_json_and_nothing_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, picture = (str(tmp_path / name) for name in ("set", "net", "picture.png"))
    told = printed(capsys, "collect", str(model), "--out", data, "--steps", "3", "--timesteps", "3", "--samples", "10")
    assert told["out"] == data and told["inputs"] == 30 and len(told["timesteps"]) == 3
    told = printed(capsys, "quantize", str(model), "--preset", "w8a8", "--calibration", data, "--out", out)
    assert told["preset"] == "w8a8" and 0 < told["share_of_fp32"] < 1 and told["quality"]["accepted"]
    told = printed(capsys, "sample", out, "--out", picture, "--samples", "2", "--steps", "2")
    assert told == {"out": picture, "model": out, "samples": 2, "steps": 2, "seed": 0}
    told = printed(capsys, "evaluate", str(model), out, "--samples", "2", "--steps", "2", "--timesteps", "2")
    assert told["kind"] == "evaluate" and told["table"][0]["psnr_median_db"] > 10


def test_a_report_is_an_html_file(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "want the name of an HTML file, such as page.html" in error_line(
        capsys, "report", str(quantized), "--out", "page.txt"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("inspect", "no-such-folder"), "no such folder; want one, or a bundled model"),
        (("quantize", "fashion-uncond", "--preset", "w3a9", "--out", "x"), "preset 'w3a9': want one of"),
        (("report", "no-such-folder"), "no such folder; name what --out"),
        (("sample", "."), "the following arguments are required: --out"),
        (("frobnicate",), "is no verb: want one of demo, inspect"),
    ],
)
def test_bad_input_gets_one_line_with_the_remedy(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_line(capsys, *arguments)


def test_a_folder_that_is_no_model_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a diffusers folder" in error_line(capsys, "inspect", str(tmp_path))


def test_a_quantized_model_is_not_quantized_again(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "quantize", str(quantized), "--out", str(tmp_path))
    assert "is quantized already; name the full-precision model" in line


def test_a_calibration_set_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    unconditional_unet(in_channels=1, out_channels=1).save_pretrained(other / "unet")
    DDIMScheduler().save_pretrained(other / "scheduler")
    sizes = ["--steps", "2", "--timesteps", "2", "--samples", "2"]
    assert main(["collect", str(other), "--out", str(tmp_path / "set"), *sizes]) == 0
    line = error_line(
        capsys, "quantize", str(model), "--calibration", str(tmp_path / "set"), "--out", str(tmp_path / "out")
    )
    assert "collected from another model" in line


def test_a_calibration_set_of_another_scheduler_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model / "unet", other / "unet")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(other / "scheduler")
    sizes = ["--steps", "2", "--timesteps", "2", "--samples", "2"]
    assert main(["collect", str(other), "--out", str(tmp_path / "set"), *sizes]) == 0
    line = error_line(
        capsys, "quantize", str(model), "--calibration", str(tmp_path / "set"), "--out", str(tmp_path / "out")
    )
    assert "collected with another scheduler: prediction_type='v_prediction' there" in line


@pytest.mark.parametrize("verb", ["collect", "quantize"])
def test_a_file_where_the_result_should_go_is_told_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    line = error_line(capsys, verb, str(model), "--out", str(tmp_path / "taken" / "inside"))
    assert line.endswith(f"{tmp_path / 'taken'} is a file; choose another folder")
    assert (tmp_path / "taken").read_text() == "mine"


def test_evaluate_wants_the_model_that_the_quantized_one_was_made_from(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditional_unet().save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    line = error_line(capsys, "evaluate", str(tmp_path), str(quantized))
    assert "takes contexts of width None" in line and "name the model that it was made from" in line


@pytest.mark.parametrize("name", ["picture.xyz", "folder.png"])
def test_a_picture_is_a_png_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    line = error_line(capsys, "sample", str(model), "--out", str(tmp_path / name))
    assert "want the name of a PNG file" in line


def test_a_scheduler_that_cannot_take_so_many_steps_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "sample", str(model), "--steps", "5000", "--out", str(tmp_path / "a.png"))
    assert "num_inference_steps=5000: DDIMScheduler" in line


def test_a_damaged_context_file_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "context.safetensors").write_bytes(b"no tensors")
    line = error_line(capsys, "inspect", str(model), "--context", str(tmp_path / "context.safetensors"))
    assert "context.safetensors: cannot be read as safetensors" in line


def test_a_model_with_nan_is_bad_input_and_a_full_disk_a_failure(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = unconditional_unet()
    with torch.no_grad():
        broken.conv_in.weight[0] = torch.nan
    broken.save_pretrained(tmp_path / "unet")
    shutil.copytree(model / "scheduler", tmp_path / "scheduler")
    assert "conv_in: its output at timestep" in error_line(
        capsys, "collect", str(tmp_path), "--out", str(tmp_path / "s")
    )

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdiff_fx.safe_io.save_file", full)
    sizes = ["--steps", "2", "--timesteps", "2", "--samples", "2"]
    assert main(["collect", str(model), "--out", str(tmp_path / "set"), *sizes]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_conditional_model_without_contexts_says_how_to_pass_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditional_unet().save_pretrained(tmp_path / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    line = error_line(capsys, "sample", str(tmp_path), "--out", str(tmp_path / "picture.png"))
    assert "pass --context FILE.safetensors" in line


def test_a_truncated_checkpoint_is_refused(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in quantized.glob("*.*"):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    line = error_line(capsys, "sample", str(tmp_path), "--out", str(tmp_path / "picture.png"))
    assert ".safetensors" in line


def test_only_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no-such-folder", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_failure_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(source: Path) -> Path:
        raise RuntimeError("the\nsky fell")

    monkeypatch.setattr("qdiff_fx.cli.report.read_page", fail)
    assert main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "qdiff-fx report: RuntimeError: the sky fell (--debug shows where)\n"
