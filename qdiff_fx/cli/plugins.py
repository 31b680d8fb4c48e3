"""Things of the user's own that an option names: MODULE:NAME."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any


def loadable(text: str) -> Any:
    """What MODULE:NAME stands for, for argparse; modules of the working folder count."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise argparse.ArgumentTypeError(f"{text!r}, want MODULE:NAME, such as my_metrics:lpips")
    before = list(sys.path)
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be imported ({error})") from error
    finally:
        sys.path[:] = before


def named_loadable(text: str) -> tuple[str, Any]:
    """(NAME, what MODULE:NAME stands for) of NAME=MODULE:NAME, for argparse."""
    name, _, target = text.partition("=")
    if not name or not target:
        raise argparse.ArgumentTypeError(f"{text!r}, want NAME=MODULE:NAME, such as LPIPS=my_metrics:lpips")
    return name, loadable(target)
