"""Low rank in steps that methods share: moments of inputs or outputs -> rank -> two factors. Knows matrices; no models, layers and files.

A matrix W [N, K] becomes A [N, r] times B [r, K]. Methods differ in what they call near: in the root of the moment by
which the error is weighed. The best A B for the error ||(W - A B) S||_F is the truncated decomposition of W S, taken back
through S^-1 (METHODS 17.3). Shape letters: N outputs, K inputs, R the rank.
"""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bitpress.engine.accounting import layout_of
from bitpress.engine.errors import InputError
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import BITS, Scheme, WeightScheme
from bitpress.kernels.layout import PairLayout

FLOOR = 1e-9  # directions of less than this share of the largest moment count as having it: no root is divided by nothing


class Factors(NamedTuple):
    """left [N, r] times right [r, K], float32."""

    left_NR: Tensor
    right_RK: Tensor


class Root(NamedTuple):
    """S and S^-1 of a moment M = S S^T, float64 [K, K]."""

    root_KK: Tensor
    inverse_KK: Tensor


def root_of(moment_KK: Tensor) -> Root:
    """A root by eigenvalues, small ones floored: a Cholesky factor does not exist of a singular moment (METHODS 21).

    moment_KK: symmetric up to rounding, float64. Raises InputError when it is zero: no text reached the layer.
    """
    values_K, vectors_KK = torch.linalg.eigh((moment_KK + moment_KK.t()).double() / 2)
    largest = float(values_K[-1])
    if not largest > 0:
        raise InputError("The weights cannot be factored.", "All inputs of this layer were zero on the calibration text.", "Calibrate on other text.")
    scale_K = values_K.clamp_min(FLOOR * largest).sqrt()
    return Root(vectors_KK * scale_K, (vectors_KK / scale_K).t())


def diagonal_root(scale_K: Tensor) -> Root:
    """The root of a diagonal moment, small entries floored."""
    scale_K = scale_K.double().clamp_min(FLOOR * float(scale_K.max()) or 1.0)
    return Root(scale_K.diag(), scale_K.reciprocal().diag())


def truncate(weight_NK: Tensor, root: Root | None, rank: int) -> Factors:
    """The rank-r product nearest to W in ||(W - A B) S||_F, its singular values shared out by their root between both factors."""
    seen_NK = weight_NK.double() if root is None else weight_NK.double() @ root.root_KK
    left_NR, values_R, right_RK = torch.linalg.svd(seen_NK, full_matrices=False)
    half_R = values_R[:rank].sqrt()
    back_RK = right_RK[:rank] if root is None else right_RK[:rank] @ root.inverse_KK
    return Factors((left_NR[:, :rank] * half_R).float(), (half_R[:, None] * back_RK).float())


def energies(mixed_CC: Tensor, taken_CC: Tensor) -> tuple[Root, Tensor, Tensor]:
    """Of numbers of moment M, read by a matrix W with W^T W = T: a root of T, and in it the directions [C, C] that W x lies in, strongest first.

    The third are what they carry: the squares of those that are left away sum to E ||W (x - P x)||^2, P the best projection of its rank.
    """
    taken = root_of(taken_CC)
    directions_CC, values_C, _ = torch.linalg.svd(taken.root_KK.t() @ root_of(mixed_CC).root_KK)
    return taken, directions_CC, values_C


def project(weight_NK: Tensor, moment_NN: Tensor, rank: int) -> Factors:
    """W on the r principal directions V of its outputs' moment: A = V, B = V^T W (METHODS 9.1, 11.1)."""
    _, vectors_NN = torch.linalg.eigh((moment_NN + moment_NN.t()) / 2)
    basis_NR = vectors_NN[:, -rank:].flip(1)
    return Factors(basis_NR.float(), (basis_NR.t() @ weight_NK.double()).float())


def output_moment(weight_NK: Tensor, moment_KK: Tensor) -> Tensor:
    """W M W^T: the moment of the outputs from that of the inputs, float64 [N, N]."""
    weight = weight_NK.double()
    return weight @ moment_KK.double() @ weight.t()


