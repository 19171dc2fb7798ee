"""All blocks of a decoding step as one call into C++. Knows matrices, norms and a cache; no model, no tokens.

Built once from a loop's parts, whose storage it keeps alive and reads in place. `TokenStep.of` says None for parts that the
C++ does not take (biases, formats without low-bit tiles, inputs with outliers, no compiler): the caller then goes on call by call.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitpress.kernels import cpu_build, cpu_lowbit, dispatch
from bitpress.kernels.cpu_cache import CacheSide
from bitpress.kernels.packed import PackedEmbedding, PackedLinear
from bitpress.kernels.pages import LEAST, together
from bitpress.kernels.rows import DenseRows, PackedRows, Rows, SeparateRows

DENSE_BITS, MOST = 16, (3, 1, 2, 1)  # matrices of a block: q k v, output, gate up, down


class _Matrix(ctypes.Structure):
    _fields_ = [("weights", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                *((name, ctypes.c_int32) for name in ("bits", "group", "float_zeros", "activation_bits", "inputs", "outputs"))]  # fmt: skip


class _Block(ctypes.Structure):
    _fields_ = [("attention_norm", ctypes.c_void_p), ("mlp_norm", ctypes.c_void_p), ("attention_epsilon", ctypes.c_float),
                ("mlp_epsilon", ctypes.c_float), ("counts", ctypes.c_int32 * 4), ("matrices", _Matrix * sum(MOST)),
                ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)]  # fmt: skip


class _Ends(ctypes.Structure):
    _fields_ = [("embedding", _Matrix), ("head", _Matrix), ("norm", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


@dataclass(frozen=True)
class BlockParts:
    """One block: norms (bfloat16 weights [D], epsilon), and the matrices q k v, output, gate up, down. sides: its compressed keys and values, if they are."""

    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    matrices: tuple[Rows, Rows, Rows, Rows]
    sides: tuple[CacheSide, CacheSide] | None = None


@dataclass(frozen=True)
class EndParts:
    """What stands before and behind the blocks: the embedding, the last norm (bfloat16 weight [D], epsilon), the head."""

    embedding: nn.Module
    norm: tuple[Tensor, float]
    head: Rows


class TokenStep:
    """The blocks of a model, ready to take one token each call. ends: whether `logits` can be asked for."""

    def __init__(self, blocks: Sequence[BlockParts], flat: Sequence[list[list[Tensor | PackedLinear]]], ends: EndParts | None) -> None:
        self.ends = None if ends is None else _ends(ends)
        self.end_parts = ends  # whose storage is read in place
        self.count, self.kept = len(blocks), (blocks, flat)
        _settle([matrix for groups in flat for group in groups for matrix in group if isinstance(matrix, PackedLinear)])
        self.blocks = (_Block * len(blocks))()
        for target, parts, groups in zip(self.blocks, blocks, flat, strict=True):
            (attention, target.attention_epsilon), (mlp, target.mlp_epsilon) = parts.norms
            target.attention_norm, target.mlp_norm = attention.data_ptr(), mlp.data_ptr()
            target.counts[:] = [len(group) for group in groups]
            if parts.sides:
                target.keys, target.values = (ctypes.addressof(side) for side in parts.sides)
            for place, matrix in enumerate(matrix for group in groups for matrix in group):
                target.matrices[place] = _dense(matrix) if isinstance(matrix, Tensor) else _packed(matrix)

    @classmethod
    def of(cls, blocks: Sequence[BlockParts], ends: EndParts | None = None) -> "TokenStep | None":
        """The step of these blocks, None where it has no such path. `ends` that have none are left out."""
        flat = [[_matrices(rows) for rows in block.matrices] for block in blocks]
        fits = all(group and len(group) <= most for groups in flat for group, most in zip(groups, MOST, strict=True))
        plain = all(weight.dtype == torch.bfloat16 and weight.is_contiguous() for block in blocks for weight, _ in block.norms)
        return cls(blocks, [[group or [] for group in groups] for groups in flat], ends) if fits and plain and cpu_build.library() else None

    def __call__(self, x_1D: Tensor, cos_C: Tensor, sin_C: Tensor, cache: Tensor, position: int, heads: int, scale: float, ffn: int) -> Tensor:
        """x_1D: bfloat16 [1, D], contiguous, a token's embedding; becomes its state behind the last block and is returned.

        cos_C, sin_C: as `cpu_step.attend_one` takes them. cache: bfloat16 [blocks, 1, 2 kv, capacity, C]; row `position` of each is written.
        """
        self._run(x_1D, (cos_C, sin_C, None, cache), (position, *_sizes(cache, heads)), scale, ffn)
        return x_1D

    def over_sides(self, x_1D: Tensor, cos_C: Tensor, sin_C: Tensor, turns: Tensor, heads: int, kv_heads: int, scale: float, ffn: int) -> Tensor:
        """The same over the blocks' own compressed caches, whose counts go up. turns: as `cpu_cache.turns_of` makes them."""
        self._run(x_1D, (cos_C, sin_C, turns, None), (0, 0, heads, kv_heads, cos_C.shape[-1]), scale, ffn)
        return x_1D

    def logits(self, id_: int, x_1D: Tensor, cos_C: Tensor, sin_C: Tensor, cache: Tensor, position: int, heads: int, scale: float, ffn: int) -> Tensor:
        """From a token to the next one's logits [V], float32: bfloat16 sums, widened. x_1D: room for the state, or the token's embedding where
        `looks_up` is false. Only where `ends` is not None.
        """
        return self._logits(id_, x_1D, (cos_C, sin_C, None, cache), (position, *_sizes(cache, heads)), scale, ffn)

    def logits_over_sides(self, id_: int, x_1D: Tensor, cos_C: Tensor, sin_C: Tensor, turns: Tensor, heads: int, kv_heads: int, scale: float,
                          ffn: int) -> Tensor:  # fmt: skip
        """The same over the blocks' own compressed caches."""
        return self._logits(id_, x_1D, (cos_C, sin_C, turns, None), (0, 0, heads, kv_heads, cos_C.shape[-1]), scale, ffn)

    def _logits(self, id_: int, x_1D: Tensor, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], scale: float, ffn: int) -> Tensor:
        assert self.ends is not None
        logits_V = torch.empty(self.ends.head.outputs)
        self._run(x_1D, tensors, numbers, scale, ffn, id_, logits_V)
        return logits_V

    @property
    def looks_up(self) -> bool:
        """Whether `logits` finds the token's embedding itself."""
        return self.ends is not None and self.ends.embedding.bits > 0

    def _run(self, x_1D: Tensor, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], scale: float, ffn: int, id_: int = 0,
             logits_V: Tensor | None = None) -> None:  # fmt: skip
        lib = cpu_build.library()
        assert lib is not None
        ends = None if logits_V is None or self.ends is None else ctypes.byref(self.ends)
        places = [None if tensor is None else tensor.data_ptr() for tensor in (x_1D, logits_V, *tensors)]
        lib.bitpress_token(self.blocks, self.count, ends, id_, *places, *numbers, scale, x_1D.shape[-1], ffn, torch.get_num_threads())


