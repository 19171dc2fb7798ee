"""Codes survive packing, and packed bytes are exactly those the accounting names."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.kernels.formats import concat, join_rows, pack, pack_codes, unpack_codes
from bitpress.kernels.layout import BITS, UniformLayout


@settings(max_examples=120, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_codes_survive_the_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stream = pack_codes(codes, bits)
    assert stream.shape == (rows, math.ceil(columns * bits / 8))
    assert torch.equal(unpack_codes(stream, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_stream_is_little_endian(bits: int) -> None:
    """Bit i of code k is bit (k * bits + i) of the row: checked with Python's integers."""
    codes = torch.randint(0, 2**bits, (3, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    for row, stream in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        whole = sum(code << (index * bits) for index, code in enumerate(row))
        assert bytes(stream) == whole.to_bytes(math.ceil(13 * bits / 8), "little")


def test_known_bytes() -> None:
    assert pack_codes(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0xF3]]
    assert pack_codes(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 1]]
    assert pack_codes(torch.tensor([[7, 0, 7]], dtype=torch.uint8), 3).tolist() == [[0b11000111, 0b1]]


@pytest.mark.parametrize("bits", [1, 7, 9])
def test_a_width_without_a_format_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="known: 2, 3, 4"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32, 64, 48])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16, 64), (7, 100), (3, 288)])
def test_bytes_are_those_of_the_layout(packed, shape, bits, group, symmetric) -> None:
    layout = UniformLayout(bits, group, symmetric)
    made = packed(shape, layout)
    assert made.nbytes == layout.nbytes(*shape) == sum(tensor.numel() * tensor.element_size() for tensor in made.tensors.values())


def test_what_does_not_fit_is_refused() -> None:
    layout, codes = UniformLayout(4, 32), torch.zeros(2, 64, dtype=torch.uint8)
    scales, zeros = torch.ones(2, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="rounded to bfloat16"):
        pack(codes, scales * 1.001, zeros, layout)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        pack(codes + 16, scales, zeros, layout)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        pack(codes, scales, zeros - 1, layout)
    with pytest.raises(ValueError, match="one a row and group"):
        pack(codes, scales[:, :1], zeros, layout)
    with pytest.raises(ValueError, match="zeros"):
        pack(codes, scales, None, layout)


def test_rows_are_views_and_join_without_a_copy(packed) -> None:
    whole = packed((48, 64), UniformLayout(3, 32))
    joined = concat([whole.rows(0, 16), whole.rows(16, 48)])
    assert joined.shape == (48, 64) and joined.tensors["codes"].data_ptr() == whole.tensors["codes"].data_ptr()
    apart = join_rows([whole.tensors["codes"][16:], whole.tensors["codes"][:16]])
    assert torch.equal(apart, torch.cat((whole.tensors["codes"][16:], whole.tensors["codes"][:16])))


def test_unlike_matrices_do_not_join(packed) -> None:
    with pytest.raises(ValueError, match="same layout"):
        concat([packed((16, 64), UniformLayout(4)), packed((16, 64), UniformLayout(3))])
