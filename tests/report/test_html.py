"""report.html stands alone, holds together, and shows names as names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from qdiff_fx.errors import CheckpointError, InputError
from qdiff_fx.report.html import write_report
from qdiff_fx.report.page import Table
from qdiff_fx.report.pictures import image_strip
from qdiff_fx.report.sections import run_page
from qdiff_fx.report.tables import markdown_table, results_markdown, text_table
from qdiff_fx.safe_io import write_json
from report_runs import BLOCKS, HOSTILE, LAYERS, demo_document

VOID = ("meta", "link", "img", "input", "br")
BENCHMARKS = sorted((Path(__file__).resolve().parents[2] / "docs").glob("results-*.json"))


class Document(HTMLParser):
    """Elements with their attributes, in order; raises AssertionError where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    return demo_document(tmp_path)


@pytest.fixture
def html(run: dict[str, Any], tmp_path: Path) -> str:
    write_json(tmp_path / "demo.json", run)
    return write_report(tmp_path).read_text(encoding="utf-8")


def test_the_report_needs_nothing_from_elsewhere(html: str) -> None:
    document = Document(html)
    assert all(source.startswith("data:image/png;base64,") for source in document.attributes("src"))
    assert document.all("link") == [{"rel": "icon", "href": "data:,"}]
    assert all(link["href"].startswith("#") for link in document.all("a"))
    assert re.findall(r"https?:|url\(|@import|//[a-z]+\.", html.replace("http-equiv", "")) == []


