"""One measurement under way: what is scored so far, what is kept after each block, what it took. Knows the report; no way to measure."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitpress.engine.errors import Cancelled
from bitpress.engine.methods.base import finite
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.sensitivity_file import KINDS, Score, SensitivityReport

Emit = Callable[[str, dict[str, Any]], None]


@dataclass
class Scoring:
    """What every way of measuring writes to; `report` holds the scores so far, `unfinished` is where they are kept meanwhile."""

    loaded: Loaded
    report: SensitivityReport
    unfinished: Path
    emit: Emit
    should_stop: Callable[[], bool]
    stand: dict[str, list[float]] = field(default_factory=dict)  # layer -> how many windows each of its second-order scores stands on

    def __post_init__(self) -> None:
        """Hold the stored weights: while a pass computes, the modules hold casts of them."""
        modules = {name: surgery.get(self.loaded.model, name) for name in self.loaded.anatomy.by_name}
        self.stored = {name: _matrix(module).detach() for name, module in modules.items()}

    @contextmanager
    def timed(self, kinds: Sequence[str]) -> Iterator[None]:
        """The time of a pass, shared by the kinds that came from it. They count as measured once it is through."""
        began = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - began) / len(kinds)
            self.report.seconds_of |= {kind: self.report.seconds_of.get(kind, 0.0) + share for kind in kinds}
        self.report.kinds = tuple(kind for kind in KINDS if kind in (*self.report.kinds, *kinds))

    def done(self, kind: str) -> set[tuple[str, str]]:
        """(layer, option) of the scores of a kind."""
        return {(score.layer, score.option) for score in self.report.scores if score.kind == kind}

    def keep(self, layer: str, option: str, kind: str, score: float) -> None:
        """Add one score."""
        self.report.scores.append(Score(layer=layer, option=option, kind=kind, score=score))

    def save(self) -> None:
        """Make what is scored so far durable."""
        self.report.save(self.unfinished)

    def weight(self, name: str) -> Tensor:
        """A layer's weight as float32 [N, K]; of an embedding its rows. Raises InputError when it is not finite."""
        return finite(self.stored[name].float(), name)

    def check(self) -> None:
        """Raises Cancelled when told to stop."""
        if self.should_stop():
            raise Cancelled(remedy="Finished blocks are kept; start it again to go on.")


def _matrix(module: nn.Module) -> Tensor:
    return module.weight if isinstance(module, nn.Embedding) else surgery.linear_weight(module)
