"""Activations of few bits, rounded as they come: one symmetric scale a row (token). Knows rows of numbers; no weights."""

import torch
from torch import Tensor

ACTIVATION_BITS = (8, 4)


def quantize_rows(x_MK: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Activations of `bits` bits, one symmetric scale a row: (whole numbers as float32 [M, K], scales float32 [M, 1]).

    scale = max|x| / (2**(bits - 1) - 1), nearest level, half to even. A row that is not finite keeps a scale that is not.
    """
    top = 2 ** (bits - 1) - 1
    scale_M1 = x_MK.float().abs().amax(dim=1, keepdim=True) / top
    levels_MK = (x_MK.float() / torch.where(scale_M1 > 0, scale_M1, 1.0)).round()
    return levels_MK, scale_M1
