"""Which kernel multiplies a packed matrix, and why not a faster one. Knows layouts, shapes and what this machine can do; holds no weights.

`choose` is a list of questions asked from the fastest kernel down. A kernel that cannot take a matrix says so in words, and
the words of the fastest one that had to be passed over become the reason.
"""

from dataclasses import dataclass

import torch

from bitpress.kernels import cpu, cpu_build, cpu_coded, cpu_lowbit, gpu_choice
from bitpress.kernels.layout import DenseLayout, Layout, PairLayout, UniformLayout

LOWBIT, INT4, INT4_SPLIT, INT8, DEQUANTIZE = "C++ low-bit", "int4 pack", "int4 pack, two nibbles", "int8 pack", "dequantize"
DENSE, PAIR, TABLE, BINARY, BITMAP, TWO_FOUR = "dense", "low-rank pair", "C++ table", "C++ binary", "C++ bitmap", "C++ 2:4"
CODED = {
    "table": (TABLE, "looks every code up in a register"),
    "binary": (BINARY, "looks up sums of four inputs for every plane and multiplies nothing"),
    "bitmap": (BITMAP, "spreads the stored values to their places in a register"),
    "2:4": (TWO_FOUR, "picks the two inputs of every four that have weights"),
}
CODED_MAX_BATCH = 64
PANELS = "C++ kernel: makes 32 rows of weights bfloat16 at a time and multiplies all inputs by them"
# Rows of activations up to which the pack ops beat dequantise and multiply. A row costs them 0.04 ns a weight and dequantising
# costs 1.6 ns a weight once (one AVX-512 core at 2.5 GHz), so the crossover lies near 64 for every width.
PACK_MAX_BATCH = 64


@dataclass(frozen=True)
class Choice:
    """kernel: what runs. reason: why this one and why not a faster one, in a sentence for people."""

    kernel: str
    reason: str


def choose(layout: Layout, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, batch: int, activation_bits: int | None = None) -> Choice:
    """The kernel for activations [batch, K] of `dtype` times a packed matrix of `shape` (N, K) on `device`.

    activation_bits: 8 or 4 where every row of activations is to be rounded first.
    """
    if torch.device(device).type == "cuda" and not isinstance(layout, DenseLayout | PairLayout):
        return _choose_cuda(layout, shape, dtype, batch)
    match layout:
        case UniformLayout() if activation_bits is not None:
            return _choose_rounded(layout, shape, device, dtype, batch, activation_bits)
        case UniformLayout():
            return _choose_uniform(layout, shape, device, dtype, batch)
        case DenseLayout():
            return Choice(DENSE, "stored as it is")
        case PairLayout():
            return _choose_pair(layout, shape, device, dtype, batch)
    return _choose_coded(layout, shape, torch.device(device).type, dtype, batch)


def _choose_cuda(layout: Layout, shape: tuple[int, int], dtype: torch.dtype, batch: int) -> Choice:
    """Triton's kernels or an op that is faster on this card. Rounded activations are whole numbers, which every one of them takes."""
    kernel, reason = gpu_choice.choose(layout, shape, dtype, batch)
    return Choice(kernel, reason) if kernel else Choice(DEQUANTIZE, f"dequantise and multiply on cuda: {reason}")


def _choose_coded(layout: cpu_coded.CodedLayout, shape: tuple[int, int], device: str, dtype: torch.dtype, batch: int) -> Choice:
    """Tables, binary codes, zeros that are not stored: the C++ kernels, or none."""
    kernel, how = CODED[layout.name]
    refusal = f"there is no packed kernel for {device} yet" if device != "cpu" else cpu_coded.refusal(layout, dtype, shape[1])
    panels = layout.name in ("table", "binary") and cpu_build.panels(batch, dtype)
    if not refusal and batch > CODED_MAX_BATCH and not panels:
        refusal = f"above {CODED_MAX_BATCH} rows of inputs one matmul of dequantised weights is faster"
    return Choice(DEQUANTIZE, f"dequantise and multiply: {refusal}") if refusal else Choice(kernel, PANELS if panels else f"C++ kernel: {how}")


def _choose_rounded(layout: UniformLayout, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, batch: int, bits: int) -> Choice:
    """With integer activations the C++ kernels have half the work, and take any batch."""
    slow = _refuse_lowbit(layout, shape, torch.device(device).type, dtype, min(batch, PACK_MAX_BATCH))
    if slow is None:
        return Choice(LOWBIT, f"C++ kernel: multiplies {layout.bits}-bit codes and {bits}-bit inputs in integers")
    return Choice(DEQUANTIZE, f"rounds the inputs, then dequantises and multiplies: {slow}")


