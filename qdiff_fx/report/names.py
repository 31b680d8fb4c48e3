"""Module paths that fit into a figure."""

from __future__ import annotations

_SHORT = (
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    ("mid_block", "mid"),
    ("resnets", "res"),
    ("attentions", "attn"),
    ("transformer_blocks", "block"),
    ("conv_shortcut", "shortcut"),
    ("time_emb_proj", "time"),
    (".input", ""),
)


def short_name(name: str) -> str:
    """`name` with the usual parts of a path abbreviated."""
    for long, short in _SHORT:
        name = name.replace(long, short)
    return name
