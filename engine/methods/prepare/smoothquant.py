"""SmoothQuant: outliers of the activations are moved into the weights, so that both fit into 8 bits (METHODS 15.4)."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.base import MethodOptions, ScalingMethod, Statistics
from bitpress.engine.recipe import Scheme

LEAST = 1e-5  # of a peak and of a factor


class SmoothQuantOptions(MethodOptions):
    """How much is moved."""

    alpha: float = Field(
        default=0.5, ge=0.0, le=1.0, title="Migration strength",
        description="0 leaves the activations as they are, 1 makes all their channels equally large. 0.5 shares the outliers.",
    )  # fmt: skip


class SmoothQuant(ScalingMethod):
    """Factors from the largest activation and the largest weight of each channel, behind norms."""

    name = "smoothquant"
    title = "SmoothQuant"
    family = "prepare"
    summary = "Prepares for rounding weights and activations: large activations are scaled down and their weights up. Reads the text once."
    citation = "Xiao et al. 2023, SmoothQuant: accurate and efficient post-training quantization for large language models, arXiv 2211.10438."
    cost = "Seconds beside one pass over the calibration text."
    use_when = "Choose it with `activations: {bits: 8}` and one 8-bit scale a row, before rounding to nearest."
    needs = frozenset({"peak"})
    Options = SmoothQuantOptions

    def scale(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Statistics, options: SmoothQuantOptions) -> Tensor:
        """max|x_j|^alpha / max|W_j|^(1 - alpha), over all readers."""
        weights_K = torch.stack([weight_NK.abs().amax(0) for weight_NK in weights]).amax(0).double()
        scale_K = stats["peak"].clamp(min=LEAST).pow(options.alpha) / weights_K.clamp(min=LEAST).pow(1 - options.alpha)
        return scale_K.clamp(min=LEAST)
