"""The command line: `qdiff-fx VERB ...`. Errors are one line with the remedy; a traceback only with --debug."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence

from qdiff_fx.cli.parser import OneLineParser
from qdiff_fx.errors import (
    BackendError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    ConfigError,
    DiskError,
    InputError,
    NonFiniteError,
    QDiffWarning,
)

VERBS: Mapping[str, str] = {
    "demo": "everything on the bundled model: quantize, sample, measure, report.html",
    "inspect": "what a model consists of: shortcuts, attentions, layers, blocks, bytes",
    "collect": "calibration data along a model's own sampling trajectories",
    "quantize": "a model with integer weights, saved to a folder",
    "sample": "pictures from a model or a quantized folder",
    "evaluate": "a quantized model against the full-precision one",
    "report": "report.html from the folder of a run",
}
"""Every verb is the module of its name in this package: `parser()` and `run(arguments)`."""

_BAD_INPUT = (
    ConfigError,
    InputError,
    CheckpointError,
    CalibrationError,
    CaptureError,
    NonFiniteError,
    BackendError,
    FileNotFoundError,
    NotADirectoryError,
)
_EXTRAS: Mapping[str, str] = {"matplotlib": "report", "jinja2": "report", "PIL": "report", "torchmetrics": "eval"}
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Libraries that tell at import what they could not load; nothing of it concerns the user of a CPU build."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, 2 for bad input, 1 for a failure, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        _top_parser().print_help()
        return 0
    if verb not in VERBS:
        print(f"qdiff-fx: {verb!r} is no verb: want one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    debug = "--debug" in arguments
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("always", QDiffWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            module = importlib.import_module(f"qdiff_fx.cli.{verb}")
            module.run(module.parser().parse_args(arguments[1:]))
    except SystemExit as leaving:  # argparse, after --help or its own line
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        print(f"qdiff-fx {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"qdiff-fx {verb}: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_bad_input(error) or _missing_extra(error) else 1
    return 0


def _is_bad_input(error: BaseException) -> bool:
    """Whether the user can mend it by another command; a full disk is a failure of the machine."""
    return isinstance(error, _BAD_INPUT) and not isinstance(error, DiskError)


def _top_parser() -> OneLineParser:
    verbs = "\n".join(f"  {name:<10}{description}" for name, description in VERBS.items())
    return OneLineParser(
        prog="qdiff-fx",
        usage="qdiff-fx VERB [options]",
        description="Turns a trained diffusion UNet into an integer model, without training.\n\nverbs:\n" + verbs,
        epilog="Every verb has a --help with an example: qdiff-fx quantize --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _one_line(error: BaseException) -> str:
    missing = _missing_extra(error)
    if missing:
        return f"this verb needs {missing[0]}: pip install 'qdiff-fx[{missing[1]}]'"
    message = " ".join(str(error).split())
    if isinstance(error, _BAD_INPUT) or type(error).__module__ == "qdiff_fx.errors":
        return message
    return f"{type(error).__name__}: {message or 'no message'} (--debug shows where)"


def _missing_extra(error: BaseException) -> tuple[str, str] | None:
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return (name, _EXTRAS[name]) if name in _EXTRAS else None


def _show_warning(message: Warning | str, category: type[Warning], *location: object) -> None:
    print(f"qdiff-fx: warning: {' '.join(str(message).split())}", file=sys.stderr)
