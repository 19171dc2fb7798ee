"""AWQ: inputs that are large on average get finer steps, by a factor that moves into the module before them (METHODS 15.3).

The published search compares the outputs of whole attention and MLP modules; here the outputs of the linears that share
the inputs are compared, which the second moments of the inputs give exactly, over all tokens and without a forward.
Shapes: N outputs, K inputs, G groups a row, g inputs a group.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.base import MethodOptions, ScalingMethod, Statistics
from bitpress.engine.methods.quantize.nf4 import Nf4
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, from_groups, quantize_groups, to_groups
from bitpress.engine.recipe import Scheme, WeightScheme

LEAST = 1e-4  # of a factor, before the factors are centred
CLIP_STEPS = 10


class AwqOptions(MethodOptions):
    """The search for factors and for the largest weights."""

    steps: int = Field(
        default=20, ge=2, le=100, title="Strengths tried",
        description="The factor is the inputs' mean size to a power from 0 up to, but not, 1; this many powers are tried.",
    )  # fmt: skip
    inner: bool = Field(
        default=True, title="Scale inside the block too",
        description="Also scale between v and o, tied over the query heads that share a value head, and between up and down.",
    )  # fmt: skip
    clip: bool = Field(
        default=True, title="Clip large weights",
        description="Cut the largest weights of each group, down to half, where that lowers the error of the outputs. Not for q and k.",
    )  # fmt: skip


class Awq(ScalingMethod):
    """Activation-aware factors, then clipping; the rounding itself is the next stage's."""

    name = "awq"
    title = "AWQ"
    family = "prepare"
    summary = "Prepares for rounding: channels with large inputs are scaled up, and the module before them down, so that they lose less. Reads the text once."
    citation = "Lin et al. 2024, AWQ: activation-aware weight quantization for LLM compression and acceleration, arXiv 2306.00978."
    cost = "About a minute for 135 million weights on two cores; grows with the calibration text and the strengths tried."
    use_when = "Choose it before rounding to nearest or GPTQ at 3 and 4 bits; at 8 bits there is nothing to gain."
    needs = frozenset({"gram", "mean_abs"})
    Options = AwqOptions

    def kinds(self, options: AwqOptions) -> frozenset[str]:
        """All links, or only those behind a norm."""
        return frozenset({"norm", "v", "up"} if options.inner else {"norm"})

    def scale(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], stats: Statistics, options: AwqOptions) -> Tensor:
        """The power of the inputs' mean size that leaves the least error in the outputs of all readers."""
        best_K, least = torch.ones_like(stats["mean_abs"]), float("inf")
        for step in range(options.steps):
            scale_K = centred(stats["mean_abs"], step / options.steps)
            error = sum(_scaled_error(weight_NK, scheme, scale_K, stats["gram"]) for weight_NK, scheme in zip(weights, schemes, strict=True))
            if error < least:
                best_K, least = scale_K, error
        return best_K

    def limits(self, weight_NK: Tensor, scheme: Scheme, gram_KK: Tensor, role: str, options: AwqOptions) -> Tensor | None:
        """For each group the share of its largest weight that leaves the least error in the outputs that the group adds to."""
        if not options.clip or scheme.weights is None or role in ("q", "k", "qkv"):
            return None
        size = scheme.weights.group_size
        groups, blocks_Ggg = to_groups(weight_NK, size), gram_blocks(gram_KK, size)
        largest_NG1 = groups.abs().amax(-1, keepdim=True)
        best_NG1, least_NG1 = largest_NG1, torch.full_like(largest_NG1, torch.inf)
        for step in range(CLIP_STEPS):
            limit_NG1 = largest_NG1 * (1 - step / (2 * CLIP_STEPS))
            cut_NK = from_groups(torch.minimum(torch.maximum(groups, -limit_NG1), limit_NG1), weight_NK.shape)
            gap = to_groups(rounded(cut_NK, scheme.weights) - weight_NK, size)
            error_NG1 = (torch.einsum("ngi,gij->ngj", gap, blocks_Ggg) * gap).sum(-1, keepdim=True)
            better = error_NG1 < least_NG1
            best_NG1, least_NG1 = torch.where(better, limit_NG1, best_NG1), torch.where(better, error_NG1, least_NG1)
        return best_NG1.squeeze(-1)


def centred(size_K: Tensor, power: float) -> Tensor:
    """size**power over the root of its largest times its smallest value, so that factors lie on both sides of 1."""
    scale_K = size_K.double().pow(power).clamp(min=LEAST)
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def rounded(weight_NK: Tensor, scheme: WeightScheme) -> Tensor:
    """What rounding to nearest makes of a matrix in the scheme's format; binary codes are stood in for by even levels of as many bits."""
    if scheme.format in ("nf4", "fp4"):
        return Nf4().apply(weight_NK, Scheme(weights=scheme.model_copy(update={"format": "nf4"})), {}, MethodOptions()).weight_NK
    plain = scheme.model_copy(update={"format": "uniform", "zero": "integer"})
    return dequantize_groups(quantize_groups(weight_NK, plain), plain)


def gram_blocks(gram_KK: Tensor, group_size: int) -> Tensor:
    """The second moments inside each group: float32 [G, g, g], zeros behind a short last group."""
    width = len(gram_KK)
    size = group_size or width
    blocks_Ggg = torch.zeros(-(-width // size), size, size)
    for group, start in enumerate(range(0, width, size)):
        part = gram_KK[start : start + size, start : start + size]
        blocks_Ggg[group, : len(part), : len(part)] = part
    return blocks_Ggg


def _scaled_error(weight_NK: Tensor, scheme: Scheme, scale_K: Tensor, gram_KK: Tensor) -> float:
    """Squared error of the outputs after rounding the scaled weights; 0 for a matrix that stays dense."""
    if scheme.weights is None:
        return 0.0
    scale_K = scale_K.float()
    gap_NK = rounded(weight_NK * scale_K, scheme.weights) / scale_K - weight_NK
    return float(((gap_NK @ gram_KK.float()) * gap_NK).sum(dtype=torch.float64))
