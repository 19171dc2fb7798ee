"""Where the zeros of a pruned matrix are, as a small file that a reader without torch can draw. Knows one matrix; no model.

`masks/<layer>.json` in a run's folder: {v, layer, shape, zeros, before, after, share, corner}. `before` and `after` are the mean |w| of patches of
the matrix, `share` the share of zeros in them, rows of at most 48 by 64 patches; `corner` the first rows and inputs, "1" for a weight that stays.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PATCHES = (48, 64)
CORNER = (24, 48)


def mask_record(layer: str, dense_NK: Tensor, made_NK: Tensor) -> dict[str, Any]:
    """The record of a matrix before and after pruning."""
    gone_NK = made_NK == 0
    corner = gone_NK[: CORNER[0], : CORNER[1]]
    return {
        "v": 1,
        "layer": layer,
        "shape": list(made_NK.shape),
        "zeros": float(gone_NK.float().mean()),
        "before": _patches(dense_NK.abs()),
        "after": _patches(made_NK.abs()),
        "share": _patches(gone_NK),
        "corner": ["".join("0" if gone else "1" for gone in row) for row in corner.tolist()],
    }


def _patches(value_NK: Tensor) -> list[list[float]]:
    rows, columns = (min(size, most) for size, most in zip(value_NK.shape, PATCHES, strict=True))
    mean = F.adaptive_avg_pool2d(value_NK.float()[None, None], (rows, columns))[0, 0]
    return [[float(f"{value:.4g}") for value in row] for row in mean.tolist()]


@torch.no_grad()
def write_mask(folder: Path, layer: str, dense_NK: Tensor, made_NK: Tensor) -> None:
    """Write a layer's record under a run's folder, whole or not at all."""
    path = folder / "masks" / f"{layer}.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(mask_record(layer, dense_NK, made_NK)))
    partial.replace(path)
