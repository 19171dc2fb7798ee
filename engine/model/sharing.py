"""Blocks that hold one set of matrices together, each with a thin product of its own beside it. Knows modules; refuses to know why."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.engine.errors import InputError
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy, Part

LEFT, RIGHT = "left", "right"


class SharedLinear(nn.Module):
    """y = x W^T + (x R^T) L^T + b. W is one parameter of several layers; L [N, r], R [r, K] and b are this one's own.

    weight: the shared [N, K]. left, right: None where this layer is the shared matrix and nothing else.
    """

    def __init__(self, weight: nn.Parameter, bias: Tensor | None, left: Tensor | None, right: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.rank = 0 if right is None else len(right)
        for name, own in (("bias", bias), (LEFT, left), (RIGHT, right)):
            self.register_parameter(name, None if own is None else nn.Parameter(own.detach(), requires_grad=False))

    bias: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] in the weights' type. Returns [..., N]."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.right is None or self.left is None else y + F.linear(F.linear(x, self.right), self.left)

    def extra_repr(self) -> str:
        """Shape and rank, for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, shared, rank {self.rank} of its own"


def layers_together(anatomy: Anatomy, groups: Iterable[Iterable[int]]) -> list[list[Part]]:
    """For every group of blocks and every linear of a block, the parts that share one matrix; the first holds it."""
    found = []
    for group in groups:
        blocks = [anatomy.of_block(block) for block in group]
        found += [list(parts) for parts in zip(*blocks, strict=True)]
    return found


def share(model: nn.Module, together: list[list[Part]], places: Mapping[str, str]) -> None:
    """Let the layers of each list hold the weight of its first. Factors that a layer has been given (`left`, `right`) become its own.

    places: where each layer is in the model. Raises InputError for a layer that is no plain linear.
    """
    for parts in together:
        first = surgery.get(model, places[parts[0].name])
        for part in parts:
            own = surgery.get(model, places[part.name])
            if not isinstance(own, nn.Linear) or not isinstance(first, nn.Linear | SharedLinear):
                raise InputError("These blocks cannot share their matrices.", f"{part.name} is a {type(own).__name__}.", "Choose a Llama-like model.")
            assert isinstance(first.weight, nn.Parameter)
            made = SharedLinear(first.weight, own.bias, getattr(own, LEFT, None), getattr(own, RIGHT, None))
            surgery.replace(model, places[part.name], made)


def common_matrix(weights: list[Tensor], moments: list[Tensor]) -> Tensor:
    """The one matrix nearest to several on their own inputs: argmin_M sum ||(W_l - M) S_l||^2 = (sum W_l C_l)(sum C_l)^-1, float32 [N, K].

    moments: C_l = S_l S_l^T, float64 [K, K]; a thousandth of their mean diagonal is added, so that directions which no input has get the mean.
    """
    damped = [moment_KK + 1e-3 * moment_KK.diagonal().mean() * torch.eye(len(moment_KK), dtype=torch.float64) for moment_KK in moments]
    right_NK = sum((weight.double() @ moment for weight, moment in zip(weights, damped, strict=True)), torch.zeros((), dtype=torch.float64))
    return torch.linalg.solve(sum(damped[1:], damped[0]), right_NK, left=False).float()
