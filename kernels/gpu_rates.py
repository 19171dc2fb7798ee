"""What a GPU can do at most: bytes read a second, multiplications a second. Knows no format; every figure is the best of several tries."""

from collections.abc import Callable

import torch

READ_BYTES, TRIES, SQUARE = 4 << 30, 12, 8192


def read_rate() -> float:
    """Bytes a second of a sum over memory that no cache holds. Raises RuntimeError without a device."""
    free, _ = torch.cuda.mem_get_info()
    words = torch.ones(min(READ_BYTES, free // 4) // 4, dtype=torch.float32, device="cuda")
    return words.nbytes / min(event_seconds(lambda: words.sum()) for _ in range(TRIES))


def product_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second, two a multiplication, of square products by cuBLAS."""
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda").to(dtype) for _ in range(2))
    return 2 * SQUARE**3 / min(event_seconds(lambda: a @ b) for _ in range(TRIES))


def event_seconds(work: Callable[[], object]) -> float:
    """Seconds of a call on the device, between two events."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3
