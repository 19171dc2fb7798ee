"""Decoding over a compressed KV cache: coded, latent, or with old tokens forgotten. Knows attention; how rows are held is `kv_cache`'s.

A latent cache holds z = B x of a factored key or value matrix A B (METHODS 4). Keys are made anew from it at every step, A z
before the rotation, which stands between A and the query. Values are not: A comes after the mixing, once a token instead
of once a cached token, which is the same sum as absorbing A into the output matrix and leaves that matrix as it is stored.
Shape letters as in `decode`, with S rows in the cache, G heads of keys and values and E numbers a head that are mixed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.engine.decode import Decoder, _OwnLoop
from bitpress.engine.decode_block import Block
from bitpress.engine.kv_cache import CodedRows, DenseRows, Rows, rows_for
from bitpress.engine.recipe import CacheSide as SideScheme
from bitpress.engine.recipe import KVCache
from bitpress.kernels import cpu_cache
from bitpress.kernels.cpu_cache import CacheSide
from bitpress.kernels.cpu_token import TokenStep
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import DenseLayout, PairLayout
from bitpress.kernels.packed import PackedLinear
from bitpress.kernels.reference import dequantize
from bitpress.kernels.rows import SeparateRows, join


class Side:
    """Keys or values of one block: the way into the cache, the rows, and the factor behind them where they are latent."""

    def __init__(self, linear: Any, latent: bool, dtype: torch.dtype) -> None:
        self.up_NR: Tensor | None = None
        self.bias_N = linear.bias
        if latent and isinstance(linear, PackedLinear) and isinstance(linear.layout, PairLayout):
            self.into = join([_linear(linear.packed.part("right"))], dtype)
            self.up_NR = dequantize(linear.packed.part("left"), dtype)
            self.width = self.up_NR.shape[1]
        else:
            self.into, self.width = join([linear], dtype), linear.out_features
        self.rows: Rows

    def in_place(self, each: bool) -> "Place | None":
        """The side as a step in C++ takes it; None where that knows no such rows."""
        if self.bias_N is not None or not isinstance(self.rows, DenseRows | CodedRows):
            return None
        return Place(self.rows, self.rows.in_place(self.up_NR, each))

    def expanded(self, rows_SD: Tensor) -> Tensor:
        """Full rows [S, N] of what the cache holds."""
        if self.up_NR is None:
            return rows_SD
        return F.linear(rows_SD, self.up_NR.to(rows_SD.dtype), None if self.bias_N is None else self.bias_N.to(rows_SD.dtype))


@dataclass(frozen=True)
class Place:
    """One side's rows, and their storage as a step in C++ takes it."""

    rows: DenseRows | CodedRows
    held: CacheSide

    def enter(self) -> None:
        """Tell C++ how many rows there are: pieces of several tokens are put in by torch."""
        self.held.count, self.held.filled = self.rows.counts

    def leave(self) -> None:
        """Hear how many there are now."""
        self.rows.counts = self.held.count, self.held.filled


def _linear(factor: PackedTensor) -> nn.Module:
    """A factor as a layer: a plain one where it is stored as it is."""
    if not isinstance(factor.layout, DenseLayout):
        return PackedLinear(factor)
    rows, columns = factor.shape
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(factor.tensors["weight"], requires_grad=False)
    return made