def _choose_pair(layout: PairLayout, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, batch: int) -> Choice:
    rank = layout.rank(*shape)
    right = choose(layout.right, (rank, shape[1]), device, dtype, batch)
    left = choose(layout.left, (shape[0], rank), device, dtype, batch)
    words = f"two products through rank {rank}: {right.kernel} ({right.reason}), then {left.kernel} ({left.reason})"
    if layout.base:
        base = choose(layout.base, shape, device, dtype, batch)
        words = f"{base.kernel} ({base.reason}), and {words}"
    return Choice(PAIR, words)


def _choose_uniform(layout: UniformLayout, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, batch: int) -> Choice:
    slow = _refuse_lowbit(layout, shape, torch.device(device).type, dtype, batch)
    if slow is None:
        return Choice(LOWBIT, PANELS if cpu_build.panels(batch, dtype) else f"C++ kernel: reads {layout.bits}-bit codes as they are and multiplies in integers")
    choice = _choose_ready(layout, shape, device, dtype, batch)
    return Choice(choice.kernel, f"{choice.reason}; {slow}" if torch.device(device).type == "cpu" else choice.reason)


def _choose_ready(layout: UniformLayout, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, batch: int) -> Choice:
    """The best of what torch brings."""
    refusal = _refuse_activations(torch.device(device).type, dtype, batch)
    if refusal:
        return Choice(DEQUANTIZE, f"dequantise and multiply: {refusal}")
    if layout.bits == 8 and layout.symmetric and layout.groups(shape[1]) == 1:
        refusal = _refuse_int8(shape)
        if refusal is None:
            return Choice(INT8, "int8 pack op: one scale a row is what it takes")
    else:
        refusal = _refuse_int4(layout, shape)
        if refusal is None:
            return _int4(layout)
    return Choice(DEQUANTIZE, f"dequantise and multiply: {refusal}")


def _refuse_lowbit(layout: UniformLayout, shape: tuple[int, int], device: str, dtype: torch.dtype, batch: int) -> str | None:
    """Why the project's C++ kernels do not take this product, or None."""
    if device != "cpu":
        return f"the C++ kernels run on a CPU, not on {device}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"the C++ kernels take bfloat16 and float32 inputs, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and batch > PACK_MAX_BATCH and not cpu_build.panels(batch, dtype):
        return f"above {PACK_MAX_BATCH} rows a bfloat16 matmul is faster than the C++ kernels"
    return cpu_lowbit.refusal(layout.bits, layout.group_size, shape[1]) or None


def _refuse_activations(device: str, dtype: torch.dtype, batch: int) -> str | None:
    """Why no pack op takes these activations, or None."""
    if device != "cpu":
        return f"there is no packed kernel for {device} yet"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the pack ops are fast with AVX2 or AVX-512 only"
    if dtype != torch.bfloat16:
        return f"no ready kernel takes {str(dtype).removeprefix('torch.')} inputs at speed, only bfloat16"
    if batch > PACK_MAX_BATCH:
        return f"above {PACK_MAX_BATCH} rows of inputs the pack ops are slower"
    return None


def _refuse_int8(shape: tuple[int, int]) -> str | None:
    if shape[1] % cpu.INT8_LANE:
        return f"the int8 pack op takes inputs in multiples of {cpu.INT8_LANE}, not {shape[1]}"
    return None


def _refuse_int4(layout: UniformLayout, shape: tuple[int, int]) -> str | None:
    rows, columns = shape
    if layout.zero == "float" and layout.bits not in (4, 8) and not layout.symmetric:
        return "with zeros that are no levels the int4 pack op takes codes of 4 or 8 bits only"
    if rows % cpu.INT4_ROWS:
        return f"the int4 pack op takes outputs in multiples of {cpu.INT4_ROWS}, not {rows}"
    if cpu.int4_group(layout, columns) is None:
        return f"groups of {layout.group_size} do not split into the int4 pack op's groups of 32, 64, 128 or 256"
    return None


def _int4(layout: UniformLayout) -> Choice:
    if layout.bits == 4:
        return Choice(INT4, "int4 pack op: the ready kernel for 4-bit codes")
    if layout.bits < 4:
        return Choice(INT4, f"int4 pack op: {layout.bits}-bit codes sit in 4-bit slots in memory, so they are no faster than 4 bits")
    why = f"no ready kernel takes {layout.bits}-bit codes with these groups, so they cost two 4-bit reads"
    return Choice(INT4_SPLIT, f"int4 pack op on high and low nibbles: {why}")
