"""Figures put their marks where the values are, and say what they are."""

from __future__ import annotations

from itertools import pairwise
from xml.etree.ElementTree import Element, fromstring

import pytest

from qdiff_fx.report.block_figure import block_errors, block_figure, decibels_alone
from qdiff_fx.report.charts import Bar, BarGroup, Series, band_chart, bar_chart, line_chart
from qdiff_fx.report.svg import Axis, axis, number, path


def marked(svg: Element, class_: str) -> list[Element]:
    return [item for item in svg.iter() if class_ in item.get("class", "").split()]


def tips(svg: Element) -> list[str]:
    return [item.text or "" for item in svg.iter("title")]


def test_an_axis_maps_its_ends_to_its_ends() -> None:
    linear, log = Axis(low=1, high=3, start=100, stop=0), Axis(low=1e-4, high=1.0, start=0, stop=40, log=True)
    assert [linear(value) for value in (1, 2, 3)] == [100, 50, 0]
    assert [round(log(value), 9) for value in (1e-4, 1e-2, 1.0)] == [0, 20, 40]
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


@pytest.mark.parametrize("values", [[0.0, 10.0], [7.0, 7.0], [], [-3.2e6, 1.0e6], [1e-9, 2e-9]])
def test_ticks_are_round_and_within_the_axis(values: list[float]) -> None:
    scale = axis(values, 0, 100)
    ticks = scale.ticks()
    steps = [second - first for first, second in pairwise(ticks)]
    digits = f"{steps[0]:.9e}".partition("e")[0].rstrip("0")
    assert digits in ("1.", "2.", "2.5", "5.")
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert 3 <= len(ticks) <= 8
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert all(scale.low <= value <= scale.high for value in values)


def test_missing_values_break_a_line() -> None:
    drawn = path([(0, 1.0), (1, 2.0), (2, None), (3, 4.0)], lambda x: x, lambda y: y)
    assert drawn == "M0 1 L1 2 M3 4"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.001234, "0.00123"), (12345.0, "12,300"), (1e-7, "1e-07"), (-2.5, "-2.5")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_line_chart_tells_every_value_and_draws_only_what_it_can() -> None:
    series = (
        Series(label="a <b>", colour="ours", points=((0.0, 1.0), (5.0, None))),
        Series(label="c", colour="rtn", points=((0.0, 0.0), (5.0, 10.0)), dashed=True),
    )
    svg = fromstring(line_chart(series, x_label="step (more)", y_label="error", unit="dB", log=True))
    assert tips(svg) == ["step 0\na <b>: 1 dB\nc: 0 dB", "step 5\na <b>: ∞ dB\nc: 10 dB"]
    assert len(marked(svg, "line")) == 2 and len(marked(svg, "dashed")) == 1
    assert len(marked(svg, "dot")) == 2  # neither the missing value nor, on a log axis, zero
    assert svg.get("tabindex") == "0" and svg.get("aria-label") == "error by step (more)"


def test_a_backward_axis_has_the_largest_timestep_at_the_left() -> None:
    series = [Series(label="a", colour="ours", points=((0.0, 1.0), (900.0, 2.0)))]
    svg = fromstring(line_chart(series, x_label="t", y_label="y", backwards=True))
    low, high = (float(dot.get("cx", "")) for dot in marked(svg, "dot"))
    assert high < low
    areas = [(float(item.get("x", "")), float(item.get("width", ""))) for item in marked(svg, "area")]
    assert areas[0][0] == pytest.approx(areas[1][0] + areas[1][1])  # columns meet half way and do not overlap


def test_bars_reach_from_low_to_high() -> None:
    groups = [
        BarGroup(label="x", bars=(Bar(low=-1.0, high=3.0, colour="ours", tip="t"),), note="n"),
        BarGroup(label="y", bars=(Bar(low=0.0, high=1.5, colour="rtn", tip="u"),)),
    ]
    svg = fromstring(bar_chart(groups, x_label="value", unit="ms"))
    wide, narrow = (float(item.get("width", "")) for item in marked(svg, "fill"))
    assert wide / narrow == pytest.approx(4 / 1.5, rel=0.01)
    assert tips(svg) == ["x\nt", "y\nu"]
    assert any(item.text == "value [ms]" for item in svg.iter("text"))


def test_a_band_shows_the_grids_limits() -> None:
    svg = fromstring(band_chart("conv", [(0, -1.0, 2.0), (500, -3.0, 1.0)], (-4.0, 4.0), title="conv"))
    assert len(marked(svg, "limit")) == 2
    assert tips(svg)[0] == "conv\ntimestep 0: -1 to 2\ngrid: -4 to 4"


def test_a_blocks_error_is_the_sum_of_its_layers() -> None:
    blocks = [{"index": 0, "layers": ["a", "b"]}, {"index": 1, "layers": ["c"]}, {"index": 2, "layers": ["d"]}]
    layers = [{"name": "a", "error": 0.01}, {"name": "b", "error": 0.02}, {"name": "c", "error": 0.0}, {"name": "d"}]
    assert block_errors(blocks, layers) == {0: pytest.approx(0.03), 1: 0.0}
    assert decibels_alone(0.01) == pytest.approx(20.0)
    assert decibels_alone(0.0) is None


def test_the_most_sensitive_block_has_the_strongest_colour() -> None:
    blocks = [{"index": i, "name": f"b{i}", "layers": ["x"], "level": i % 2} for i in range(4)]
    svg = fromstring(block_figure(blocks, [[0, 1], [0, 3], [7, 9]], {0: 1e-5, 1: 1e-2, 2: 1e-3}))
    strengths = [float(item.get("fill-opacity", "")) for item in marked(svg, "heat")]
    assert strengths[1] == 1.0 and strengths[0] < strengths[2] < strengths[1]
    assert len(marked(svg, "edge")) == 2 and len(marked(svg, "skip")) == 1  # an edge to no block is not drawn
    assert "quantized alone: 20.0 dB, 90.8% of all predicted error" in tips(svg)[1]
    assert tips(svg)[3] == "block 3: b3\n1 layer"
