"""Rows of a KV cache in the forms that a recipe can ask for: as they are, as codes, or with old ones forgotten. Knows rows; no attention.

A side of a block's cache is a growing matrix X [S, D]: S tokens, D numbers a token (all heads' channels, or a latent). Codes are
KIVI's (METHODS 17.4): keys share a scale over a group of tokens of one channel, values over a group of channels of one
token; x is low + code * scale, both bfloat16 and rounded before the codes are chosen. The last `window` tokens stay as they are.
"""

from math import ceil
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from bitpress.engine.recipe import CacheSide as SideScheme
from bitpress.engine.recipe import KVCache
from bitpress.kernels import cpu_cache
from bitpress.kernels.cpu_cache import CacheSide
from bitpress.kernels.formats import pack_codes, unpack_codes


class Rows(Protocol):
    """One side of one block's cache."""

    def append(self, x_TD: Tensor) -> None: ...

    def read(self) -> Tensor:
        """All rows that are held, [S, D]."""

    def reset(self) -> None: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold them."""


class Coded(NamedTuple):
    """Groups as codes: uint8 [..., ceil(g * bits / 8)], lows and scales bfloat16 [...]."""

    codes: Tensor
    lows: Tensor
    scales: Tensor


def encode(groups: Tensor, bits: int) -> Coded:
    """Least and largest value of each group [..., g] become the first and last of 2**bits even levels."""
    low, high = groups.float().aminmax(dim=-1, keepdim=True)
    low = low.bfloat16().float()
    scale = ((high - low) / (2**bits - 1)).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    codes = ((groups.float() - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    packed = pack_codes(codes.flatten(0, -2), bits).view(*groups.shape[:-1], -1)
    return Coded(packed, low[..., 0].bfloat16(), scale[..., 0].bfloat16())


def decode(coded: Coded, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """The groups [..., size] that codes stand for."""
    codes = unpack_codes(coded.codes.flatten(0, -2), bits, size).view(*coded.lows.shape, size)
    return torch.addcmul(coded.lows.to(dtype).unsqueeze(-1), codes.to(dtype), coded.scales.to(dtype).unsqueeze(-1))


class DenseRows:
    """Rows as they are, room for `length` of them taken at once."""

    def __init__(self, length: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.held_LD = torch.empty(length, width, dtype=dtype, device=device)
        self.count = 0

    def append(self, x_TD: Tensor) -> None:
        """Put rows behind the others."""
        self.held_LD[self.count : self.count + len(x_TD)] = x_TD
        self.count += len(x_TD)

    def read(self) -> Tensor:
        """A view of the rows."""
        return self.held_LD[: self.count]

    def reset(self) -> None:
        """Hold none."""
        self.count = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Rows as they are, and what is coded."""
        return self.count, 0

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self.count, _ = counts

    def in_place(self, up_NR: Tensor | None, each: bool) -> CacheSide:
        """The same storage for `cpu_cache.attend`."""
        return cpu_cache.side(self.held_LD, up_NR, each)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.read().numel() * self.held_LD.element_size()


class RecentRows:
    """The first `sinks` rows and the last `recent`; what is between is forgotten once it has been read."""

    def __init__(self, sinks: int, recent: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sinks, self.recent = sinks, recent
        self.none_0D = torch.empty(0, width, dtype=dtype, device=device)
        self.held_SD = self.none_0D

    def append(self, x_TD: Tensor) -> None:
        """Forget what is too old for the rows that come, then put them behind the others."""
        if len(self.held_SD) > self.sinks + self.recent:
            self.held_SD = torch.cat((self.held_SD[: self.sinks], self.held_SD[-self.recent :]))
        self.held_SD = torch.cat((self.held_SD, x_TD.to(self.none_0D.dtype)))

    def read(self) -> Tensor:
        """The rows that are held, those of the last append among them."""
        return self.held_SD

    def reset(self) -> None:
        """Hold none."""
        self.held_SD = self.none_0D

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that the next step will see."""
        return min(len(self.held_SD), self.sinks + self.recent) * self.held_SD.shape[1] * self.held_SD.element_size()


class CodedRows:
    """Old rows as codes, the last `window` (and, by channel, what does not fill a group yet) as they are."""

    def __init__(self, side: SideScheme, window: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bits, self.by_channel, self.window, self.width = side.bits, side.axis == "channel", window, width
        self.size = side.group_size or width
        self.recent = DenseRows(length, width, dtype, device)
        lead = (length // self.size, width) if self.by_channel else (length, ceil(width / self.size))
        codes = torch.empty(*lead, ceil(self.size * side.bits / 8), dtype=torch.uint8, device=device)
        self.coded = Coded(codes, *(torch.empty(lead, dtype=torch.bfloat16, device=device) for _ in range(2)))
        self.filled = 0  # groups of tokens by channel, tokens otherwise

    def append(self, x_TD: Tensor) -> None:
        """Put rows behind the others; those that leave the window become codes."""
        self.recent.append(x_TD)
        span = self.size if self.by_channel else 1
        leaving = max(0, self.recent.count - self.window) // span
        if leaving:
            rows_TD = self.recent.held_LD[: leaving * span]
            for held, new in zip(self.coded, encode(self._grouped(rows_TD), self.bits), strict=True):
                held[self.filled : self.filled + leaving] = new
            self.filled += leaving
            stay_TD = self.recent.held_LD[leaving * span : self.recent.count].clone()
            self.recent.reset()
            self.recent.append(stay_TD)

    def _grouped(self, rows_TD: Tensor) -> Tensor:
        """By channel [groups, D, g], otherwise [T, groups, g]; a short last group is filled up with its row's last number."""
        if self.by_channel:
            return rows_TD.unflatten(0, (-1, self.size)).transpose(1, 2)
        short = -self.width % self.size
        full_TD = F.pad(rows_TD[None], (0, short), mode="replicate")[0] if short else rows_TD
        return full_TD.unflatten(1, (-1, self.size))

    def read(self) -> Tensor:
        """All rows, the codes decoded."""
        recent_TD = self.recent.read()
        if not self.filled:
            return recent_TD
        groups = decode(Coded(*(held[: self.filled] for held in self.coded)), self.bits, self.size, recent_TD.dtype)
        old_TD = groups.transpose(1, 2).flatten(0, 1) if self.by_channel else groups.flatten(1)[:, : self.width]
        return torch.cat((old_TD, recent_TD))

    def reset(self) -> None:
        """Hold none."""
        self.filled = 0
        self.recent.reset()

    @property
    def counts(self) -> tuple[int, int]:
        """Rows as they are, and groups (by channel) or tokens as codes."""
        return self.recent.count, self.filled

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self.recent.count, self.filled = counts

    def in_place(self, up_NR: Tensor | None, each: bool) -> CacheSide:
        """The same storage for `cpu_cache.attend`."""
        return cpu_cache.with_codes(self.recent.in_place(up_NR, each), self.coded, self.bits, self.size, self.by_channel, self.window)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, lows, scales and the rows that are still as they were."""
        return self.recent.nbytes + sum(held[: self.filled].numel() * held.element_size() for held in self.coded)


def rows_for(cache: KVCache, side: SideScheme | None, length: int, width: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """What holds one side of a block's cache under a scheme."""
    if cache.window:
        return RecentRows(cache.window.sinks, cache.window.recent, width, dtype, device)
    if side is None:
        return DenseRows(length, width, dtype, device)
    return CodedRows(side, cache.residual_window, length, width, dtype, device)
