"""`python -m bitpress.kernels.bench_gpu`: every width at a 7B model's shapes on this GPU, against its read rate and against cuBLAS. Knows random codes only.

A table goes to stderr, JSON to stdout. Without a GPU it exits 2; a figure above the measured read rate is a measuring error and exits 1.
"""

import json
import sys
from typing import Any

import torch
from torch.nn import functional as F

from bitpress.kernels import gpu_choice, gpu_rates
from bitpress.kernels.layout import BinaryLayout, Layout, TableLayout, UniformLayout, words_of

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
LAYOUTS: tuple[Layout, ...] = (UniformLayout(2), UniformLayout(3), UniformLayout(4), UniformLayout(8, 0, True), TableLayout("nf4"), BinaryLayout(2))
BATCHES, PREFILL = (1, 16), 2048


def gpu_table() -> dict[str, Any]:
    """Measure everything. Returns {machine, rows}; a row has shape, layout, batch, kernel, seconds, dense_ratio, read_fraction (few rows only), others."""
    rate = gpu_rates.read_rate()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "read_gb_per_s": rate / 1e9,
               "bfloat16_tflop_per_s": gpu_rates.product_rate() / 1e12}  # fmt: skip
    rows = []
    for shape in SHAPES:
        for batch in (*BATCHES, PREFILL):
            dense = _dense_seconds(shape, batch)
            rows += [row(shape, layout, batch, dense, rate) for layout in LAYOUTS]
    return {"machine": machine, "rows": rows}


def row(shape: tuple[int, int], layout: Layout, batch: int, dense_s: float, rate: float) -> dict[str, Any]:
    """The fastest kernel of one product. dense_s: seconds of the bfloat16 product."""
    found = gpu_choice.measured(layout, shape, torch.bfloat16, batch)
    told: dict[str, Any] = {"shape": list(shape), "layout": words_of(layout), "batch": batch, "dense_s": dense_s}
    if found is None:
        return {**told, "kernel": None}
    fraction = {} if batch == PREFILL else {"read_fraction": layout.nbytes(*shape) / found.seconds / rate}
    return {**told, "kernel": found.kernel, "seconds": found.seconds, "dense_ratio": dense_s / found.seconds, **fraction, "others": found.others}


def _dense_seconds(shape: tuple[int, int], batch: int) -> float:
    weight, x_MK = (torch.randn(size, shape[1], device="cuda").bfloat16() for size in (shape[0], batch))
    return gpu_choice.cuda_seconds(lambda: F.linear(x_MK, weight))


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Figures that cannot be: bytes read faster than the device reads."""
    return [f"{row['layout']} at {row['shape']}: {row['read_fraction']:.2f} of the read rate" for row in rows if row.get("read_fraction", 0) > 1]


def text(report: dict[str, Any]) -> str:
    """The rows as aligned text under a line about the machine."""
    machine = report["machine"]
    lines = [f"{machine['device']}: reads {machine['read_gb_per_s']:.0f} GB/s, multiplies {machine['bfloat16_tflop_per_s']:.0f} TFLOP/s in bfloat16"]
    for each in report["rows"]:
        name = f"{each['shape'][0]:>6} x {each['shape'][1]:<6} M {each['batch']:<5} {each['layout']:<28}"
        if each["kernel"] is None:
            lines.append(f"{name} no kernel ran")
            continue
        share = f"{each['read_fraction']:6.1%} of the read rate" if "read_fraction" in each else ""
        lines.append(f"{name} {1e6 * each['seconds']:9.1f} µs {each['dense_ratio']:5.2f}x dense  {each['kernel']:<18} {share}")
    return "\n".join(lines)


def main() -> int:
    """0 when all was measured, 1 for a figure that cannot be, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here; the GPU bench needs one. On a CPU, run `bitpress bench kernels`.", file=sys.stderr)
        return 2
    report = gpu_table()
    print(text(report), file=sys.stderr)
    print(json.dumps(report, indent=1))
    wrong = problems(report["rows"])
    print("".join(f"impossible: {line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
