"""Keys and values as a cache of few bits holds them, for scoring: by channel the ones, by token the others. Knows outputs of layers; keeps no cache."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bitpress.engine.kv_cache import decode, encode

CACHE_AXES = {"k": "channel", "v": "token"}  # what shares a scale in the cache of a role's outputs
CACHE_GROUP = 32


def in_cache(y_SLN: Tensor, bits: int, axis: str) -> Tensor:
    """Keys or values [S, L, N] as codes of a cache stand for them: float32, groups of 32 tokens of a channel or 32 channels of a token (METHODS 17.4).

    Keys are taken before they are rotated by position. What fills no group stays as it is; shorter rows are one group.
    """
    rows = y_SLN.float().transpose(1, 2) if axis == "channel" else y_SLN.float()
    size = min(CACHE_GROUP, rows.shape[-1])
    whole = rows.shape[-1] - rows.shape[-1] % size
    groups = rows[..., :whole].unflatten(-1, (-1, size))
    coded = decode(encode(groups, bits), bits, size, torch.float32).flatten(-2)
    made = torch.cat((coded, rows[..., whole:]), dim=-1)
    return made.transpose(1, 2) if axis == "channel" else made


@contextmanager
def cached_outputs(modules: Mapping[str, nn.Module], bits: int) -> Iterator[None]:
    """Let the modules of these roles give what a cache of this width would hold of their outputs."""
    with ExitStack() as stack:
        for role, module in modules.items():
            stack.callback(module.register_forward_hook(partial(_cached_output, bits=bits, axis=CACHE_AXES[role])).remove)
        yield


def _cached_output(_: nn.Module, __: tuple[Tensor, ...], y_SLN: Tensor, bits: int, axis: str) -> Tensor:
    return in_cache(y_SLN, bits, axis).to(y_SLN.dtype)
