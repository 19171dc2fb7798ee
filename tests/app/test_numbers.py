"""Numbers as people read them."""

import math

import pytest

from bitpress.app.ui import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [(20.7431, "20.7"), (0, "0"), (134515, "135\u2009000"), (0.01234, "0.0123"), (-1.5, "\u22121.50"), (999.6, "1\u2009000"), (1e6 / 3, "333\u2009000"),
     (math.inf, "∞"), (math.nan, "n/a"), (2.5e-7, "2.50\u00d710⁻⁷"), (-4e12, "\u22124.00\u00d710¹²")],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert numbers.amount(value) == text


def test_units_and_signs() -> None:
    assert numbers.file_size(269_060_552) == "269\u2009MB"
    assert numbers.file_size(3 << 30) == "3.00\u2009GiB"
    assert numbers.memory(780 << 20) == "0.762\u2009GiB"
    assert numbers.signed_percent(0.123) == "+12.3\u2009%"
    assert numbers.signed_percent(-0.5) == "\u221250.0\u2009%"
    assert numbers.signed_percent(0.0) == "0\u2009%"
    assert numbers.short_count(134_515_008) == "135\u2009M"
    assert numbers.times(3.2051) == f"3.21{numbers.TIMES}"


@pytest.mark.parametrize(("seconds", "text"), [(0.0042, "4.20\u2009ms"), (12.3, "12\u2009s"), (200, "3\u2009min 20\u2009s"), (3900, "1\u2009h 5\u2009min")])
def test_durations(seconds: float, text: str) -> None:
    assert numbers.duration(seconds) == text
