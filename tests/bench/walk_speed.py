"""How fast the kernels are that calibration and measuring spend their time on, beside torch: attention, second moments, comparison of logits, norms, gates.

    python tests/bench/walk_speed.py

Both sides are timed in turn on the same tensors, medians of 15 tries. Prints rows of `bitpress.engine.bench` as JSON; a ratio above 1
is ours being faster. Sizes are those of SmolLM2-135M: 9 heads of 64 on 3 key heads, 1,536 inputs, 49,152 tokens.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from bitpress.kernels import attention, compare, cpu_step, outer, rates

TRIES = 15
WINDOWS = ((8, 256), (4, 512), (1, 2048))


def both(ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, in turn."""
    times = [(rates.seconds(ours), rates.seconds(plain)) for _ in range(TRIES + 1)][1:]
    mine, others = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(others)


def plain_norm(x_MD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Llama's, as transformers writes it."""
    wide_MD = x_MD.float()
    return weight_D * (wide_MD * torch.rsqrt(wide_MD.pow(2).mean(-1, keepdim=True) + epsilon)).to(x_MD.dtype)


def pairs() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """What is timed, ours and torch's."""
    for batch, length in WINDOWS:
        query, key, value = (torch.randn(batch, length, heads, 64).bfloat16().transpose(1, 2) for heads in (9, 3, 3))
        sides = (query, key, value)
        if attention.attends(*sides):
            plain = lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
            yield f"attention, {batch} x {length} tokens", lambda sides=sides: attention.attend_back(*sides, 0.125), plain
    rows_MK, total_KK = torch.randn(2048, 1536).bfloat16(), torch.zeros(1536, 1536, dtype=torch.float64)
    moments = lambda way: lambda: way(total_KK, rows_MK, rows_MK, True)  # noqa: E731
    yield "second moments of 2,048 x 1,536", moments(outer.add_outer), moments(outer.by_torch)
    x_MD, weight_D, gate_MF = torch.randn(512, 576).bfloat16(), torch.rand(576).bfloat16(), torch.randn(512, 1536).bfloat16()
    if cpu_step.available():
        yield "RMSNorm of 512 x 576", lambda: cpu_step.rms_norm(x_MD, weight_D, 1e-5, rounded=True), lambda: plain_norm(x_MD, weight_D, 1e-5)
        yield "gated SiLU of 512 x 1,536", lambda: cpu_step.gated_silu(gate_MF, gate_MF, rounded=True), lambda: F.silu(gate_MF) * gate_MF
    dense_PV = torch.randn(256, 49152).bfloat16()
    other_PV, targets_P = dense_PV + 0.1, torch.zeros(256, dtype=torch.int64)
    yield "comparison of 256 x 49,152 logits", lambda: compare.compare(dense_PV, other_PV, targets_P), lambda: compare.by_torch(dense_PV, other_PV, targets_P)


def rows() -> Iterator[dict[str, Any]]:
    """One a pair."""
    with torch.inference_mode():
        for name, ours, plain in pairs():
            mine, others = both(ours, plain)
            words = f"{1e3 * mine:.2f} ms against {1e3 * others:.2f} ms, {torch.get_num_threads()} threads"
            yield {"name": f"{name}, over torch", "value": others / mine, "unit": "times", "bound": "> 1", "kept": mine < others, "conditions": words}


if __name__ == "__main__":
    print(json.dumps(list(rows()), indent=1))
