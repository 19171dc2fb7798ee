"""How fast one row of activations is multiplied, at each width, against dense bfloat16 and the rate at which memory can be read.

Cold weights: enough copies of a matrix are cycled that none is still in a cache when its turn comes. Every round visits all
kernels in turn, so a drift of the machine hits all of them alike. Knows random codes only; no model.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.formats import pack
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedLinear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096))  # SmolLM2-135M as decoded (fused), and the papers' square
QUICK_SHAPES = ((3072, 576), (576, 1536))
LAYOUTS = (UniformLayout(2), UniformLayout(3), UniformLayout(4), UniformLayout(5), UniformLayout(6), UniformLayout(8), UniformLayout(8, 0, True))
COLD_BYTES = 160 << 20  # of stored weights cycled: several times a last-level cache
QUICK_COLD_BYTES = 48 << 20
NOISY_SPREAD = 1.5  # p50 over p10 above which something else had the cores
DENSE = "dense"


def kernel_table(quick: bool = False) -> dict[str, Any]:
    """Measure every width at every shape. Returns {machine, rows}.

    A row: shape [N, K], bits, group, kernel, reason, p10_s, p50_s, bytes (stored), gb_per_s and read_fraction (of stored bytes at
    p50, over the machine's read rate), dense_ratio (dense p50 over this p50), noisy. Seconds are of one product.
    """
    rate = read_bandwidth()
    rows = [row for shape in (QUICK_SHAPES if quick else SHAPES) for row in _shape_rows(shape, rate, quick)]
    return {"machine": {**_machine(), "read_gb_per_s": rate / 1e9}, "rows": rows}


def read_bandwidth(megabytes: int = 256, rounds: int = 7) -> float:
    """Bytes a second of a streaming read with all threads: the best of a few sums over memory that no cache holds."""
    data = torch.ones(megabytes << 17, dtype=torch.int64)
    return data.nbytes / min(_seconds(lambda: data.sum()) for _ in range(rounds))


def _machine() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": platform.machine(), "capability": capability, "threads": torch.get_num_threads(), "torch": torch.__version__, "load": load}


def _shape_rows(shape: tuple[int, int], rate: float, quick: bool) -> list[dict[str, Any]]:
    """One row for dense bfloat16 and one a layout, timed in turn."""
    x_1K = torch.randn(1, shape[1]).bfloat16()
    sides: dict[UniformLayout | str, Sequence[Any]] = {DENSE: _dense_copies(shape, quick)}
    sides |= {layout: _packed_copies(layout, shape, quick) for layout in LAYOUTS}
    times: dict[Any, list[float]] = {side: [] for side in sides}
    with torch.inference_mode():
        for round_ in range(7 if quick else 15):
            for side, products in sides.items():
                seconds = _seconds(partial(_all, products, x_1K)) / len(products)
                if round_:  # the first one lays the codes out
                    times[side].append(seconds)
    dense_p50 = statistics.median(times[DENSE])
    return [_row(side, shape, sides[side][0], times[side], dense_p50, rate) for side in sides]


def _all(products: Sequence[Callable[[Tensor], Tensor]], x_1K: Tensor) -> None:
    for product in products:
        product(x_1K)


def _row(side: UniformLayout | str, shape: tuple[int, int], product: Any, seconds: list[float], dense_p50: float, rate: float) -> dict[str, Any]:
    p10, p50 = sorted(seconds)[len(seconds) // 10], statistics.median(seconds)
    if isinstance(side, UniformLayout):
        named = {"bits": side.bits, "group": side.group_size, "kernel": product.kernel, "reason": product.reason, "bytes": side.nbytes(*shape)}
    else:
        named = {"bits": 16, "group": 0, "kernel": "dense bfloat16", "reason": "the baseline", "bytes": 2 * shape[0] * shape[1]}
    speed = named["bytes"] / p50
    figures = {"p10_s": p10, "p50_s": p50, "gb_per_s": speed / 1e9, "read_fraction": speed / rate, "dense_ratio": dense_p50 / p50}
    return {"shape": list(shape), **named, **figures, "noisy": p50 > NOISY_SPREAD * p10}


def _copies(nbytes: int, quick: bool) -> int:
    return max(2, (QUICK_COLD_BYTES if quick else COLD_BYTES) // nbytes)


def _dense_copies(shape: tuple[int, int], quick: bool) -> list[Callable[[Tensor], Tensor]]:
    weights = [torch.randn(shape).bfloat16() for _ in range(_copies(2 * shape[0] * shape[1], quick))]
    return [partial(F.linear, weight=weight) for weight in weights]


def _packed_copies(layout: UniformLayout, shape: tuple[int, int], quick: bool) -> list[PackedLinear]:
    rows, columns = shape
    scales, top = torch.full((rows, layout.groups(columns)), 2.0**-7), 2**layout.bits
    zeros = None if layout.symmetric else torch.randint(0, top, scales.shape, dtype=torch.uint8)
    codes = torch.randint(0, top, shape, dtype=torch.uint8)
    return [PackedLinear(pack(codes, scales, zeros, layout)) for _ in range(_copies(layout.nbytes(rows, columns), quick))]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
