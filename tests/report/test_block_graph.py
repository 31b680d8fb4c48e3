"""The graph of blocks is that of the network."""

from __future__ import annotations

import qdiff_fx
from qdiff_fx.passes.analysis import blocks
from qdiff_fx.report.block_graph import block_graph
from subjects import unconditional_unet


def test_skip_connections_and_resolutions_are_found() -> None:
    prepared = qdiff_fx.prepare(unconditional_unet())
    graph = block_graph(prepared.graph_module)
    names = {block["index"]: block["name"] for block in graph["blocks"]}
    levels = {block["name"]: block["level"] for block in graph["blocks"]}
    assert list(names) == [block.index for block in blocks(prepared.graph_module)]
    named = [(names[source], names[target]) for source, target in graph["edges"]]
    assert ("conv_in", "down_blocks.0.resnets.0") in named
    assert ("conv_in", "up_blocks.1.resnets.1") in named  # the outermost skip
    assert ("down_blocks.0.resnets.0", "up_blocks.1.resnets.0") in named
    assert not any("time_embedding" in source for source, _ in named)  # all blocks read it: it is no path
    assert levels["conv_in"] == levels["conv_out"] == 0
    assert levels["mid_block.resnets.0"] == 1
    assert all(source < target for source, target in graph["edges"])
