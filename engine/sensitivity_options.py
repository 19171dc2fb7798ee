"""What an option makes of a matrix, by the plain method of its part, and how far that is from what was there. Knows matrices; no model."""

from collections.abc import Mapping

from torch import Tensor

from bitpress.engine.methods import registry
from bitpress.engine.recipe import Scheme, WeightScheme

METHOD_OF = {"weights": "rtn", "sparsity": "magnitude"}


def rows_scheme(bits: int) -> Scheme:
    """What embeddings and heads become: one symmetric scale a row."""
    return Scheme(weights=WeightScheme(bits=bits, group_size=0, symmetric=True))


def made_of(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """The matrix under a scheme, by the plain method of its part: float32 [N, K]."""
    method = registry.linear(METHOD_OF["weights" if scheme.weights else "sparsity"])
    return method.apply(weight_NK, scheme, {}, method.parse({})).weight_NK


def weighted_errors(weight_NK: Tensor, made_NK: Tensor, weights_K: Mapping[str, Tensor]) -> dict[str, float]:
    """sum_ij v_j D_ij^2 / sum_ij v_j W_ij^2 for every column weighting v [K]; 0 for a matrix without weight."""
    error_K, whole_K = (weight_NK - made_NK).square_().sum(dim=0), weight_NK.square().sum(dim=0)
    totals = {kind: (float(v_K @ error_K), float(v_K @ whole_K)) for kind, v_K in weights_K.items()}
    return {kind: error / whole if whole > 0 else 0.0 for kind, (error, whole) in totals.items()}
