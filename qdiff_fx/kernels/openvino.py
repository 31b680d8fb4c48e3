"""The openvino backend: the plan's layers on the int8 kernels of OpenVINO's CPU plugin."""

from __future__ import annotations

import platform
from importlib.util import find_spec

from qdiff_fx.kernels.backend import Backend


def _unavailable(device: str) -> str | None:
    """Why OpenVINO cannot be used on `device`, None if it can."""
    if find_spec("openvino") is None:
        return "openvino is not installed; pip install 'qdiff-fx[openvino]'"
    if device != "cpu":
        return f"the model is on {device}; OpenVINO runs it on the cpu: use .to('cpu')"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the CPU is {platform.machine()}; the int8 kernels were tried on x86_64 alone"
    from qdiff_fx.kernels.openvino_nodes.known_answer import known_answers_hold

    if not known_answers_hold():
        return (
            "OpenVINO's int8 kernels saturate on this CPU (no VNNI), so results would be wrong; use backend='x86' or "
            "backend='reference', or the original model"
        )
    return None


OPENVINO = Backend(name="openvino", unavailable=_unavailable, devices=("cpu",), traceable=False)
