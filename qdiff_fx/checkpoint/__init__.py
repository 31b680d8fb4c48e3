"""Stored models: plan.json and safetensors shards. docs/format.md describes the format."""

from qdiff_fx.checkpoint.model import StoredModel
from qdiff_fx.checkpoint.reader import read_model
from qdiff_fx.checkpoint.timings import read_timings, write_timings
from qdiff_fx.checkpoint.writer import DEFAULT_SHARD_BYTES, write_model

__all__ = ["DEFAULT_SHARD_BYTES", "StoredModel", "read_model", "read_timings", "write_model", "write_timings"]
