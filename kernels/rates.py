"""What this machine can do at most: bytes read and copied a second, multiplications a second. Knows no format.

The limits that the kernels' times are held against, so each is the best of many short tries, all memory cold. Reading is
bounded by our own streaming loop where it is compiled, else by torch's sum, which may be slower than the memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitpress.kernels import cpu_build

COLD = 256 << 20  # bytes that no cache holds; a try reads a window of them and the next try another
WINDOW = 16 << 20
SQUARE = 1024  # sides of the matrices whose product is timed


@dataclass(frozen=True)
class Rates:
    """Bytes a second read; bytes a second copied, one way; operations (two a multiplication) a second of square products."""

    read: float
    copy: float
    bfloat16: float
    float32: float
    streaming: bool  # whether the read rate is our own loop's


class Reader:
    """Measures the read rate again and again: the best so far is the machine's, since others can only take from it."""

    def __init__(self) -> None:
        self.words, self.at, self.best = torch.ones(COLD // 8, dtype=torch.int64), 0, 0.0

    def measure(self, tries: int = 24) -> float:
        """Bytes a second, the best of all tries up to now."""
        for _ in range(tries):
            self.at = (self.at + WINDOW // 8) % len(self.words)
            self.best = max(self.best, WINDOW / seconds(lambda: _read(self.words[self.at : self.at + WINDOW // 8])))
        return self.best


def _read(words: torch.Tensor) -> None:
    lib = cpu_build.library()
    if lib is None:
        words.sum()
    else:
        lib.bitpress_read(words.data_ptr(), len(words), torch.get_num_threads())


def measure_rates(reader: Reader) -> Rates:
    """All of them; about two seconds on two cores."""
    return Rates(reader.measure(), _copy_rate(), _product_rate(torch.bfloat16), _product_rate(torch.float32), cpu_build.library() is not None)


def _copy_rate() -> float:
    source, target = torch.ones(COLD // 2, dtype=torch.uint8), torch.empty(COLD // 2, dtype=torch.uint8)
    lib, threads = cpu_build.library(), torch.get_num_threads()
    copy: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731 - one of two ways to do it
    if lib is not None:
        copy = lambda: lib.bitpress_copy(source.data_ptr(), target.data_ptr(), len(source), threads)  # noqa: E731
    return len(source) / min(seconds(copy) for _ in range(5))


def _product_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(SQUARE, SQUARE).to(dtype) for _ in range(2))
    return 2 * SQUARE**3 / min(seconds(lambda: a @ b) for _ in range(6))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
