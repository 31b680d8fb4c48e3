"""PREPARE passes, in order: from a captured graph to one with quantizers in it."""

from qdiff_fx.passes.base import GraphPass
from qdiff_fx.passes.prepare.annotate import AnnotatePolicies
from qdiff_fx.passes.prepare.insert_quantizers import InsertQuantizers
from qdiff_fx.passes.prepare.partition_blocks import PartitionBlocks
from qdiff_fx.passes.prepare.spelled_attention import CanonicalizeAttention
from qdiff_fx.passes.prepare.split_shortcuts import SplitShortcuts
from qdiff_fx.passes.prepare.training_ops import RemoveTrainingOps

PREPARE: tuple[GraphPass, ...] = (
    RemoveTrainingOps(),
    CanonicalizeAttention(),
    SplitShortcuts(),
    AnnotatePolicies(),
    PartitionBlocks(),
    InsertQuantizers(),
)
"""Blocks are found before quantizers go in; a quantizer takes the block of the tensor that it quantizes."""
