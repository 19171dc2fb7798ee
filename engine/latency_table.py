"""What one product costs on this machine, from the kept figures of `bench kernels`. Knows shapes and layouts; times nothing, torch-free.

Decoding a token multiplies every matrix once. A matrix of a shape that was not timed takes the time per stored byte of the
nearest timed one of its layout: at batch 1 reading the weights is what costs. Attention and norms are not in it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitpress.engine.accounting import embedding_layout, layout_of
from bitpress.engine.choices import DENSE_BITS, GONE, HEAD_BITS, Choices, Floats, end_scheme
from bitpress.engine.home import home
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Scheme
from bitpress.kernels.layout import DenseLayout, Layout, UniformLayout, layout_from_dict


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
        return LatencyTable.of(json.loads(table_path().read_text(encoding="utf8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class LatencyTable:
    """Layout -> (N, K) -> (seconds, stored bytes) of one product with one row of inputs. Dense is always among them."""

    timed: Mapping[Layout, Mapping[tuple[int, int], tuple[float, int]]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "LatencyTable":
        """The table of the bench's rows. Raises KeyError, ValueError or TypeError for rows that are none, or without dense."""
        timed: dict[Layout, dict[tuple[int, int], tuple[float, int]]] = {DenseLayout(): {}}
        for row in rows:
            if row["batch"] == 1:
                n, k = row["shape"]
                timed.setdefault(layout_from_dict(row["layout"]), {})[int(n), int(k)] = (float(row["p50_s"]), int(row["bytes"]))
        if not timed[DenseLayout()]:
            raise ValueError("The dense baseline is not among the rows.")
        return cls(timed)

    def product_seconds(self, layout: Layout, rows: int, columns: int) -> float:
        """Seconds of one product with a matrix (rows, columns) in a layout."""
        of_layout = self.timed[self._like(layout)]
        n, k = min(of_layout, key=lambda shape: abs(math.log(shape[0] * shape[1] / (rows * columns))))
        seconds, stored = of_layout[n, k]
        return seconds * layout.nbytes(rows, columns) / stored

    def knows(self, layout: Layout) -> bool:
        """Whether this very layout was timed, so that no other stands for it."""
        return bool(self.timed.get(layout))

    def _like(self, layout: Layout) -> Layout:
        """The timed layout that stands for this one: itself, else the least uniform width above it, else dense."""
        if layout in self.timed:
            return layout
        wider = [other for other in self.timed if isinstance(other, UniformLayout) and isinstance(layout, UniformLayout) and other.bits >= layout.bits]
        return min(wider, key=lambda other: other.bits, default=DenseLayout())

    def seconds(self, choices: Choices) -> Floats:
        """Seconds of every item's products under every option [I, J]. The tied embedding is multiplied as the head, an untied one not at all."""
        known: dict[tuple[Layout, int, int], float] = {}

        def product(part: Part, scheme: Scheme) -> float:
            if part.name == choices.anatomy.embedding.name:
                if not choices.anatomy.tied:
                    return 0.0
                layout = embedding_layout(end_scheme(scheme.weights.bits if scheme.weights else DENSE_BITS))
            else:
                layout = layout_of(scheme)
            key = (layout, part.out_features, part.in_features)
            if key not in known:
                known[key] = self.product_seconds(*key)
            return known[key]

        parts = [[choices.anatomy.by_name[name] for name in layers] for layers in choices.items]
        return np.array([[sum(product(part, option.scheme) for part in item) for option in choices.options] for item in parts])

    def token_seconds(self, choices: Choices, choice: NDArray[np.int64]) -> float:
        """Predicted seconds of one token: all products and the head."""
        there = choice != choices.options.index(GONE)
        return float(self.seconds(choices)[np.arange(len(choice)), choice][there].sum()) + self.head_seconds(choices)

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
        return self.product_seconds(embedding_layout(end_scheme(bits)), part.out_features, part.in_features)
