"""How long a pass over matrices still takes. Knows seconds and sizes; neither models nor methods.

Two things take time: making matrices, which grows with their sizes, and walking the text through the blocks, which is paid
once a block and before its first matrix. Counted together, the first matrix of the first block would stand for all of it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Pace:
    """The pace so far. total: weights to make; blocks: to walk through. Nothing before the first block is counted."""

    total: int
    blocks: int
    now: Callable[[], float] = time.perf_counter
    made: int = 0
    making: float = 0.0  # seconds
    entered: int = 0
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.since = self.now()

    def enter(self) -> None:
        """The walk stands before a block."""
        if self.entered == 0:
            self.since = self.now()
        self.entered += 1

    def add(self, weights: int, seconds: float) -> None:
        """A matrix of so many weights was made in so many seconds."""
        self.made, self.making = self.made + weights, self.making + seconds

    def found(self, weights: int) -> None:
        """A matrix of so many weights was made before this start: it says nothing of the pace."""
        self.total -= weights

    def left(self, under_way: float = 0.0, spent: float = 0.0) -> float | None:
        """Seconds still to go, None before anything is known. under_way: weights made of those being trained, in `spent` seconds."""
        made = self.made + under_way
        if made <= 0:
            return None
        rate, walking = (self.making + spent) / made, max(0.0, self.now() - self.since - self.making - spent)
        return rate * (self.total - made) + (walking / self.entered * (self.blocks - self.entered) if self.entered else 0.0)
