"""Weights that are rounded anew at every training step: levels, gradients, starts (METHODS 12.2, 15.12). Knows groups of weights; no losses.

Every quantiser here has evenly spaced levels q = s * m with m a whole number from `low` to `top`, so what it trains is stored as symmetric
uniform codes. They differ in what is learned and in the gradient of the step s:

  - dynamic (QuantGPT, Tao et al. 2022, section 3.2): s = gamma * mean|w| / top, gamma learned, mean|w| of the moment without a gradient;
  - LSQ (Esser et al. 2020, section 2.1): s learned, its gradient times 1 / sqrt(weights * top);
  - PACT (Choi et al. 2018, section 3): s = clip / top, the clip learned from the clipped weights alone.

Rounding is the identity in the backward pass. Shapes: R groups, g weights a group; a factor is [R, 1], or [1, 1] for the whole matrix.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitpress.engine.methods.quantize.pipeline import SCALE_DTYPE

TRIED = 40  # steps tried for a start of least error, from the widest down to a fortieth of it
QUANTISERS = ("dynamic", "lsq", "pact")


class Levels(NamedTuple):
    """Whole multiples of the step that are levels, `low` and `top` included."""

    low: int
    top: int

    @property
    def number(self) -> int:
        """How many there are."""
        return self.top - self.low + 1


def levels_of(quantiser: str, bits: int) -> Levels:
    """-k..k with k = 2**(bits - 1) - 1, three levels at 2 bits; LSQ has the lowest code too."""
    half = 2 ** (bits - 1)
    return Levels(-half if quantiser == "lsq" else 1 - half, half - 1)


class Rounded(torch.autograd.Function):
    """q = s * clamp(round(w / s), low, top), half to even.

    With g = dL/dq and inside = (low <= w / s <= top): dL/dw = g * inside, and dL/ds the sum over the group of g times q/s outside and
    (q - w)/s inside. `clipped_only` leaves the latter out.
    """

    @staticmethod
    def forward(ctx: Any, w_Rg: Tensor, s_R1: Tensor, levels: Levels, clipped_only: bool) -> Tensor:
        """w_Rg float32, s_R1 positive. Returns q [R, g]."""
        ratio_Rg = w_Rg / s_R1
        whole_Rg = ratio_Rg.round().clamp_(levels.low, levels.top)
        inside_Rg = (ratio_Rg >= levels.low) & (ratio_Rg <= levels.top)
        pull_Rg = torch.where(inside_Rg, torch.zeros_like(whole_Rg) if clipped_only else whole_Rg - ratio_Rg, whole_Rg)
        ctx.save_for_backward(inside_Rg, pull_Rg)
        return whole_Rg * s_R1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of w [R, g] and s [R, 1]."""
        inside_Rg, pull_Rg = ctx.saved_tensors
        return grads[0] * inside_Rg, torch.linalg.vecdot(grads[0], pull_Rg)[:, None], None, None


def stored(s_R1: Tensor) -> Tensor:
    """The step as it will be stored, rounded to bfloat16; 1 for a group of zeros. Its gradient is that of the identity."""
    tiny = torch.finfo(torch.float32).tiny
    kept = s_R1.detach().to(SCALE_DTYPE).float()
    return s_R1 + (torch.where(kept >= tiny, kept, 1.0) - s_R1).detach()


def at_least(factor: Tensor, least: float) -> Tensor:
    """The factor, or `least` where it is smaller; its gradient is that of the identity, so it can rise again."""
    return factor + (factor.clamp(min=least) - factor).detach()


def step_of(quantiser: str, factor: Tensor, w_Rg: Tensor, levels: Levels) -> Tensor:
    """s [R, 1] before it is rounded. factor: gamma, LSQ's step or PACT's clip, [R, 1] or [1, 1]."""
    match quantiser:
        case "dynamic":
            return factor * w_Rg.detach().abs().mean(dim=1, keepdim=True) / levels.top
        case "lsq":
            return _scaled_gradient(factor, (w_Rg.numel() / factor.numel() * levels.top) ** -0.5).expand(len(w_Rg), 1)
        case "pact":
            return (factor / levels.top).expand(len(w_Rg), 1)
    raise ValueError(f"there is no quantiser {quantiser!r}; they are {', '.join(QUANTISERS)}")


def _scaled_gradient(value: Tensor, scale: float) -> Tensor:
    return value * scale + (value - value * scale).detach()


def rounded(quantiser: str, w_Rg: Tensor, s_R1: Tensor, levels: Levels) -> Tensor:
    """The weights as they would be stored, [R, g], with the quantiser's gradients; s_R1 from `stored`."""
    return Rounded.apply(w_Rg, s_R1, levels, quantiser == "pact")


def factor_of(quantiser: str, s_R1: Tensor, w_Rg: Tensor, levels: Levels, whole: bool) -> Tensor:
    """The factor that gives about these steps: [R, 1], or with `whole` one for the matrix, [1, 1]."""
    if quantiser == "dynamic":
        means_R1 = w_Rg.abs().mean(dim=1, keepdim=True)
        gamma_R1 = torch.where(means_R1 > 0, s_R1 * levels.top / means_R1, 1.0)
        return gamma_R1.mean(dim=0, keepdim=True) if whole else gamma_R1
    factor_R1 = s_R1 if quantiser == "lsq" else s_R1 * levels.top
    return factor_R1.mean(dim=0, keepdim=True) if whole else factor_R1


def start_step(quantiser: str, w_Rg: Tensor, levels: Levels, least_error: bool) -> Tensor:
    """s [R, 1] before the first step: of least squared error in its group, else the papers' (gamma 1; LSQ 2 mean|w| / sqrt(top))."""
    if least_error:
        return least_error_step(w_Rg, levels)
    means_R1 = w_Rg.abs().mean(dim=1, keepdim=True)
    return 2 * means_R1 * levels.top**-0.5 if quantiser == "lsq" else means_R1 / levels.top


def least_error_step(w_Rg: Tensor, levels: Levels) -> Tensor:
    """Of `TRIED` steps down from the one that reaches the largest weight, that of least squared error; the widest wins a tie."""
    widest_R1 = w_Rg.abs().amax(dim=1, keepdim=True) / levels.top
    best_R1, best_error_R1 = widest_R1, _error(w_Rg, widest_R1, levels)
    for number in range(1, TRIED):
        trial_R1 = widest_R1 * (1 - number / TRIED)
        error_R1 = _error(w_Rg, trial_R1, levels)
        best_R1 = torch.where(error_R1 < best_error_R1, trial_R1, best_R1)
        best_error_R1 = torch.minimum(error_R1, best_error_R1)
    return best_R1


def _error(w_Rg: Tensor, s_R1: Tensor, levels: Levels) -> Tensor:
    safe_R1 = stored(s_R1)
    return ((w_Rg / safe_R1).round_().clamp_(levels.low, levels.top).mul_(safe_R1) - w_Rg).square_().sum(dim=1, keepdim=True)