def _sizes(cache: Tensor, heads: int) -> tuple[int, int, int, int]:
    """Capacity, heads, key heads and channels."""
    _, _, planes, capacity, channels = cache.shape
    return capacity, heads, planes // 2, channels


def _settle(linears: Sequence[PackedLinear]) -> None:
    """Lay the matrices of a step side by side in memory, in the order in which it reads them; large ones have pages of their own."""
    linears = [linear for linear in linears if _tiles(linear).nbytes < LEAST]
    tiles = [_tiles(linear) for linear in linears]
    moved = iter(together([part for each in tiles for part in each.parts]))
    for linear, each in zip(linears, tiles, strict=True):
        linear.settle(dispatch.LOWBIT, each.moved([next(moved) for _ in each.parts]))


def _tiles(linear: PackedLinear) -> cpu_lowbit.Tiles:
    tiles = linear.form(dispatch.LOWBIT)
    assert isinstance(tiles, cpu_lowbit.Tiles)
    return tiles


def _ends(parts: EndParts) -> _Ends | None:
    """None where the head is no single matrix of a kind the C++ takes."""
    weight_D, epsilon = parts.norm
    heads = _matrices(parts.head)
    if heads is None or len(heads) != 1 or weight_D.dtype != torch.bfloat16 or not weight_D.is_contiguous():
        return None
    head = heads[0]
    made = _dense(head) if isinstance(head, Tensor) else _packed(head)
    return _Ends(_embedding(parts.embedding, head, made), made, weight_D.data_ptr(), epsilon)


def _embedding(embedding: nn.Module, head: Tensor | PackedLinear, made: _Matrix) -> _Matrix:
    """The embedding where a row of it can be read in C++: bfloat16 weights, or the 8-bit codes that the head is made of."""
    if type(embedding) is nn.Embedding and embedding.weight.dtype == torch.bfloat16 and embedding.weight.is_contiguous():
        return _dense(embedding.weight.detach())
    if isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear) and made.bits == 8 and embedding.dtype == torch.bfloat16:
        ours, theirs = embedding.packed.tensors, head.packed.tensors
        if all(tensor.data_ptr() == theirs[name].data_ptr() for name, tensor in ours.items()):
            return made
    return _Matrix()


def _matrices(rows: Rows | nn.Module) -> list[Tensor | PackedLinear] | None:
    """What lies in a product: bfloat16 weights and low-bit layers; None for anything else."""
    match rows:
        case DenseRows(bias_N=None, weight_NK=weight) if weight.dtype == torch.bfloat16 and weight.is_contiguous():
            return [weight]
        case PackedRows(linear=linear) if linear.bias is None and linear.outliers is None and linear.kernel == dispatch.LOWBIT:
            return [linear]
        case SeparateRows(parts=parts):
            found = [_matrices(part) for part in parts]
            return None if any(each is None for each in found) else [matrix for each in found for matrix in each or []]
    return None


def _dense(weight_NK: Tensor) -> _Matrix:
    outputs, inputs = weight_NK.shape
    return _Matrix(weight_NK.data_ptr(), None, None, DENSE_BITS, inputs, 0, 0, inputs, outputs)


def _packed(linear: PackedLinear) -> _Matrix:
    tiles = _tiles(linear)
    zeros, floats = tiles.zeros, tiles.zeros is not None and tiles.zeros.dtype == torch.bfloat16
    return _Matrix(tiles.codes.data_ptr(), tiles.scales.data_ptr(), None if zeros is None else zeros.data_ptr(), tiles.bits, tiles.group, floats,
                   linear.activation_bits or 0, tiles.shape[1], tiles.shape[0])  # fmt: skip
