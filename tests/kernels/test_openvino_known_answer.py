"""That OpenVINO is asked of the kernels that networks run on: the answer of others says nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("openvino")

from qdiff_fx.kernels import BACKENDS
from qdiff_fx.kernels.openvino_nodes import known_answer, program


def test_the_question_is_put_to_integer_kernels() -> None:
    placement = known_answer.question().placement()
    assert placement["linear"].is_integer and placement["conv"].is_integer


def test_a_wrong_answer_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    for holds in (False, True):
        monkeypatch.setattr(known_answer, "known_answers_hold", lambda holds=holds: holds)
        reason = BACKENDS["openvino"].unavailable("cpu")
        assert reason is None if holds else "saturate" in str(reason)


def test_answers_of_other_kernels_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.RunsOn, "is_integer", False)
    assert not known_answer.known_answers_hold()
