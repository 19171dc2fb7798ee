"""Which product a GPU runs fastest, by measuring it there once. Knows candidates and a table of times; nothing about what the layers are for.

Candidates are the Triton kernels in several tiles, Triton dequantising before cuBLAS, torch's own int4, int8 and 2:4 products, and
bitsandbytes where it is installed. Each is held against the oracle before it is timed: one that is wrong or fails on this
machine is no candidate, whatever it promises. The table is a JSON file a device, in the cache folder of the kernels.
"""

import functools
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitpress.kernels import cpu_build, gpu, gpu_ops, reference
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import BinaryLayout, Layout, words_of
from bitpress.kernels.random_weights import random_packed

TRITON, TRITON_DENSE = "Triton low-bit", "Triton dequantise"
BATCHES = (1, 16, 64, 256, 2048)  # a batch is measured at the next of these
FUSED_MAX_BATCH = 64  # without a measurement: beyond, one dequantised copy serves enough rows
ROUNDS, WARM_UP = 20, 3
VERSION = 1  # of the kernels: a newer one measures anew
SMALL_TILES = tuple(gpu.Tile(outputs, 16, splits, warps, stages) for outputs, warps in ((32, 2), (32, 4), (64, 2), (64, 4)) for splits in (2, 4, 8)
                    for stages in (3, 4))  # fmt: skip
LARGE_TILES = tuple(gpu.Tile(outputs, batch, 1, warps, 2, True) for outputs, batch, warps in ((64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8)))


class Product(Protocol):
    """A matrix in some layout of a GPU's."""

    def matmul(self, x_MK: Tensor) -> Tensor:
        """[M, N] in the type of x_MK."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the stored ones."""


@dataclass(frozen=True)
class GpuForm:
    """A matrix in words, for both Triton kernels. fused, tile: which and how, for a measurement; None for what `choose` says."""

    words: gpu.Words
    fused: bool | None = None
    tile: gpu.Tile | None = None

    @staticmethod
    def of(packed: PackedTensor) -> "GpuForm":
        """A stored matrix in words."""
        return GpuForm(gpu.words(packed))

    def matmul(self, x_MK: Tensor) -> Tensor:
        """x_MK: bfloat16 or float16, contiguous. Few rows are multiplied from the words; for many, cuBLAS multiplies what they stand for."""
        entry = _table().get(_key(self.words.name, self.words.shape, x_MK.dtype, len(x_MK))) if x_MK.is_cuda else None
        fused = self.fused if self.fused is not None else entry["kernel"] == TRITON if entry else len(x_MK) <= FUSED_MAX_BATCH
        if not fused:
            return torch.nn.functional.linear(x_MK, gpu.dequantize(self.words, x_MK.dtype))
        measured_tile = gpu.Tile(**entry["tile"]) if entry and entry["tile"] else None
        return gpu.product(x_MK, self.words, self.tile or measured_tile or fair_tile(self.words, len(x_MK)))

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.words.nbytes


@dataclass(frozen=True)
class Found:
    """What was measured for one product. kernel, tile: the fastest. seconds: its median. others: those of the other kernels, by name."""

    kernel: str
    seconds: float
    tile: dict[str, Any]
    others: dict[str, float]


def choose(layout: Layout, shape: tuple[int, int], dtype: torch.dtype, batch: int) -> tuple[str | None, str]:
    """(kernel, reason) on the current CUDA device; (None, why not) where neither Triton nor an op of torch takes the product."""
    refused = gpu.refusal(layout, shape[1], dtype)
    found = measured(layout, shape, dtype, batch) if torch.cuda.is_available() else None
    if found is not None:
        return found.kernel, f"the fastest of those measured on this device: {_times(found)}"
    if refused:
        return None, refused
    if batch <= FUSED_MAX_BATCH:
        return TRITON, f"Triton kernel: reads {words_of(layout)} as they are"
    return TRITON_DENSE, f"Triton dequantises, cuBLAS multiplies: at {batch} rows the copy of the weights is the smaller part"


