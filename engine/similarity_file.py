"""`similarity.json` of a run: how alike its model's tokens are, dense and compressed. Knows the file; imports no torch.

`{kind: {side: {"mean": cosine, "share": [of pairs in each bin]}}}`, kinds "embedding" and "last state", sides "dense" and "compressed";
the bins cut -1..1 evenly. `engine.similarity` measures it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "similarity.json"
SIDES = ("dense", "compressed")


@dataclass(frozen=True)
class Alike:
    """Cosines of random pairs of tokens on one side: their mean, and the share of the pairs in each bin from -1 to 1."""

    mean: float
    share: tuple[float, ...]

    @property
    def centres(self) -> list[float]:
        """The middle of each bin."""
        width = 2 / len(self.share)
        return [round(-1 + width * (number + 0.5), 6) for number in range(len(self.share))]


def read_similarity(run_folder: Path) -> dict[str, dict[str, Alike]]:
    """What a run has written, by kind and side; nothing where there is no such file, or one that cannot be read."""
    try:
        values = json.loads((Path(run_folder) / FILE).read_text(encoding="utf8"))
        return {kind: {side: _alike(sides[side]) for side in SIDES} for kind, sides in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _alike(values: dict[str, Any]) -> Alike:
    return Alike(float(values["mean"]), tuple(float(share) for share in values["share"]))
