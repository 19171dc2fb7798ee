"""What one product costs on this machine, from the kept figures of `bench kernels`. Knows shapes and widths; times nothing, torch-free.

Decoding a token multiplies every matrix once. A matrix of a shape that was not timed takes the time per stored byte of the
nearest timed one of its width: at batch 1 reading the weights is what costs. Attention and norms are not in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitpress.engine.accounting import embedding_layout
from bitpress.engine.choices import DENSE_BITS, HEAD_BITS, Choices, Floats, end_scheme
from bitpress.engine.home import home
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Scheme


def table_path() -> Path:
    """Where the newest figures of this machine are kept."""
    return home() / "bench" / "kernels.json"


def keep(report: dict[str, Any]) -> None:
    """Keep what `bench kernels` found, whole or not at all."""
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(report), encoding="utf8")
    part.replace(path)


def kept_table() -> "LatencyTable | None":
    """The figures that are kept; None before the bench ran here, or when the file is damaged."""
    try:
        rows = json.loads(table_path().read_text(encoding="utf8"))["rows"]
        timed = {(int(row["bits"]), int(row["shape"][0]), int(row["shape"][1])): (float(row["p50_s"]), int(row["bytes"])) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return LatencyTable(timed) if timed else None


@dataclass(frozen=True)
class LatencyTable:
    """(bits, N, K) -> (seconds, stored bytes) of one product; dense is 16 bits."""

    timed: dict[tuple[int, int, int], tuple[float, int]]

    def product_seconds(self, bits: int, rows: int, columns: int, nbytes: int) -> float:
        """Seconds of one product with a matrix of `nbytes` stored bytes; a width that was not timed counts as the nearest above."""
        width = min((bits_ for bits_, _, _ in self.timed if bits_ >= bits), default=max(bits_ for bits_, _, _ in self.timed))
        near = [(abs(np.log(n * k / (rows * columns))), n, k) for bits_, n, k in self.timed if bits_ == width]
        _, n, k = min(near)
        seconds, stored = self.timed[width, n, k]
        return seconds * nbytes / stored

    def seconds(self, choices: Choices) -> Floats:
        """Seconds of every item's products under every option [I, J]. The tied embedding is multiplied as the head."""
        return np.array([[self._item(choices, layers, option.scheme, column) for column, option in enumerate(choices.options)] for layers in choices.items])

    def _item(self, choices: Choices, layers: tuple[str, ...], scheme: Scheme, column: int) -> float:
        total = 0.0
        stored = choices.bytes_IJ[choices.items.index(layers), column]
        whole = sum(choices.anatomy.by_name[name].numel for name in layers)
        for part in (choices.anatomy.by_name[name] for name in layers):
            bits = scheme.weights.bits if scheme.weights else DENSE_BITS
            total += self.product_seconds(bits, part.out_features, part.in_features, int(stored * part.numel / whole))
        return total

    def token_seconds(self, choices: Choices, choice: NDArray[np.int64]) -> float:
        """Predicted seconds of one token: all products and the head."""
        return float(self.seconds(choices)[np.arange(len(choice)), choice].sum()) + self.head_seconds(choices)

    def head_seconds(self, choices: Choices) -> float:
        """Seconds of the head at its fixed width; 0 where it is an item with the embedding that it is tied to."""
        anatomy = choices.anatomy
        if choices.embedding_bits is None and anatomy.tied:
            return 0.0
        return self._plain(anatomy.head or anatomy.embedding, HEAD_BITS if choices.embedding_bits is None else choices.embedding_bits)

    def dense_seconds(self, anatomy: Anatomy) -> float:
        """Seconds of a token of the dense model."""
        return sum(self._plain(part, DENSE_BITS) for part in (*anatomy.linears, anatomy.head or anatomy.embedding))

    def _plain(self, part: Part, bits: int) -> float:
        nbytes = embedding_layout(end_scheme(bits)).nbytes(part.out_features, part.in_features)
        return self.product_seconds(bits, part.out_features, part.in_features, nbytes)
