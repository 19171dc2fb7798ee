"""The protocol is stable, complete and free of torch; intervals behave as Student's."""

import dataclasses
import math
import random
import subprocess
import sys

import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.measure.interval import safe_exp, settled, t_interval
from bitpress.engine.measure.protocol import TIERS, Protocol, tier_named, window_for

PROTOCOL = Protocol("wikitext2-raw/test", "173c87", "test", "one file", 2048, 2048, 16, "smollm2-135m", "none", "float32", "cpu", 2, 2048)


def test_digest_is_stable() -> None:
    assert PROTOCOL.digest() == dataclasses.replace(PROTOCOL).digest() == "b21b107462fe00a9"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Protocol)])
def test_every_field_is_in_the_digest(field: str) -> None:
    value = getattr(PROTOCOL, field)
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    assert dataclasses.replace(PROTOCOL, **{field: other}).digest() != PROTOCOL.digest()


def test_one_line_names_what_a_reader_must_know() -> None:
    line = PROTOCOL.one_line()
    for part in ("wikitext2-raw/test", "16 windows of 2,048", "non-overlapping", "smollm2-135m", "float32 on cpu", "first token not scored"):
        assert part in line
    assert "cut from" not in line
    assert "cut from 2,048" in dataclasses.replace(PROTOCOL, window=256, stride=256).one_line()


def test_tiers_are_those_on_screen_and_fit_the_context() -> None:
    assert {name: (tier.windows, tier.window) for name, tier in TIERS.items()} == {"quick": (8, 256), "standard": (16, 2048), "full": (None, 2048)}
    assert window_for("standard", context=8192) == 2048
    assert window_for("standard", context=256) == 256
    with pytest.raises(InputError, match="quick, standard, full"):
        tier_named("huge")


def test_protocol_and_interval_import_no_torch() -> None:
    code = "import sys, bitpress.engine.measure.protocol, bitpress.engine.measure.interval; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_interval_is_students() -> None:
    interval = t_interval([1.0, 2.0, 3.0, 4.0])
    assert interval is not None
    # t(0.975, 3) = 3.182446, sd = 1.290994, over sqrt(4)
    assert interval.half_width == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    assert interval.mean == 2.5
    assert t_interval([1.0]) is None


def test_interval_covers_the_truth_about_19_times_in_20() -> None:
    draw = random.Random(0)
    found = 0
    for _ in range(2000):
        interval = t_interval([draw.gauss(0.3, 0.1) for _ in range(8)])
        found += interval is not None and interval.low <= 0.3 <= interval.high
    assert 0.935 < found / 2000 < 0.965


def test_interval_shrinks_with_more_windows() -> None:
    draw = random.Random(1)
    values = [draw.gauss(0.1, 0.02) for _ in range(64)]
    widths = [t_interval(values[:n]).half_width for n in (8, 16, 32, 64)]  # type: ignore[union-attr]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 2


def test_settled_needs_eight_windows_and_a_narrow_interval() -> None:
    assert not settled([0.01] * 7)
    assert settled([0.01] * 8)
    assert not settled([0.0, 0.05] * 4)
    assert settled([0.5, 0.55] * 4)  # a tenth of a large log-ratio is the larger bound
    assert not settled([math.nan] * 8)


def test_an_interval_of_what_is_not_finite_claims_nothing() -> None:
    interval = t_interval([1.0, math.inf])
    assert interval is not None
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert safe_exp(1e6) == math.inf
