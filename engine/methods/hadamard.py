"""Hadamard matrices of the sizes that models have, and rotation by one. Knows numbers only (METHODS, appendix B).

A matrix of +1 and -1 with H H^T = n I. Of size 2^k by doubling, of size q + 1 or 2 (q + 1) from the squares modulo a prime
q (Paley 1933), and of products of such sizes: 576 = 16 * 36, 1536 = 128 * 12. Rotating by a product is two small matrix
products instead of one large.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def factors(size: int) -> tuple[Tensor, Tensor] | None:
    """Two Hadamard matrices, float64, whose Kronecker product has this size; None where this module knows none."""
    powers = [1 << bit for bit in range(size.bit_length()) if size % (1 << bit) == 0]
    for power in reversed(powers):
        if (small := _paley(size // power)) is not None:
            left, right = _doubled(power), small
            while len(left) > 2 * len(right):  # two factors of like size are the fastest
                left, right = _doubled(len(left) // 2), torch.kron(_doubled(2), right)
            return left, right
    return None


def _doubled(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(size: int) -> Tensor | None:
    """Sizes 1, q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4."""
    if size <= 2:
        return _doubled(size)
    if size % 4:
        return None
    if _is_prime(size - 1):
        return _bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        same = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1, 1.0), same) + torch.kron(torch.eye(size // 2, dtype=torch.float64), other)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _bordered(prime: int, left: float) -> Tensor:
    """[[0, 1 ... 1], [left, Q]] with Q_ij = 1 where i - j is a square modulo the prime, -1 where it is not, 0 where i = j."""
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)], dtype=torch.float64)
    place = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0], matrix[1:, 0] = 0.0, left
    matrix[1:, 1:] = character[(place[:, None] - place[None, :]) % prime]
    return matrix


class Rotation:
    """x -> x Q with Q = diag(signs) H / sqrt(n); where no Hadamard matrix of the size is known, a random orthogonal one."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.parts = size, factors(size)
        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        if self.parts is None:
            random = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
            self.parts = (torch.ones(1, 1, dtype=torch.float64), random * size**0.5)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., n] of any float type; x Q of the same type."""
        signs, left, right = (part.to(x.device, x.dtype) for part in (self.signs, *self._scaled()))
        return _kron_right((x * signs).view(*x.shape[:-1], len(left), len(right)), left, right).view(x.shape)

    def back(self, x: Tensor) -> Tensor:
        """x Q^T: what undoes the rotation."""
        signs, left, right = (part.to(x.device, x.dtype) for part in (self.signs, *self._scaled()))
        return _kron_right(x.view(*x.shape[:-1], len(left), len(right)), left.t(), right.t()).reshape(x.shape) * signs

    def _scaled(self) -> tuple[Tensor, Tensor]:
        assert self.parts is not None
        left, right = self.parts
        return left / len(left) ** 0.5, right / len(right) ** 0.5


def _kron_right(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Row vectors, laid out as [..., a, b], times the Kronecker product of left [a, a] and right [b, b]."""
    return left.t() @ (x @ right)