def test_only_the_pages_own_script_and_style_may_run(html: str) -> None:
    policy = next(meta["content"] for meta in Document(html).all("meta") if "http-equiv" in meta)
    for tag in ("script", "style"):
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        assert len(bodies) == 1
        digest = base64.b64encode(hashlib.sha256(bodies[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and policy.startswith("default-src 'none'")
    assert [name for _, attributes in Document(html).elements for name in attributes if name.startswith("on")] == []
    assert Document(html).attributes("style") == []


def test_names_are_shown_as_names(html: str) -> None:
    document = Document(html)
    assert len(document.all("script")) == 1
    assert [image for image in document.all("img") if image["src"] == "x"] == []
    shown = " ".join(text for texts in document.texts.values() for text in texts)
    assert shown.count(HOSTILE) > 15  # title, machine, table, layers, blocks, figures
    assert any(HOSTILE in title for title in document.texts["title"])


def test_links_labels_and_tables_hold_together(html: str) -> None:
    document = Document(html)
    ids = document.attributes("id")
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert all(link["href"].removeprefix("#") in ids for link in document.all("a"))
    assert all(bar in ids for bar in document.attributes("data-for"))
    assert document.attributes("data-block").count("1") == 1 + LAYERS // BLOCKS  # the figure's and the table's
    assert all(panel.get("aria-label") for panel in document.all("div") if panel.get("role") == "region")
    assert all(image["alt"] for image in document.all("img"))
    hits = [attributes for _, attributes in document.elements if attributes.get("class") == "hit"]
    assert len(hits) == html.count('class="hit"') == len(re.findall(r"<title>", html)) - 1  # the page has one too


def test_every_row_has_a_cell_a_column_and_a_facet_a_filter(run: dict[str, Any], tmp_path: Path) -> None:
    tables = [section.table for section in run_page(run, tmp_path).sections if section.table]
    assert {"layer-table", "quality-table", "size-table", "raise-table", "channel-table"} == {t.id for t in tables}
    for table in tables:
        assert {len(row.cells) for row in table.rows} == {len(table.columns)}
        assert {len(row.facets) for row in table.rows} == {len(table.filters)}


def test_a_layer_tells_bits_sensitivity_bytes_kernel_and_reason(run: dict[str, Any], tmp_path: Path) -> None:
    table = table_of(run, tmp_path, "layers")
    assert [cell.text for cell in table.rows[1].cells] == [
        "2", "block1.layer1", "1", "8", "8", "30.0", "1,091", "4,000", "qdiff.conv2d", f"because {HOSTILE}",
    ]  # fmt: skip
    assert table.rows[3].cells[-1].text == f"dropped: {HOSTILE}"
    assert table.rows[3].facets[2] == "falls back"
    assert table.options(0) == ("4 bits", "8 bits", "carrier type")
    unknown = table.rows[2].cells[5]
    assert unknown.text == "–" and unknown.value is not None and unknown.value > 1000  # sorts behind what is known


def test_what_the_script_looks_for_is_on_the_page(html: str) -> None:
    script = (files("qdiff_fx.report") / "templates" / "report.js").read_text(encoding="utf-8")
    document = Document(html)
    classes = {name for value in document.attributes("class") for name in value.split()}
    wanted = set(re.findall(r'(?:querySelector(?:All)?)\("([^"]+)"\)', script))
    assert len(wanted) > 10
    for selector in wanted:
        for name in re.findall(r"\.([a-z]+)", selector):
            assert name in classes, selector
        for name in re.findall(r"\[([a-z-]+)\]", selector):
            assert document.attributes(name), selector
    assert {"tip", "layer-table"} <= set(document.attributes("id"))
    assert (
        re.findall(r"fetch|XMLHttp|import\b|eval|innerHTML|outerHTML|insertAdjacent|document\.write|Function\(", script)
        == []
    )
    assert script.count("{") == script.count("}") and script.count("(") == script.count(")")


def test_sections_without_figures_are_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "calibration.json", {"kind": "quantize", "model": {"name": "m"}})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert Document(html).all("section") == []
    assert "<h1>m on integers</h1>" in html


def test_a_missing_picture_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "samples-1.png").write_bytes(b"no picture")
    write_json(tmp_path / "demo.json", run)
    with pytest.raises(InputError, match=r"samples-1\.png: a picture of the run cannot be read"):
        write_report(tmp_path)


def test_pictures_outside_of_the_run_are_refused(run: dict[str, Any], tmp_path: Path) -> None:
    run["samples"][0]["file"] = "../secret.png"
    write_json(tmp_path / "demo.json", run)
    with pytest.raises(CheckpointError, match="want plain names inside the folder"):
        write_report(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of demo\.json"):
        write_report(tmp_path)


def test_a_document_of_the_wrong_form_is_told(run: dict[str, Any], tmp_path: Path) -> None:
    del run["layers"][0]["kernel"]
    write_json(tmp_path / "demo.json", run)
    with pytest.raises(CheckpointError, match=r"demo\.json: is no complete document of a run \(KeyError: 'kernel'\)"):
        write_report(tmp_path)


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_every_benchmark_of_the_repository_has_a_page(file: Path, tmp_path: Path) -> None:
    html = write_report(file, tmp_path / "page.html").read_text(encoding="utf-8")
    document = Document(html)
    assert document.all("table")
    assert len(document.all("tr")) > 2


def test_times_of_a_benchmark_become_bars_and_a_card(tmp_path: Path) -> None:
    arms = {"bf16 compile": {"milliseconds": 20.0, "sqnr_db": 40.0}, HOSTILE: {"milliseconds": 10.0, "sqnr_db": 30.0}}
    (tmp_path / "latency.json").write_text(json.dumps({"net": {"batch": 2, "arms": arms}}))
    html = write_report(tmp_path / "latency.json").read_text(encoding="utf-8")
    document = Document(html)
    assert sum("fill" in attributes.get("class", "") for attributes in document.all("rect")) == 2
    assert "2.0×" in html and "batch 2" in html
    assert len(document.all("script")) == 1


def test_what_all_records_of_a_benchmark_share_is_said_once(tmp_path: Path) -> None:
    rows = [{"isa": "avx2", "batch": 2, "rows": index} for index in range(3)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    html = write_report(tmp_path / "bench.json").read_text(encoding="utf-8")
    assert "the same in all rows: isa avx2, batch 2" in html
    assert len(Document(html).all("th")) == 1


def test_results_in_markdown_hold_every_arm_and_size(run: dict[str, Any]) -> None:
    text = results_markdown(run)
    assert f"| rtn {HOSTILE} | W4A8 | 20.0 | ∞ | 31.0 | 50 % |" in text
    assert "| W4A8 | 600 | 0.150 |" in text


def test_tables_are_aligned() -> None:
    rows = [("long name", "1"), ("x", "100")]
    assert text_table(("a", "b"), rows, numeric=(1,)).splitlines()[2:] == ["long name    1", "x          100"]
    assert markdown_table(("a", "b"), rows, numeric=(1,)).splitlines()[1] == "| --- | ---: |"


def test_a_strip_puts_images_side_by_side_on_white() -> None:
    strip = image_strip(torch.zeros(3, 1, 4, 5), columns=2)
    assert strip.shape == (4 + 2 + 4, 5 + 2 + 5, 3)
    assert (strip[:4, 5:7] == 255).all()
    assert (strip[:4, :5] == 0).all()


def test_latents_are_no_pictures() -> None:
    with pytest.raises(InputError, match="latents are no pictures"):
        image_strip(torch.zeros(1, 4, 8, 8), columns=1)


def table_of(run: dict[str, Any], folder: Path, section: str) -> Table:
    found = next(item.table for item in run_page(run, folder).sections if item.id == section)
    assert found is not None
    return found
