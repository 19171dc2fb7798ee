"""How fast activations are multiplied in every format, against dense bfloat16 and what this machine can do at most.

Cold weights: enough copies of a matrix are cycled that none is still in a cache when its turn comes. Every round visits all
kernels in turn, so a drift of the machine hits all of them alike. A figure that beats the machine's own limit is a measuring
error and is reported as a problem. Knows random weights only; no model.
"""

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.layout import (
    BinaryLayout,
    BitmapLayout,
    DenseLayout,
    Layout,
    PairLayout,
    TableLayout,
    TwoFourLayout,
    UniformLayout,
    layout_to_dict,
    words_of,
)
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.random_weights import random_packed
from bitpress.kernels.rates import Rates, Reader, measure_rates, seconds

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096))  # SmolLM2-135M as decoded (fused), and the papers' square
QUICK_SHAPES = ((3072, 576), (2048, 2048))
UNIFORM = (UniformLayout(2), UniformLayout(3), UniformLayout(4), UniformLayout(5), UniformLayout(6), UniformLayout(8), UniformLayout(8, 0, True))
OTHERS: tuple[Layout, ...] = (
    UniformLayout(4, zero="float"), TableLayout("nf4"), TableLayout("fp4"), BinaryLayout(2), BinaryLayout(3), BinaryLayout(4), BitmapLayout(0.5),
    BitmapLayout(0.8), TwoFourLayout(DenseLayout()), TwoFourLayout(UniformLayout(4, 32)), PairLayout(0.5, UniformLayout(8), UniformLayout(8)),
)  # fmt: skip
LAYOUTS: tuple[Layout, ...] = UNIFORM + OTHERS
QUICK_LAYOUTS: tuple[Layout, ...] = (UniformLayout(2), UniformLayout(3), UniformLayout(4), UniformLayout(8), TableLayout("nf4"), BinaryLayout(3),
                                     BitmapLayout(0.5), TwoFourLayout(UniformLayout(4, 32)))  # fmt: skip
COLD_BYTES = 160 << 20  # of stored weights cycled: several times a last-level cache
QUICK_COLD_BYTES = 64 << 20
ROUNDS, QUICK_ROUNDS = 15, 9
NOISY_SPREAD = 1.5  # p50 over p10 above which something else had the cores
MEMORY_BOUND = 0.5  # share of the read rate above which reading weights is most of what a product costs
DENSE = "dense"


def kernel_table(quick: bool = False, batches: Sequence[int] = (1,)) -> dict[str, Any]:
    """Measure every format at every shape. Returns {machine, rows, problems}.

    machine: processor, threads, load, and its limits {read_gb_per_s, copy_gb_per_s, bfloat16_gflop_per_s, float32_gflop_per_s}.
    A row: shape [N, K], batch, format, layout (as a file keeps it), bits (stored ones a weight, scales counted), group, kernel, reason, p10_s,
    p50_s, bytes (stored), gb_per_s and read_fraction (of stored bytes at p10, over the machine's read rate), dense_ratio (dense p50 over this
    p50), bound ("memory", or "other": unpacking, multiplying or the call itself), noisy. Seconds are of one product. problems: what cannot
    be true of these figures.
    """
    reader = Reader()
    rates, rows = measure_rates(reader), []
    for shape in QUICK_SHAPES if quick else SHAPES:
        for batch in batches:
            rows += _shape_rows(shape, batch, reader, quick)
    for row in rows:
        row["read_fraction"] = row["gb_per_s"] * 1e9 / reader.best
        row["bound"] = "memory" if row["read_fraction"] > MEMORY_BOUND else "other"
    return {"machine": _machine(rates, reader), "rows": rows, "problems": problems(rows)}


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows that read faster than the machine can: a measuring error, unless a cache held the weights."""
    return [f"{row['format']} at {row['shape']}: {row['read_fraction']:.2f} of the read rate cannot be" for row in rows if row["read_fraction"] > 1]


def _machine(rates: Rates, reader: Reader) -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    capability = torch.backends.cpu.get_cpu_capability()
    limits = {"read_gb_per_s": reader.best / 1e9, "copy_gb_per_s": rates.copy / 1e9, "bfloat16_gflop_per_s": rates.bfloat16 / 1e9,
              "float32_gflop_per_s": rates.float32 / 1e9, "own_read_loop": rates.streaming}  # fmt: skip
    return {"processor": platform.machine(), "capability": capability, "threads": torch.get_num_threads(), "torch": torch.__version__, "load": load, **limits}


def _shape_rows(shape: tuple[int, int], batch: int, reader: Reader, quick: bool) -> list[dict[str, Any]]:
    """One row for dense bfloat16 and one a layout, timed in turn; the read rate is measured again in every round."""
    x_MK = torch.randn(batch, shape[1]).bfloat16()
    sides: dict[Layout | str, Sequence[Any]] = {DENSE: _dense_copies(shape, quick)}
    sides |= {layout: _packed_copies(layout, shape, quick) for layout in (QUICK_LAYOUTS if quick else LAYOUTS)}
    times: dict[Any, list[float]] = {side: [] for side in sides}
    with torch.inference_mode():
        for round_ in range(QUICK_ROUNDS if quick else ROUNDS):
            for side, products in sides.items():
                reader.measure(6)  # beside every side: what the memory gives drifts by the second on a shared machine
                taken = [seconds(partial(product, x_MK)) for product in products]
                if round_:  # the first one lays the codes out
                    times[side].append(statistics.median(taken))
    dense_p50 = statistics.median(times[DENSE])
    return [_row(side, shape, batch, sides[side][0], times[side], dense_p50) for side in sides]


def _row(side: Layout | str, shape: tuple[int, int], batch: int, product: Any, taken: list[float], dense_p50: float) -> dict[str, Any]:
    p10, p50 = sorted(taken)[len(taken) // 10], statistics.median(taken)
    layout = DenseLayout() if isinstance(side, str) else side
    kernel, reason = ("dense bfloat16", "the baseline") if isinstance(side, str) else astuple(product.kernel_for(batch))
    nbytes = layout.nbytes(*shape)
    named = {"format": words_of(layout), "layout": layout_to_dict(layout), "bits": 8 * nbytes / (shape[0] * shape[1]),
             "group": getattr(layout, "group_size", 0), "kernel": kernel, "reason": reason, "bytes": nbytes}  # fmt: skip
    figures = {"p10_s": p10, "p50_s": p50, "gb_per_s": nbytes / p10 / 1e9, "dense_ratio": dense_p50 / p50}
    return {"shape": list(shape), "batch": batch, **named, **figures, "noisy": p50 > NOISY_SPREAD * p10}


def _copies(nbytes: int, quick: bool) -> int:
    return max(2, (QUICK_COLD_BYTES if quick else COLD_BYTES) // nbytes)


def _dense_copies(shape: tuple[int, int], quick: bool) -> list[Callable[[Tensor], Tensor]]:
    weight = torch.randn(shape).bfloat16()
    return [partial(F.linear, weight=weight.clone()) for _ in range(_copies(weight.nbytes, quick))]


def _packed_copies(layout: Layout, shape: tuple[int, int], quick: bool) -> list[PackedLinear]:
    """Layers of the same values in storage of their own."""
    first = random_packed(shape, layout)
    copies = range(_copies(first.nbytes, quick))
    return [PackedLinear(type(first)(layout, shape, {name: tensor.clone() for name, tensor in first.tensors.items()})) for _ in copies]
