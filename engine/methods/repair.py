"""What the last matrix of a sublayer does for the features that went: a bias, a scale a unit, a least-squares fit. Knows matrices; no models.

Shape letters: F features of the sublayer as it was, K those kept, d outputs, U kept units, M tokens.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Repairing = Literal["none", "bias", "rescale", "least_squares", "catch_up"]
FITS: tuple[Repairing, ...] = ("least_squares", "catch_up")  # they differ in what the sublayer should add: what it lost, or that and what was lost below
RIDGE = 0.01  # of each feature's own energy, towards the weights as they were: text is short, and features hang together
RIDGES = (0.01, 0.1, 1.0, 10.0)  # tried on text that the fit has not seen, where there is enough of it
HELD_OUT = 4  # every so manieth batch is not fitted but judges
LARGEST_SCALE = 10.0  # a rescaling beyond it is worse than none


class Sums(NamedTuple):
    """Of a sublayer's features x and of what it should add y, over all tokens, weighed: X^T X, X^T Y, and the mean of x."""

    gram_FF: Tensor
    cross_Fd: Tensor
    mean_F: Tensor


def sums_of(features: list[Tensor], wanted: list[Tensor], weights: list[Tensor]) -> Sums:
    """Accumulated in float64 from float32 products, a batch at a time. weights: how much each token counts, [B, L] a batch, such as of `as_normed`."""
    width, weight = features[0].shape[-1], 0.0
    gram_FF, cross_Fd = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, wanted[0].shape[-1], dtype=torch.float64)
    total_F = torch.zeros(width, dtype=torch.float64)
    for x_BLF, y_BLd, weight_BL in zip(features, wanted, weights, strict=True):
        root_M1 = weight_BL.reshape(-1, 1).sqrt()
        x_MF, y_Md = root_M1 * x_BLF.flatten(0, 1).float(), root_M1 * y_BLd.flatten(0, 1).float()
        gram_FF += (x_MF.t() @ x_MF).double()
        cross_Fd += (x_MF.t() @ y_Md).double()
        total_F += (root_M1 * x_MF).sum(0, dtype=torch.float64)
        weight += float(root_M1.square().sum(dtype=torch.float64))
    return Sums(gram_FF, cross_Fd, total_F / weight)


def judging(features: list[Tensor], wanted: list[Tensor], weights: list[Tensor]) -> Sums | None:
    """The sums over every fourth batch alone; None when there are fewer than four."""
    parts = [every[HELD_OUT - 1 :: HELD_OUT] for every in (features, wanted, weights)]
    return sums_of(*parts) if parts[0] else None


def as_normed(goal: list[Tensor]) -> list[Tensor]:
    """A token weighs 1 over the mean square of the residual stream that is to come out, [B, L, d] a batch: what reads the stream norms it first.

    Unweighed, a causal model's first token, whose stream may be a hundred times as long as any other's, is all that a fit looks at. (Encoders norm
    the stream itself.)
    """
    return [inverse_root(goal_BLd)[..., 0].square() for goal_BLd in goal]


def inverse_root(stream_d: Tensor) -> Tensor:
    """What a norm multiplies a token by: 1 over the root of the mean square, float32 [..., 1]."""
    return stream_d.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def repaired(how: Repairing, weight_dF: Tensor, kept_F: Tensor, groups_F: Tensor, sums: Sums, held: Sums | None = None) -> tuple[Tensor, Tensor | None]:
    """(the last matrix for the kept features, a bias to add or None). groups_F: the kept unit that each kept feature belongs to. held: of `judging`."""
    weight_dK = weight_dF[:, kept_F]
    if how in FITS:
        return (least_squares(kept_F, sums, weight_dK) if held is None else judged_fit(kept_F, sums, held, weight_dK)), None
    if how == "rescale":
        return weight_dK * rescaling(weight_dF, kept_F, groups_F, sums)[groups_F].to(weight_dF.dtype), None
    if how == "bias":
        gone_F = torch.ones(weight_dF.shape[1], dtype=torch.bool)
        gone_F[kept_F] = False
        return weight_dK, (weight_dF[:, gone_F].double() @ sums.mean_F[gone_F]).to(weight_dF.dtype)
    return weight_dK, None


def least_squares(kept_F: Tensor, sums: Sums, fallback_dK: Tensor, ridge: float = RIDGE) -> Tensor:
    """The matrix that brings the kept features nearest to what the sublayer should add (KPWT; METHODS 2.2).

    Solves for the change of the weights, held near zero by a ridge: with fewer tokens than features the plain solution fits the text
    and nothing else.
    """
    gram_KK = sums.gram_FF[kept_F][:, kept_F]
    diagonal_K = gram_KK.diagonal()
    damped_KK = gram_KK + torch.diag(ridge * diagonal_K + 1e-9 * diagonal_K.mean())
    lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if failed:
        return fallback_dK
    old_Kd = fallback_dK.t().double()
    change_Kd = torch.cholesky_solve(sums.cross_Fd[kept_F] - gram_KK @ old_Kd, lower_KK)
    return (old_Kd + change_Kd).t().to(fallback_dK.dtype)


def judged_fit(kept_F: Tensor, sums: Sums, held: Sums, old_dK: Tensor) -> Tensor:
    """The fit whose ridge did best on held-out text, made anew on all of it; the old weights where no fit was better than they.

    What comes from below is wrong in ways that no feature tells, and a plain fit learns them by heart.
    """
    fitted = Sums(sums.gram_FF - held.gram_FF, sums.cross_Fd - held.cross_Fd, sums.mean_F)
    errors = {ridge: error_of(least_squares(kept_F, fitted, old_dK, ridge), kept_F, held) for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    return least_squares(kept_F, sums, old_dK, best) if errors[best] < error_of(old_dK, kept_F, held) else old_dK


def error_of(weight_dK: Tensor, kept_F: Tensor, sums: Sums) -> float:
    """Weighed squared error of a last matrix, less what no matrix changes."""
    weight_dK = weight_dK.double()
    return float(((weight_dK @ sums.gram_FF[kept_F][:, kept_F]) * weight_dK).sum() - 2 * (weight_dK.t() * sums.cross_Fd[kept_F]).sum())


def rescaling(weight_dF: Tensor, kept_F: Tensor, groups_F: Tensor, sums: Sums) -> Tensor:
    """One scale a kept unit, [U], nearest to 1 (Kwon et al. 2022; METHODS E); ones when a scale would be beyond 10."""
    weight_dK, count = weight_dF[:, kept_F].double(), int(groups_F.max()) + 1
    belongs_KU = torch.nn.functional.one_hot(groups_F, count).double()
    inner_KK = (weight_dK.t() @ weight_dK) * sums.gram_FF[kept_F][:, kept_F]
    inner_UU = belongs_KU.t() @ inner_KK @ belongs_KU
    goal_U = belongs_KU.t() @ (weight_dK.t() * sums.cross_Fd[kept_F]).sum(1)
    wanted_U = goal_U - inner_UU.sum(1)
    change_U = torch.linalg.solve(inner_UU.t() @ inner_UU + torch.eye(count, dtype=torch.float64), inner_UU.t() @ wanted_U)
    scale_U = 1 + change_U
    return torch.ones_like(scale_U) if not scale_U.isfinite().all() or scale_U.abs().max() > LARGEST_SCALE else scale_U