def _times(found: Found) -> str:
    times = sorted({found.kernel: found.seconds, **found.others}.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {1e6 * seconds:.1f} µs" for name, seconds in times)


def fair_tile(words: gpu.Words, batch: int) -> gpu.Tile:
    """A tile by rule: small ones that spill no register, split until some hundred programs share the work."""
    if batch > FUSED_MAX_BATCH:
        return LARGE_TILES[0]
    outputs, rows, warps = (32, 8, 4) if words.kind == "binary" else (32, 16, 4 if words.bits == 8 else 2)
    programs = -(-words.shape[0] // outputs) * -(-batch // rows)
    return gpu.Tile(outputs, rows, min(8, max(1, -(-512 // programs))), warps, 3 if words.kind == "uniform" else 1)


def measured(layout: Layout, shape: tuple[int, int], dtype: torch.dtype, batch: int) -> Found | None:
    """What is fastest, measured now when the table does not say. None where nothing takes the product, or a graph is being captured."""
    key = _key(str(layout), shape, dtype, batch)
    if key not in _table():
        if torch.cuda.is_current_stream_capturing():
            return None
        times = measure(layout, shape, dtype, _bucket(batch))
        best = min(times, key=lambda name: times[name][0], default=None)
        entry = None if best is None else asdict(Found(best, times[best][0], times[best][1], {name: took for name, (took, _) in times.items() if name != best}))
        _keep(key, entry)
    entry = _table()[key]
    return Found(**entry) if entry else None


def measure(layout: Layout, shape: tuple[int, int], dtype: torch.dtype, batch: int,
            clock: "Callable[[Callable[[], object]], float] | None" = None, device: str = "cuda") -> dict[str, tuple[float, dict[str, Any]]]:  # fmt: skip
    """Median seconds and tile of every kernel that takes the product and agrees with the oracle. clock: seconds of a call, for tests."""
    packed = random_packed(shape, layout).to(device)
    x_MK = torch.randn(batch, shape[1], device=device).to(dtype)
    exact_MN = reference.matmul(x_MK, packed)
    limit = 2 * _error(x_MK @ reference.dequantize(packed, dtype).T, exact_MN)
    times: dict[str, tuple[float, dict[str, Any]]] = {}
    for name, product, tile in _candidates(packed, dtype, batch):
        took = _timed(product, x_MK, exact_MN, limit, clock or cuda_seconds)
        if took < times.get(name, (math.inf, {}))[0]:
            times[name] = (took, asdict(tile) if tile else {})
    return times


def _candidates(packed: PackedTensor, dtype: torch.dtype, batch: int) -> list[tuple[str, Callable[[], Product], gpu.Tile | None]]:
    made: list[tuple[str, Callable[[], Product], gpu.Tile | None]] = []
    if not gpu.refusal(packed.layout, packed.shape[1], dtype):
        words = gpu.words(packed)
        tiles = [fair_tile(words, batch), *(SMALL_TILES if batch <= FUSED_MAX_BATCH else LARGE_TILES)]
        if isinstance(packed.layout, BinaryLayout):
            tiles = tiles[:1]
        made += [(TRITON, functools.partial(GpuForm, words, True, tile), tile) for tile in tiles]
        made.append((TRITON_DENSE, functools.partial(GpuForm, words, False), None))
    made += [(name, functools.partial(op.form, packed), None) for name, op in gpu_ops.OPS.items() if not op.refusal(packed.layout, packed.shape, dtype)]
    return made


def _timed(make: Callable[[], Product], x_MK: Tensor, exact_MN: Tensor, limit: float, clock: Callable[[Callable[[], object]], float]) -> float:
    """Median seconds; infinity for a product that fails here or is wrong."""
    try:
        product = make()
        if not _error(product.matmul(x_MK), exact_MN) <= limit:
            return math.inf
        return clock(lambda: product.matmul(x_MK))
    except Exception:  # a candidate that this card, driver or library cannot run; each has errors of its own kind
        return math.inf


def _error(y_MN: Tensor, exact_MN: Tensor) -> float:
    return float((y_MN.double() - exact_MN).norm() / exact_MN.norm())


def cuda_seconds(work: Callable[[], object]) -> float:
    """Median seconds of a call on the device, after another buffer has driven the weights out of the second-level cache."""
    flush = torch.empty(torch.cuda.get_device_properties().L2_cache_size * 2, dtype=torch.uint8, device="cuda")
    times = []
    for round_ in range(WARM_UP + ROUNDS):
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        if round_ >= WARM_UP:
            times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def _bucket(batch: int) -> int:
    return next((size for size in BATCHES if batch <= size), BATCHES[-1])


def _key(layout: str, shape: tuple[int, int], dtype: torch.dtype, batch: int) -> str:
    return f"{layout}, {shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}, {_bucket(batch)}"


@functools.cache
def _path() -> Path:
    properties = torch.cuda.get_device_properties()
    optional = [name for name in ("triton", "bitsandbytes") if importlib.util.find_spec(name)]
    name = f"{properties.name}-torch{torch.__version__}-{'-'.join(optional)}-{VERSION}"
    return cpu_build.cache_dir() / f"gpu-{''.join(letter if letter.isalnum() else '-' for letter in name)}.json"


@functools.cache
def _table() -> dict[str, Any]:
    """The device's table, read once a process; an unreadable one counts as empty."""
    try:
        held = json.loads(_path().read_text())
    except (OSError, ValueError, RuntimeError, AssertionError):
        return {}
    return held if isinstance(held, dict) else {}


def _keep(key: str, entry: dict[str, Any] | None) -> None:
    _table()[key] = entry
    partial = _path().with_suffix(f".{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(_table(), indent=1))
    partial.replace(_path())
