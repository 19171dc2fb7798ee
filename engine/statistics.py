"""What methods may know about the inputs of a layer: running sums over the rows that reach it. Knows rows; refuses to know models.

A statistic is a small class with a name, `add` and `result`; a new one is one more class in `STATISTICS`. Sums are kept
in float64: a float32 sum of a million squares loses the digits that a solver needs.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from bitpress.kernels.outer import add_outer


class Statistic(Protocol):
    """Accumulates rows x_MK (M rows of K inputs) and gives one tensor."""

    def add(self, x_MK: Tensor) -> None: ...

    def result(self) -> Tensor: ...


class SecondMoment:
    """E[x_j^2] of every input j: float64 [K]."""

    def __init__(self) -> None:
        self.total_K: Tensor | None = None
        self.rows = 0

    def add(self, x_MK: Tensor) -> None:
        """Add the squares of M rows."""
        squares_K = x_MK.float().square().sum(dim=0, dtype=torch.float64)
        self.total_K = squares_K if self.total_K is None else self.total_K.add_(squares_K)
        self.rows += len(x_MK)

    def result(self) -> Tensor:
        """The mean square of each input. Raises ValueError when no row came."""
        return _mean(self.total_K, self.rows)


class Gram:
    """E[x_i x_j] of every pair of inputs: float64 [K, K]. Products are exact, sums float32 within a batch, and of one triangle only."""

    def __init__(self) -> None:
        self.total_KK: Tensor | None = None  # only on and above its diagonal
        self.rows = 0

    def add(self, x_MK: Tensor) -> None:
        """Add the outer products of M rows."""
        if self.total_KK is None:
            self.total_KK = torch.zeros(x_MK.shape[1], x_MK.shape[1], dtype=torch.float64, device=x_MK.device)
        add_outer(self.total_KK, x_MK, x_MK, upper=True)
        self.rows += len(x_MK)

    def result(self) -> Tensor:
        """The mean product of each pair, exactly symmetric. Raises ValueError when no row came."""
        upper_KK = _mean(self.total_KK, self.rows).triu()
        return upper_KK + upper_KK.triu(1).t()


class MeanAbs:
    """E[|x_j|] of every input j: float64 [K]."""

    def __init__(self) -> None:
        self.total_K: Tensor | None = None
        self.rows = 0

    def add(self, x_MK: Tensor) -> None:
        """Add M rows."""
        sizes_K = x_MK.abs().sum(dim=0, dtype=torch.float64)
        self.total_K = sizes_K if self.total_K is None else self.total_K.add_(sizes_K)
        self.rows += len(x_MK)

    def result(self) -> Tensor:
        """The mean size of each input. Raises ValueError when no row came."""
        return _mean(self.total_K, self.rows)


class Peak:
    """max |x_j| of every input j: float64 [K]."""

    def __init__(self) -> None:
        self.most_K: Tensor | None = None

    def add(self, x_MK: Tensor) -> None:
        """Look at M rows."""
        most_K = x_MK.abs().amax(dim=0).double()
        self.most_K = most_K if self.most_K is None else torch.maximum(self.most_K, most_K)

    def result(self) -> Tensor:
        """The largest size of each input. Raises ValueError when no row came."""
        return _mean(self.most_K, 1)


class Mean:
    """E[x_j] of every input j: float64 [K]."""

    def __init__(self) -> None:
        self.total_K: Tensor | None = None
        self.rows = 0

    def add(self, x_MK: Tensor) -> None:
        """Add M rows."""
        total_K = x_MK.sum(dim=0, dtype=torch.float64)
        self.total_K = total_K if self.total_K is None else self.total_K.add_(total_K)
        self.rows += len(x_MK)

    def result(self) -> Tensor:
        """The mean of each input. Raises ValueError when no row came."""
        return _mean(self.total_K, self.rows)


class PooledCovariance:
    """Covariance of every pair of inputs within the rows that come together, averaged over such groups (METHODS 9.1): float64 [K, K]."""

    def __init__(self) -> None:
        self.total_KK: Tensor | None = None
        self.groups = 0

    def add(self, x_MK: Tensor) -> None:
        """Add a group of M rows, centred on its own mean."""
        centred = x_MK.float() - x_MK.float().mean(dim=0)
        covariance_KK = (centred.t() @ centred).double() / len(x_MK)
        self.total_KK = covariance_KK if self.total_KK is None else self.total_KK.add_(covariance_KK)
        self.groups += 1

    def result(self) -> Tensor:
        """The mean over groups. Raises ValueError when no row came."""
        return _mean(self.total_KK, self.groups)


STATISTICS: dict[str, Callable[[], Statistic]] = {
    "second_moment": SecondMoment,
    "gram": Gram,
    "loss_gram": Gram,
    "mean_abs": MeanAbs,
    "peak": Peak,
    "mean": Mean,
    "pooled_covariance": PooledCovariance,
}

BEHIND = frozenset({"mixed", "taken"})  # what attention makes of values, from the inputs of what reads them (engine.mixing)
WEIGHTED = frozenset({"loss_gram"})  # each token counts by its weight for the layer (engine.token_weights)


def _mean(total: Tensor | None, rows: int) -> Tensor:
    if total is None:
        raise ValueError("no rows were added")
    return total / rows