def lost(weight_NK: Tensor, factors: Factors, moment_KK: Tensor) -> float:
    """E ||(W - A B) x||^2 under a moment of the inputs."""
    gap_NK = weight_NK.double() - factors.left_NR.double() @ factors.right_RK.double()
    return float(((gap_NK @ moment_KK.double()) * gap_NK).sum())


# Methods ---------------------------------------------------------------------------------------------------------


class FactorMethod(LinearMethod):
    """A low-rank method that differs from others only in how it finds the factors."""

    family: ClassVar = "lowrank"
    ability: ClassVar[Ability] = Ability(part="rank", also="weights", bits=BITS)

    @abstractmethod
    def factor(self, weight_NK: Tensor, rank: int, stats: Statistics, options: Any) -> Factors:
        """The factors of one matrix, or of one run of its rows."""

    def of_run(self, stats: Statistics, run: int, runs: int) -> Statistics:
        """What of the statistics is about one run of rows. Where inputs are all that is known, every run has the same."""
        return stats

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
        """Factor one matrix at the scheme's rank; round the factors to nearest where the scheme gives them widths."""
        runs, rank = scheme.rank.latent or 1 if scheme.rank else 1, rank_of(weight_NK, scheme)
        parts = [self.factor(rows_nK, rank // runs, self.of_run(stats, run, runs), options) for run, rows_nK in enumerate(weight_NK.chunk(runs))]
        factors = Factors(torch.block_diag(*(part.left_NR for part in parts)), torch.cat([part.right_RK for part in parts]))
        left, right = (rounded(factor, scheme.weights) for factor in factors)
        made = product(left, right)
        if scheme.rank is None or not scheme.rank.bias:
            return made
        return made._replace(bias_N=((weight_NK - made.weight_NK).double() @ stats["mean"]).float())


def rank_of(weight_NK: Tensor, scheme: Scheme) -> int:
    """The rank that a scheme gives a matrix. Raises ValueError for a scheme without one."""
    layout = layout_of(scheme)
    if not isinstance(layout, PairLayout):
        raise ValueError("a low-rank method was given a scheme without rank")
    return layout.rank(*weight_NK.shape)


def rounded(factor: Tensor, weights: WeightScheme | None) -> Outcome:
    """A factor as it is, or rounded to the nearest levels of a width."""
    if weights is None:
        return Outcome(factor)
    codes = quantize_groups(factor, weights)
    return Outcome(dequantize_groups(codes, weights), codes)


def product(left: Outcome, right: Outcome) -> Outcome:
    """The matrix that two factors stand for."""
    return Outcome(left.weight_NK @ right.weight_NK, notes=(*left.notes, *right.notes), factors=(left, right))


def act(method: LinearMethod, outcome: Outcome, scheme: Scheme, stats: Statistics, options: Any) -> Outcome:
    """Run a method on what the one before it made: on each factor where that is a product, the left one on the inputs that the right one makes."""
    if outcome.factors is None:
        return method.apply(outcome.weight_NK, scheme, stats, options)
    left, right = outcome.factors
    alone = scheme.model_copy(update={"rank": None})
    right = method.apply(right.weight_NK, alone, stats, options)
    left = method.apply(left.weight_NK, alone, _behind(right.weight_NK, stats, method, options), options)
    return product(left, right)._replace(bias_N=outcome.bias_N)


def _behind(right_RK: Tensor, stats: Statistics, method: LinearMethod, options: Any) -> Statistics:
    """Statistics of the inputs of a left factor: those that a Gram matrix of the right one's inputs gives."""
    if not stats:
        return {}
    gram_RR = output_moment(right_RK, stats["gram"])
    known = {"gram": gram_RR, "second_moment": gram_RR.diagonal()}
    if "loss_gram" in stats:
        known["loss_gram"] = output_moment(right_RK, stats["loss_gram"])
    if missing := sorted(method.needs_for(options) - set(known)):
        why = f"It needs {missing[0]} of the inputs, which is not known between two factors."
        raise InputError(f"The method {method.name} cannot quantise the factors of a low-rank matrix.", why, "Use rtn or gptq for these layers.")
    return known
