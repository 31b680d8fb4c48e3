"""That OpenVINO is asked of the kernels that networks run on: the answer of others says nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("openvino")

from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.openvino_nodes.known_answer import known_answers_hold, question


def test_the_question_is_put_to_integer_kernels() -> None:
    placement = question().placement()
    assert placement["linear"].is_integer and placement["conv"].is_integer


def test_a_wrong_answer_is_a_refusal() -> None:
    reason = BACKENDS["openvino"].unavailable("cpu")
    assert reason is None if known_answers_hold() else "saturate" in str(reason)
