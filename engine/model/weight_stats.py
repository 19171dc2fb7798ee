"""What one weight matrix looks like: its histogram, its spectrum, and how rounding to each width would hurt it. Knows matrices only.

The record of a layer, as `stats/<layer name>.json` holds it:

    {"v": 1, "layer", "role", "block", "shape": [outputs, inputs],
     "min", "max", "mean", "std",
     "kurtosis":       fourth moment over squared variance; 3 for a normal distribution,
     "outlier_share":  share of weights more than 4 standard deviations from the mean,
     "histogram":      {"edges": [66 numbers], "counts": [65 whole numbers]}, symmetric about zero,
     "spectrum":       {"index": [...], "value": [...], "energy": [...]}: up to 64 singular values spread over all of them, largest
                       first; index counts from 1, value is relative to the largest, energy the share of the squared norm up to it,
     "error_by_bits":  {"2": ..., "8": ...}: |W - rounded W| / |W| (Frobenius) for round-to-nearest, asymmetric, groups of 64}
"""

from typing import Any

import torch
from torch import Tensor

from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import BITS, WeightScheme

BINS = 65  # odd, so that zero is the middle of a bin
POINTS = 64
OUTLIER = 4.0
GROUP_SIZE = 64


def matrix_stats(weight_NK: Tensor) -> dict[str, Any]:
    """The numbers of the record above for one matrix, float32 [N, K]."""
    return {**moments(weight_NK), "histogram": histogram(weight_NK), "spectrum": spectrum(weight_NK), "error_by_bits": error_by_bits(weight_NK)}


def moments(weight_NK: Tensor) -> dict[str, float]:
    """Range, mean, deviation, kurtosis (0 for a constant matrix) and share of outliers."""
    std, mean = (value.item() for value in torch.std_mean(weight_NK, correction=0))
    centred = weight_NK - mean
    kurtosis = centred.square().square_().mean().item() / std**4 if std**4 else 0.0
    outliers = (centred.abs_() > OUTLIER * std).float().mean().item()
    low, high = (value.item() for value in weight_NK.aminmax())
    figures = {"min": low, "max": high, "mean": mean, "std": std, "kurtosis": kurtosis, "outlier_share": outliers}
    return {key: _short(value) for key, value in figures.items()}


def histogram(weight_NK: Tensor) -> dict[str, list[Any]]:
    """Counts of BINS equal bins between plus and minus the largest magnitude."""
    reach = weight_NK.abs().max().item() or 1.0
    counts = torch.histc(weight_NK, BINS, -reach, reach)
    edges = torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64)
    return {"edges": [_short(edge) for edge in edges.tolist()], "counts": [int(count) for count in counts.tolist()]}


def spectrum(weight_NK: Tensor) -> dict[str, list[Any]]:
    """Singular values from the smaller Gram matrix, in float64 because squaring halves the digits."""
    thin = weight_NK if weight_NK.shape[0] <= weight_NK.shape[1] else weight_NK.t()
    squares = torch.linalg.eigvalsh(_gram(thin)).flip(0).clamp_min_(0)
    energy = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
    values = (squares / squares[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    places = torch.linspace(0, len(squares) - 1, min(POINTS, len(squares))).round().long()
    return {
        "index": (places + 1).tolist(),
        "value": [_short(value) for value in values[places].tolist()],
        "energy": [_short(value) for value in energy[places].tolist()],
    }


def _gram(thin: Tensor) -> Tensor:
    exact = thin.double()
    return exact @ exact.t()


def error_by_bits(weight_NK: Tensor) -> dict[str, float]:
    """Relative error of round-to-nearest at every width that a format has; 0 for a matrix of zeros."""
    norm = weight_NK.norm().item() or 1.0
    schemes = {str(bits): WeightScheme(bits=bits, group_size=GROUP_SIZE) for bits in BITS}
    return {bits: _short((_rounded(weight_NK, scheme) - weight_NK).norm().item() / norm) for bits, scheme in schemes.items()}


def _rounded(weight_NK: Tensor, scheme: WeightScheme) -> Tensor:
    return dequantize_groups(quantize_groups(weight_NK, scheme), scheme)


def _short(value: float) -> float:
    """Six significant digits: the files stay small and no screen shows more."""
    return float(f"{value:.6g}")
