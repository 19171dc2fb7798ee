"""What the method picker says of a method, from its catalogue entry alone."""

from bitpress.app.ui.method_form import explained


def test_needs_cost_and_use_are_told() -> None:
    entry = {"needs": ["gram"], "gradients": True, "cost": "A minute.", "use_when": "Choose it at 4 bits."}
    assert explained(entry) == "Needs calibration text and gradients. A minute. Choose it at 4 bits."


def test_what_an_entry_does_not_say_is_left_out() -> None:
    assert explained({"needs": []}) == "Needs no text."
