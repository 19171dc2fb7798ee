"""What became of a matrix's weights, as a small file that a reader without torch can draw. Knows one matrix; no model.

`weights/<layer>.json` in a run's folder: {v, layer, edges, before, after, row, first, levels, group_before, group_after}. `before` and `after` are
counts of the weights in equal bins between `edges`. The rest is of one typical group, that of median range: its row, its first input, the
levels that its weights took, and its weights themselves.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BINS = 129  # odd, so that zero is the middle of a bin
MOST_WEIGHTS = 128  # of a group that are written down


def after_record(layer: str, dense_NK: Tensor, made_NK: Tensor, group_size: int) -> dict[str, Any]:
    """The record of a matrix before and after, both float32 [N, K]. group_size: 0 for whole rows."""
    reach = float(torch.maximum(dense_NK.abs().max(), made_NK.abs().max())) or 1.0
    counts = [torch.histc(matrix, BINS, -reach, reach).long().tolist() for matrix in (dense_NK, made_NK)]
    row, first, size = typical_group(dense_NK, group_size)
    inside = slice(first, first + size)
    return {
        "v": 1,
        "layer": layer,
        "edges": _short(torch.linspace(-reach, reach, BINS + 1)),
        "before": counts[0],
        "after": counts[1],
        "row": row,
        "first": first,
        "levels": _short(made_NK[row, inside].unique()),
        "group_before": _short(dense_NK[row, inside][:MOST_WEIGHTS]),
        "group_after": _short(made_NK[row, inside][:MOST_WEIGHTS]),
    }


def typical_group(weight_NK: Tensor, group_size: int) -> tuple[int, int, int]:
    """Row, first input and size of the group whose range is the median; short last groups are left out."""
    size = min(group_size or weight_NK.shape[1], weight_NK.shape[1])
    groups = weight_NK[:, : weight_NK.shape[1] // size * size].unflatten(1, (-1, size))
    low_NG, high_NG = groups.aminmax(dim=-1)
    place = int((high_NG - low_NG).flatten().median(dim=0).indices)
    return place // groups.shape[1], place % groups.shape[1] * size, size


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


@torch.no_grad()
def write_after(folder: Path, layer: str, dense_NK: Tensor, made_NK: Tensor, group_size: int) -> None:
    """Write a layer's record under a run's folder, whole or not at all."""
    path = folder / "weights" / f"{layer}.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(after_record(layer, dense_NK, made_NK, group_size)), encoding="utf8")
    partial.replace(path)
