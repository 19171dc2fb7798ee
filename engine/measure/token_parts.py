"""Where the time of one decoded token goes: each group of linears, the head, and the rest. Knows the joined products of our own decode loop; no screen.

Products are timed by themselves, one group over all blocks after another, so that the weights are as cold as in decoding; what is
left of the token's time is attention, norms and the calls between. Each group stands beside the time that its bytes need at the
machine's measured read rate, and beside the fixed cost of a call, so that a screen can say what bounds it.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.engine.decode import Decoder
from bitpress.kernels import gpu_rates, rates
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.rows import DenseRows, PackedRows, Rows, SeparateRows

ROUNDS, SMALL = 9, 32
GROUPS = {"q, k, v": "qkv", "attention output": "out", "gate, up": "gate_up", "down": "down"}


def token_parts(decoder: Decoder, token_s: float, read_rate: float, kv_bytes: int) -> dict[str, Any] | None:
    """The parts of a token that took `token_s` seconds, or None where the loop is not ours.

    read_rate: bytes a second that this machine reads. kv_bytes: of keys and values that a step reads. Returns {token_s,
    read_bytes_per_s, call_s, excess, parts: [{part, kernel, reason, layers, calls, bytes, flops, seconds}]}; the last part, "rest", has bytes and seconds only.
    call_s is 0 where a step is a single call. Products that took longer by themselves than the whole token are scaled down to it, by `excess`.
    """
    loop = getattr(decoder, "_loop", None)
    blocks = getattr(loop, "blocks", None)
    if loop is None or not blocks:
        return None
    groups = {name: [getattr(block, attribute) for block in blocks] for name, attribute in GROUPS.items()} | {"head": [loop.head]}
    with torch.inference_mode():
        parts = [_part(name, products, decoder.step_dtype, decoder.device) for name, products in groups.items()]
        call_s = 0.0 if _one_call(loop) else call_seconds(decoder.device)
    excess = max(1.0, sum(part["seconds"] for part in parts) / token_s)
    parts = [{**part, "seconds": part["seconds"] / excess} for part in parts]
    parts.append({"part": "rest", "bytes": kv_bytes, "seconds": max(0.0, token_s - sum(part["seconds"] for part in parts))})
    return {"token_s": token_s, "read_bytes_per_s": read_rate, "call_s": call_s, "excess": excess, "parts": parts}


def _one_call(loop: Any) -> bool:
    """Whether a step of this loop is one call for all blocks, so that its products have no calls of their own."""
    return bool(getattr(loop, "fused_steps", False)) and getattr(loop, "whole_step", None) is not None


def read_rate(device: torch.device) -> float:
    """Bytes a second that this machine's memory, or this GPU's, can be read at: measured now."""
    return gpu_rates.read_rate() if device.type == "cuda" else rates.Reader().measure()


def call_seconds(device: torch.device) -> float:
    """What a product costs before it has read anything: a matrix of 32 by 32."""
    x_1K, weight_NK = torch.ones(1, SMALL, device=device).bfloat16(), torch.ones(SMALL, SMALL, device=device).bfloat16()
    return _seconds(lambda: [F.linear(x_1K, weight_NK) for _ in range(100)], device) / 100


def _part(name: str, products: Sequence[Rows], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    inputs = [torch.randn(1, _width(product), device=device).to(dtype) for product in products]
    told = [choice for product in products for choice in _kernels(product)]
    kernel, reason = Counter(told).most_common(1)[0][0]
    more = len({kernel for kernel, _ in told}) > 1
    numels, sizes = zip(*(pair for product in products for pair in _sizes(product)), strict=True)
    seconds = _seconds(lambda: [product(x_1K) for product, x_1K in zip(products, inputs, strict=True)], device)
    return {"part": name, "kernel": f"{kernel} and others" if more else kernel, "reason": reason, "layers": len(numels), "calls": len(told),
            "bytes": sum(sizes), "flops": 2 * sum(numels), "seconds": seconds}  # fmt: skip


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few tries; a GPU is waited for."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first one lays codes out


def _leaves(product: Rows | nn.Module) -> Iterator[Any]:
    """What is called one by one inside a product."""
    if isinstance(product, SeparateRows):
        for part in product.parts:
            yield from _leaves(part)
    else:
        yield product.linear if isinstance(product, PackedRows) else product


def _width(product: Rows) -> int:
    return _shape(next(_leaves(product)))[1]


def _shape(leaf: Any) -> tuple[int, int]:
    if isinstance(leaf, PackedLinear):
        return leaf.shape
    weight: Tensor = leaf.weight_NK if isinstance(leaf, DenseRows) else leaf.weight
    return weight.shape[0], weight.shape[1]


def _kernels(product: Rows) -> list[tuple[str, str]]:
    return [(leaf.kernel, leaf.reason) if isinstance(leaf, PackedLinear) else ("dense", "weights of the step's own type") for leaf in _leaves(product)]


def _sizes(product: Rows) -> list[tuple[int, int]]:
    """(weights, bytes that a step reads) of each leaf: the stored ones of a packed layer, those of the step's type of a dense one."""
    leaves = list(_leaves(product))
    shapes = [_shape(leaf) for leaf in leaves]
    sizes = [leaf.stored_bytes if isinstance(leaf, PackedLinear) else _dense_bytes(leaf) for leaf in leaves]
    return [(shape[0] * shape[1], size) for shape, size in zip(shapes, sizes, strict=True)]


def _dense_bytes(leaf: Any) -> int:
    return leaf.weight_NK.nbytes if isinstance(leaf, DenseRows) else leaf.weight.nbytes