class CacheLoop(_OwnLoop):
    """The loop of `decode` with rows of `kv_cache` in place of its one tensor."""

    def _allocate(self, decoder: Decoder) -> None:
        cache: KVCache = decoder.model.kv_scheme
        latent = cache.rank.roles if cache.rank else ()
        self.each = cache.rank is not None and cache.rank.heads == "each"
        self.sides: list[tuple[Side, Side]] = []
        for block in decoder.model.model.layers:
            attention = block.self_attn
            keys, values = (Side(linear, role in latent, self.step_dtype) for linear, role in ((attention.k_proj, "k"), (attention.v_proj, "v")))
            self._hold(keys, cache, cache.keys, decoder)
            self._hold(values, cache, cache.values, decoder)
            self.sides.append((keys, values))
        self.queries = [join([block.self_attn.q_proj], self.step_dtype) for block in decoder.model.model.layers]

    def _hold(self, side: Side, cache: KVCache, scheme: SideScheme | None, decoder: Decoder) -> None:
        side.rows = rows_for(cache, scheme, decoder.max_length, side.width, self.cache_dtype, decoder.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tensors that hold the tokens so far."""
        return sum(side.rows.nbytes for pair in self.sides for side in pair)

    @cached_property
    def in_place(self) -> list[tuple[Place, Place]] | None:
        """The sides of all blocks for steps in C++; None where some has no such form."""
        found = [(keys.in_place(self.each), values.in_place(self.each)) for keys, values in self.sides]
        known = [(keys, values) for keys, values in found if keys and values and cpu_cache.fits(keys.held, values.held)]
        return known if self.fused_steps and len(known) == len(found) else None

    @cached_property
    def turns(self) -> Tensor:
        """Cosines and sines as `cpu_cache` reads them."""
        return cpu_cache.turns_of(self.cos[:, 0], self.sin[:, 0])

    @cached_property
    def whole_step(self) -> TokenStep | None:
        """As that of dense caches."""
        alike = len({(block.heads, block.kv_heads, block.neurons) for block in self.blocks}) == 1
        parts = []
        for block, into, (keys, values) in zip(self.blocks, self.joined, self.in_place or (), strict=True):
            parts.append(replace(block.parts, matrices=(into, *block.parts.matrices[1:]), sides=(keys.held, values.held)))
        return TokenStep.of(parts, self.ends) if alike else None

    @cached_property
    def joined(self) -> list[SeparateRows]:
        """The ways into queries, keys and values of each block, side by side."""
        return [SeparateRows([queries, keys.into, values.into]) for queries, (keys, values) in zip(self.queries, self.sides, strict=True)]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        for pair in self.sides:
            for side in pair:
                side.rows.reset()

    def next_logits(self, token_id: int) -> Tensor:
        """Add one token; the next one's logits [V], float32."""
        step = self.whole_step if self.in_place is not None else None
        if step is None or step.ends is None:
            return self.logits(self.extend(torch.tensor([token_id], device=self.cos.device)))[0]
        cos_C, sin_C, first = self.cos[self.position, 0], self.sin[self.position, 0], self.blocks[0]
        x_1D = self.room_1D if step.looks_up else self.embed(torch.tensor([token_id])).to(self.step_dtype).contiguous()
        with self._entered():
            return step.logits_over_sides(token_id, x_1D, cos_C, sin_C, self.turns, first.heads, first.kv_heads, self.scale, first.neurons)

    def extend(self, ids_T: Tensor) -> Tensor:
        """Last hidden states [T, D] of tokens put behind the others."""
        dtype = self._dtype_for(len(ids_T))
        if len(ids_T) == 1 and self.in_place is not None:
            return self._step_in_place(ids_T, self.in_place)
        x_TD = self.embed(ids_T).to(dtype)
        for number, block in enumerate(self.blocks):
            x_TD = x_TD + block.out(self._attend_rows(number, block, block.attention_norm(x_TD)))
            x_TD = x_TD + block.down(block.gated(block.gate_up(block.mlp_norm(x_TD))))
        self.position += len(ids_T)
        return self.norm(x_TD)

    def _step_in_place(self, ids_1: Tensor, places: list[tuple[Place, Place]]) -> Tensor:
        """One token on a CPU, attention over each block's rows in the form in which they are held."""
        with self._entered():
            x_1D = self._through(self.embed(ids_1).to(self.step_dtype).contiguous(), places)
        return self.norm(x_1D)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """C++ counts the rows for one token."""
        for place in chain.from_iterable(self.in_place or ()):
            place.enter()
        yield
        for place in chain.from_iterable(self.in_place or ()):
            place.leave()
        self.position += 1

    def _through(self, x_1D: Tensor, places: list[tuple[Place, Place]]) -> Tensor:
        cos_C, sin_C, first = self.cos[self.position, 0], self.sin[self.position, 0], self.blocks[0]
        if self.whole_step is not None:
            return self.whole_step.over_sides(x_1D, cos_C, sin_C, self.turns, first.heads, first.kv_heads, self.scale, first.neurons)
        for block, into, (keys, values) in zip(self.blocks, self.joined, places, strict=True):
            qkv = into(block.attention_norm(x_1D))
            attended = cpu_cache.attend(qkv, cos_C, sin_C, self.turns, keys.held, values.held, block.heads, block.kv_heads, self.scale)
            x_1D = x_1D + block.out(attended)
            x_1D = x_1D + block.down(block.gated(block.gate_up(block.mlp_norm(x_1D))))
        return x_1D

    def _attend_rows(self, number: int, block: Block, x_TD: Tensor) -> Tensor:
        """[T, heads * C], before the output matrix."""
        keys, values = self.sides[number]
        query_THC = self._turned(self.queries[number](x_TD), block, 0, self.position)
        if keys.up_NR is None:
            keys.rows.append(self._turned(keys.into(x_TD), block, 1, self.position).flatten(1))
            keys_SGC = keys.rows.read().to(x_TD.dtype).unflatten(1, (-1, self.channels))
        else:
            keys.rows.append(keys.into(x_TD))
            keys_SGC = self._turned(keys.expanded(keys.rows.read().to(x_TD.dtype)), block, 1, 0)
        values.rows.append(values.into(x_TD))
        return self._mix_rows(block, query_THC, keys_SGC, values, values.rows.read().to(x_TD.dtype))

    def _turned(self, flat_TN: Tensor, block: Block, which: int, start: int) -> Tensor:
        """Heads [T, ., C] of queries (0) or keys (1), normed where the family norms them, turned to positions from `start`."""
        x_THC = flat_TN.unflatten(1, (-1, self.channels))
        if block.head_norms:
            x_THC = block.head_norms[which](x_THC)
        cos, sin = (table[start : start + len(x_THC)].to(x_THC.dtype) for table in (self.cos, self.sin))
        return torch.addcmul(x_THC * cos, x_THC.roll(self.channels // 2, -1), sin)

    def _mix_rows(self, block: Block, query_THC: Tensor, keys_SGC: Tensor, side: Side, rows_SD: Tensor) -> Tensor:
        """Every query head mixes the rows of its group: [T, heads * C]."""
        values_SGE, shared = self._per_head(side, rows_SD, block.kv_heads), block.key_head_of
        if shared is not None:  # groups of unlike size: each query head gets rows of its own
            keys_SGC, values_SGE = keys_SGC.index_select(1, shared), values_SGE.index_select(1, shared)
        length, held, groups = len(query_THC), len(keys_SGC), keys_SGC.shape[1]
        query = query_THC.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, G, repeats * T, C]
        mask = None
        if length > 1:
            ones = torch.ones(length, held, dtype=torch.bool, device=query_THC.device)
            mask = ones.tril(held - length).repeat(block.heads // groups, 1)
        keys, values = (rows.transpose(0, 1)[None] for rows in (keys_SGC, values_SGE))
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        mixed_TGRE = mixed[0].unflatten(1, (-1, length)).permute(2, 0, 1, 3)
        return self._raised(side, mixed_TGRE, block).flatten(1)

    def _per_head(self, side: Side, rows_SD: Tensor, kv_heads: int) -> Tensor:
        """What each head of values mixes, [S, G, E]: its channels, its own latent, or the one that all share."""
        if side.up_NR is None or self.each:
            return rows_SD.unflatten(1, (kv_heads, -1))
        return rows_SD[:, None].expand(-1, kv_heads, -1)

    def _raised(self, side: Side, mixed_TGRE: Tensor, block: Block) -> Tensor:
        """Mixed latents through the factor of their head: [T, G, repeats, C]."""
        if side.up_NR is None:
            return mixed_TGRE
        up_GCE = side.up_NR.unflatten(0, (block.kv_heads, -1))
        if self.each:
            up_GCE = torch.stack([up_CR.unflatten(1, (block.kv_heads, -1))[:, head] for head, up_CR in enumerate(up_GCE)])
        shared = torch.arange(block.kv_heads, device=up_GCE.device) if block.key_head_of is None else block.key_head_of
        raised = torch.einsum("tgre,gce->tgrc", mixed_TGRE, up_GCE[shared].to(mixed_TGRE.dtype))
        if side.bias_N is None:
            return raised
        return raised + side.bias_N.to(raised.dtype).unflatten(0, (block.kv_heads, 1, -1))[shared]  # weights of a mix sum to one
