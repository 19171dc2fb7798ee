"""Puts large tensors on large memory pages, where the system has them, and keeps freed memory for the next tensor. Knows bytes only.

A matrix is read once a token: of ordinary pages a core then looks up a thousand addresses, each a walk through memory of its own,
which costs about a tenth of the time of a product. Where nothing can be done the tensor stays where it was.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

LINE = 64
PAGE = 2 << 20
LEAST = 2 * PAGE  # fewer bytes may not hold one whole page
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 1 << 30  # freed bytes at the heap's end that a process holds on to
FROM_HEAP = 1 << 25  # the largest block that comes from the heap: glibc allows no more


def keep_freed() -> None:
    """Let freed memory stay with the process: of what goes back to the system every page is made anew at the next use.

    A forward of 2,048 tokens makes and frees megabytes in every block, and spends up to a fifth of its time on new pages. The peak stays
    what it was. Nothing happens where the C library is another than glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(TRIM_THRESHOLD, KEPT)
        libc.mallopt(MMAP_THRESHOLD, FROM_HEAP)


def on_large_pages(values: Tensor) -> Tensor:
    """The same values, copied to large pages when there is enough of them and the system offers such pages."""
    return together([values])[0]


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors as parts of one stretch, of large pages where there is enough of it."""
    starts = [0, *accumulate(tensor.nbytes + -tensor.nbytes % LINE for tensor in tensors)]
    room = large_room(starts[-1])
    return [_part(room, start, tensor) for start, tensor in zip(starts, tensors, strict=False)] if room is not None else list(tensors)


def _part(room: Tensor, start: int, tensor: Tensor) -> Tensor:
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def large_room(nbytes: int) -> Tensor | None:
    """Fresh bytes on large pages; None for too few, or where the system has no such pages."""
    if ADVICE is None or nbytes < LEAST:
        return None
    room = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the first write makes a page
    try:
        room.madvise(ADVICE)
    except OSError:
        return None
    bytes_ = torch.frombuffer(room, dtype=torch.uint8)
    start = -bytes_.data_ptr() % PAGE
    return bytes_[start : start + nbytes]
