"""What is said of zeros: bytes as they are stored, speed as it was timed, and plainly when a pattern brings none."""

import pytest

from bitpress.app.ui.zeros_note import NO_KERNEL, zeros_note
from bitpress.engine.accounting import layout_of
from bitpress.engine.latency_table import LatencyTable
from bitpress.engine.model.anatomy import Part
from bitpress.engine.recipe import Scheme
from bitpress.kernels.layout import DenseLayout

PART = Part(name="m", role="up", out_features=64, in_features=64)
TWO_FOUR = Scheme.model_validate({"sparsity": {"ratio": 0.5, "pattern": "2:4"}})


def timed(gain: float) -> LatencyTable:
    """Dense at a second, two of four at `gain` times its speed."""
    layouts = {DenseLayout(): 1.0, layout_of(TWO_FOUR): 1 / gain}
    return LatencyTable({layout: {(64, 64): (seconds, layout.nbytes(64, 64))} for layout, seconds in layouts.items()})


@pytest.mark.parametrize(("gain", "slow"), [(0.5, True), (1.0, True), (1.6, False)])
def test_a_timed_pattern_says_what_was_measured(gain: float, slow: bool) -> None:
    said = zeros_note(TWO_FOUR, PART, timed(gain))
    assert (NO_KERNEL in said) == slow
    assert "44% smaller" in said
    assert "measured" in said.lower()


def test_codes_with_zeros_anywhere_are_stored_as_codes() -> None:
    scheme = Scheme.model_validate({"weights": {"bits": 4, "group_size": 32}, "sparsity": {"ratio": 0.5}})
    said = zeros_note(scheme, PART, timed(1.6))
    assert "0 % smaller" in said and NO_KERNEL in said


def test_what_was_not_timed_is_not_claimed() -> None:
    for table in (None, LatencyTable({DenseLayout(): {(64, 64): (1.0, 8192)}})):
        said = zeros_note(TWO_FOUR, PART, table)
        assert "Not timed on this machine" in said and NO_KERNEL not in said


def test_without_zeros_nothing_is_said() -> None:
    assert zeros_note(Scheme(), PART, None) == ""
    assert zeros_note(Scheme.model_validate({"sparsity": {"ratio": 0.0}}), PART, None) == ""
