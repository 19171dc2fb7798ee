"""After a matrix is rounded: codes and grids are mended in turn, as long as the error of the outputs falls. Knows matrices; refuses to know models.

The error is tr(E H E') with E the error of the weights and H the second moments of the inputs, as in GPTQ. With the grids fixed each
code is set to its best level while all others stay, input by input (coordinate descent, as in QuantEase, Behdin et al. 2023, arXiv
2309.01885); with the codes fixed the scales, and the zeros where they are floats, are a least-squares problem for each row.
Shapes: N outputs, K inputs, G groups a row, g inputs a group, U unknowns a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitpress.engine.methods.quantize.pipeline import SCALE_DTYPE, Codes, dequantize_groups, stored_zero, to_groups
from bitpress.engine.recipe import WeightScheme

BLOCK = 64  # inputs whose errors are made up for one by one, before the rest hears of them
RIDGE = 1e-6  # of each unknown's own curvature: two groups of equal inputs would leave the scales open


class Target(NamedTuple):
    """What is to be approached: the dense weights and the second moments that weigh the errors, both float32."""

    weight_NK: Tensor
    gram_KK: Tensor


def target_of(weight_NK: Tensor, gram_KK: Tensor, damping: float) -> Target:
    """Dense weights, and second moments with a share of their mean on the diagonal; an input that is always zero counts alone."""
    diagonal_K = gram_KK.diagonal()
    return Target(weight_NK, (gram_KK + torch.diag(diagonal_K.mean() * damping + (diagonal_K <= 0))).float())


def refine(codes: Codes, target: Target, scheme: WeightScheme, rounds: int, free_NK: Tensor | None = None) -> Codes:
    """Codes of no larger error after so many rounds. free_NK: weights that may differ from zero; None for all."""
    for _ in range(rounds):
        codes = descend(refit(codes, target, scheme), target, scheme, free_NK)
    return refit(codes, target, scheme) if rounds else codes


def errors(codes: Codes, target: Target, scheme: WeightScheme) -> Tensor:
    """The error of each row's outputs: [N]."""
    gap_NK = target.weight_NK - dequantize_groups(codes, scheme)
    return torch.linalg.vecdot(gap_NK @ target.gram_KK, gap_NK)


def descend(codes: Codes, target: Target, scheme: WeightScheme, free_NK: Tensor | None = None) -> Codes:
    """One pass over the inputs, each set to the level of least error while the others stay as they are."""
    made_KN, size = dequantize_groups(codes, scheme).t().contiguous(), scheme.group_size or target.weight_NK.shape[1]
    scale_GN, zero_GN = codes.scales_NG.float().t().contiguous(), zeros_of(codes, scheme).t().contiguous()
    codes_KN, want_KN, diagonal_K = torch.empty_like(made_KN), target.weight_NK.t().contiguous(), target.gram_KK.diagonal().tolist()
    for start in range(0, len(made_KN), BLOCK):
        inside = slice(start, start + BLOCK)
        pull_BN = target.gram_KK[inside] @ (want_KN - made_KN)
        own_BB = target.gram_KK[inside, inside]
        for at in range(len(pull_BN)):
            column = start + at
            scale_N, zero_N = scale_GN[column // size], zero_GN[column // size]
            best_N = made_KN[column] + pull_BN[at] / diagonal_K[column] if diagonal_K[column] > 0 else want_KN[column]
            codes_KN[column] = (best_N / scale_N).add_(zero_N).round_().clamp_(0, 2**scheme.bits - 1)
            if free_NK is not None:
                codes_KN[column] = torch.where(free_NK[:, column], codes_KN[column], zero_N)
            level_N = (codes_KN[column] - zero_N).mul_(scale_N)
            pull_BN.addr_(own_BB[at], level_N - made_KN[column], alpha=-1)
            made_KN[column] = level_N
    return codes._replace(codes_NK=codes_KN.t().to(torch.uint8).contiguous())


def zeros_of(codes: Codes, scheme: WeightScheme) -> Tensor:
    """The zero of every group, float32 [N, G]."""
    return torch.full_like(codes.scales_NG, 2 ** (scheme.bits - 1), dtype=torch.float32) if codes.zeros_NG is None else codes.zeros_NG.float()


def refit(codes: Codes, target: Target, scheme: WeightScheme) -> Codes:
    """The scales, and the zeros where they are floats, of least error for these codes; rows that would not gain stay as they are."""
    scale_NG, zero_NG = codes.scales_NG.float(), zeros_of(codes, scheme)
    steps = to_groups(codes.codes_NK, scheme.group_size).float() - zero_NG.unsqueeze(-1)
    steps *= to_groups(torch.ones_like(target.weight_NK[:1]), scheme.group_size)
    change_NU = _least_squares(steps, target, dequantize_groups(codes, scheme), scheme)
    scale = _stored(scale_NG + change_NU[:, : scale_NG.shape[1]], scale_NG)
    zero = stored_zero(zero_NG - change_NU[:, scale_NG.shape[1] :] / scale, scheme) if scheme.zero == "float" else zero_NG
    made = codes._replace(scales_NG=scale.to(SCALE_DTYPE), zeros_NG=None if codes.zeros_NG is None else zero.to(codes.zeros_NG.dtype))
    better_N1 = (errors(made, target, scheme) < errors(codes, target, scheme))[:, None]
    zeros_NG = None if codes.zeros_NG is None or made.zeros_NG is None else torch.where(better_N1, made.zeros_NG, codes.zeros_NG)
    return codes._replace(scales_NG=torch.where(better_N1, made.scales_NG, codes.scales_NG), zeros_NG=zeros_NG)


def _stored(scale_NG: Tensor, before_NG: Tensor) -> Tensor:
    """Scales as they are stored; one that would not be positive stays what it was."""
    rounded_NG = scale_NG.to(SCALE_DTYPE).float()
    return torch.where(rounded_NG > torch.finfo(torch.float32).tiny, rounded_NG, before_NG)


def _least_squares(steps: Tensor, target: Target, made_NK: Tensor, scheme: WeightScheme) -> Tensor:
    """By how much scales [N, G], and with float zeros the groups' offsets [N, G] too, should change: [N, U].

    steps: [N, G, g], how many steps each weight lies from its zero.
    """
    gap_NK, gram_GgK = target.weight_NK - made_NK, to_groups(target.gram_KK.t(), scheme.group_size).permute(1, 2, 0)
    parts = [steps, torch.ones_like(steps)] if scheme.zero == "float" else [steps]
    normal_UNU, right_UN = [], []
    for part in parts:
        for group in range(part.shape[1]):
            pulled_NK = part[:, group] @ gram_GgK[group]
            pulled = to_groups(pulled_NK, scheme.group_size)
            normal_UNU.append(torch.cat([(pulled * other).sum(-1) for other in parts], dim=1))
            right_UN.append(torch.linalg.vecdot(pulled_NK, gap_NK))
    normal_NUU, right_NU = torch.stack(normal_UNU, dim=1).double(), torch.stack(right_UN, dim=1).double()
    diagonal_NU = normal_NUU.diagonal(dim1=1, dim2=2)
    normal_NUU = normal_NUU + torch.diag_embed(diagonal_NU * RIDGE + (diagonal_NU <= 0))
    return torch.linalg.solve(normal_NUU, right_NU.unsqueeze(-1)).squeeze(-1).float()
