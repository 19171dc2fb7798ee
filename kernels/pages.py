"""Puts large tensors on large memory pages, where the system has them. Knows bytes only.

A matrix is read once a token: of ordinary pages a core then looks up a thousand addresses, each a walk through memory of its own,
which costs about a tenth of the time of a product. Where nothing can be done the tensor stays where it was.
"""

import mmap
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

LINE = 64
PAGE = 2 << 20
LEAST = 2 * PAGE  # a smaller tensor may not hold one whole page
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def on_large_pages(values: Tensor) -> Tensor:
    """The same values, copied to large pages when there is enough of them and the system offers such pages."""
    if ADVICE is None or values.device.type != "cpu" or values.nbytes < LEAST:
        return values
    room = mmap.mmap(-1, values.nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # fresh: the first write makes a page
    try:
        room.madvise(ADVICE)
    except OSError:
        return values
    bytes_ = torch.frombuffer(room, dtype=torch.uint8)
    start = -bytes_.data_ptr() % PAGE
    return bytes_[start : start + values.nbytes].view(values.dtype).view(values.shape).copy_(values)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as parts of one stretch of large pages; those large enough for pages of their own stay as they are."""
    small = [tensor for tensor in tensors if tensor.nbytes < LEAST]
    starts = [0, *accumulate(tensor.nbytes + -tensor.nbytes % LINE for tensor in small)]
    room = on_large_pages(torch.zeros(starts[-1], dtype=torch.uint8))
    places = iter(starts)
    return [_part(room, next(places), tensor) if tensor.nbytes < LEAST else tensor for tensor in tensors]


def _part(room: Tensor, start: int, tensor: Tensor) -> Tensor:
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
