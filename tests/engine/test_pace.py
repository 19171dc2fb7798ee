"""The time left of a pass: exact where the pace is even, the walk and the matrices counted apart, a training as it goes."""

import pytest

from bitpress.engine.pace import Pace


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def even_pass(blocks: int, walk: float, layer: float) -> list[tuple[float, float]]:
    """Told and true time left after each of two matrices in each block: a walk of so many seconds, then so many for each matrix."""
    clock = Clock()
    pace = Pace(total=2 * blocks * 10, blocks=blocks, now=clock)
    clock.time += 500.0  # what comes before the first block
    found, end = [], 600.0 + blocks * (walk + 2 * layer)
    for _ in range(blocks):
        pace.enter()
        clock.time += walk
        for _ in range(2):
            clock.time += layer
            pace.add(10, layer)
            found.append((pace.left(), end - clock.time))
    return found


@pytest.mark.parametrize(("walk", "layer"), [(3.0, 1.0), (0.0, 2.0), (10.0, 0.1)])
def test_an_even_pace_is_told_exactly_from_the_first_matrix_on(walk: float, layer: float) -> None:
    for told, true in even_pass(5, walk, layer):
        assert told == pytest.approx(true)


def test_nothing_is_told_before_anything_is_known() -> None:
    assert Pace(10, 1).left() is None


def test_a_training_is_counted_as_far_as_it_is() -> None:
    clock = Clock()
    pace = Pace(total=40, blocks=2, now=clock)
    pace.enter()
    clock.time += 8.0
    assert pace.left(under_way=10.0, spent=8.0) == pytest.approx(24.0), "half of a block of 20 weights in 8 seconds"


def test_what_an_earlier_start_made_says_nothing_of_the_pace() -> None:
    clock = Clock()
    pace = Pace(total=30, blocks=3, now=clock)
    pace.found(10)
    pace.enter()
    clock.time += 4.0
    pace.add(10, 4.0)
    assert pace.left() == pytest.approx(4.0)
