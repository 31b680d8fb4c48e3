"""Picture metrics: their values where these are known, and hooks that are checked."""

from __future__ import annotations

import math

import pytest
import torch

from qdiff_fx.errors import InputError
from qdiff_fx.evaluation import compare_pictures, endpoint_psnr, prompt_score

PICTURES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_equal_pictures_are_perfect() -> None:
    result = compare_pictures(PICTURES, PICTURES.clone())
    assert result.psnr_db is None
    assert result.ssim == pytest.approx(1.0, abs=1e-6)
    assert result.rows()[0][1] == "∞ dB"


def test_ssim_of_constant_pictures_is_their_luminance_term() -> None:
    result = compare_pictures(torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.5))
    luminance = (0.01 * 2) ** 2  # c1 of Wang et al.: (k1 * range)^2
    assert result.ssim == pytest.approx((2 * -0.25 + luminance) / (0.5 + luminance), abs=1e-4)


@pytest.mark.parametrize("side", [3, 5, 8, 12])
def test_small_pictures_have_a_smaller_window(side: int) -> None:
    pictures = torch.rand(2, 1, side, side)
    assert compare_pictures(pictures, pictures).ssim == pytest.approx(1.0, abs=1e-5)


def test_psnr_is_that_of_the_end_point() -> None:
    worse = PICTURES + 0.1 * torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(1))
    result = compare_pictures(PICTURES, worse)
    assert result.psnr_db == endpoint_psnr(PICTURES, worse).median_db
    assert 0.5 < result.ssim < 0.999


def test_a_metric_of_the_user_s_own_is_shown_by_its_name() -> None:
    result = compare_pictures(
        PICTURES, PICTURES + 0.25, metrics={"L1": lambda exact, seen: (exact - seen).abs().mean((1, 2, 3))}
    )
    assert 0.0 < result.others["L1"] <= 0.25
    assert result.rows()[-1][0] == "L1, median over samples"
    assert len(result.by_picture["L1"]) == 3


@pytest.mark.parametrize("figures", [torch.tensor(1.0), torch.full((3,), math.nan)], ids=["one", "nan"])
def test_a_metric_must_give_a_finite_figure_a_picture(figures: torch.Tensor) -> None:
    with pytest.raises(InputError, match="one finite figure an image"):
        compare_pictures(PICTURES, PICTURES, metrics={"odd": lambda exact, seen: figures})


def test_prompts_are_scored_by_what_is_passed_in_and_refused_without() -> None:
    assert prompt_score(PICTURES, ["a", "bb", "ccc"], lambda images, prompts: torch.arange(3.0)) == 1.0
    with pytest.raises(InputError, match="pass metric="):
        prompt_score(PICTURES, ["a", "b", "c"], None)
    with pytest.raises(InputError, match="2 prompts for 3 images"):
        prompt_score(PICTURES, ["a", "b"], lambda images, prompts: torch.zeros(3))
