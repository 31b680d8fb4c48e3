"""Write what a demo run measured into README.md and docs/results.md, and its pictures into docs/images.

qdiff-fx demo --out demo && python benchmarks/results_table.py demo
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from qdiff_fx.report.tables import results_markdown, shortcuts_markdown
from qdiff_fx.safe_io import read_json, write_bytes

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- figures of qdiff-fx demo: benchmarks/results_table.py -->", "<!-- end of figures -->"
PICTURES = ("samples", "error_growth", "sqnr_by_timestep", "shortcut_ranges", "activation_ranges")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a demo run")
    folder = parser.parse_args().demo
    run = read_json(folder / "demo.json")
    for name in PICTURES:
        source = folder / run["pictures"][name]
        shutil.copyfile(source, ROOT / "docs" / "images" / f"demo-{source.name}")
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    write_bytes(ROOT / "README.md", f"{before}{START}\n{results_markdown(run)}\n{END}{after}".encode())
    pictures = "\n".join(
        f"![{name.replace('_', ' ')}](images/demo-{run['pictures'][name]})" for name in PICTURES if name != "samples"
    )
    parts = ("# Results of `qdiff-fx demo`", results_markdown(run), shortcuts_markdown(run), pictures, more())
    write_bytes(ROOT / "docs" / "results.md", ("\n\n".join(parts) + "\n").encode())


def more() -> str:
    """Links to the pages of the other benchmarks, by their titles."""
    pages = sorted((ROOT / "docs").glob("results-*.md"))
    links = [f"- [{page.read_text().partition(chr(10))[0].removeprefix('# ')}]({page.name})" for page in pages]
    return "\n".join(["## Other results", "", *links])


if __name__ == "__main__":
    main()
