"""What every layout promises: exact bytes, a lossless way to a file's record and back, rows, kernels that agree with the oracle."""

import json

import pytest
import torch
from torch import nn

from bitpress.kernels import reference
from bitpress.kernels.formats import can_concat, concat
from bitpress.kernels.layout import (
    BinaryLayout,
    BitmapLayout,
    DenseLayout,
    Layout,
    PairLayout,
    TableLayout,
    TwoFourLayout,
    UniformLayout,
    layout_from_dict,
    layout_to_dict,
    words_of,
)  # fmt: skip
from bitpress.kernels.packed import PackedLinear, fuse

SHAPES = [(16, 64), (7, 100), (48, 288)]


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_layout(packed, any_layout: Layout, shape: tuple[int, int]) -> None:
    made = packed(shape, any_layout)
    assert made.layout == any_layout and made.shape == shape
    assert made.nbytes == any_layout.nbytes(*shape) == sum(tensor.numel() * tensor.element_size() for tensor in made.tensors.values())


def test_bytes_by_hand() -> None:
    assert TableLayout("nf4", 64).nbytes(2, 576) == 2 * (288 + 18)  # 4.25 bits a weight
    assert TableLayout("nf4", 64, double_scales=True).nbytes(2, 576) == 2 * (288 + 9 + 2)
    assert TableLayout("codebook", 64).nbytes(2, 576) == 2 * (288 + 18) + 32  # and sixteen levels
    assert BinaryLayout(3, 64).nbytes(2, 576) == 2 * (3 * 72 + 9 * 8)
    assert BitmapLayout(0.5).nbytes(10, 100) == 10 * (13 + 100)
    assert TwoFourLayout(DenseLayout()).nbytes(10, 64) == 10 * 72  # 9 bits a weight
    assert TwoFourLayout(UniformLayout(4, 32)).nbytes(10, 64) == 10 * (16 + 2 + 1 + 8)
    assert PairLayout(1.0, DenseLayout(), DenseLayout()).nbytes(576, 576) == 2 * 576 * 576  # the break-even rank
    assert UniformLayout(4, 64, zero="float").nbytes(1, 576) == 288 + 18 + 18


def test_a_layout_survives_json_and_has_words(any_layout: Layout) -> None:
    assert layout_from_dict(json.loads(json.dumps(layout_to_dict(any_layout)))) == any_layout
    assert words_of(any_layout)


def test_records_of_older_files_are_read() -> None:
    assert layout_from_dict({"bits": 4, "group_size": 64, "symmetric": False, "name": "uniform"}) == UniformLayout(4)
    with pytest.raises(ValueError, match="Unknown layout"):
        layout_from_dict({"name": "lattice"})


def test_rows_are_those_of_the_whole(packed, any_layout: Layout) -> None:
    made = packed((12, 64), any_layout)
    whole = reference.dequantize(made)
    assert torch.allclose(reference.dequantize(made.rows(3, 9)), whole[3:9], atol=1e-7)
    if can_concat(any_layout):
        joined = concat([made, packed((8, 64), any_layout, seed=5)])
        assert joined.nbytes == any_layout.nbytes(20, 64) and torch.equal(reference.dequantize(joined)[:12], whole)
        assert torch.equal(reference.dequantize(joined.rows(12, 20)), reference.dequantize(packed((8, 64), any_layout, seed=5)))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("batch", "mean"), [(1, 0.0), (3, 1.0), (64, 0.0), (65, 1.0)])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_packed_layer_multiplies_like_the_oracle(packed, any_layout: Layout, shape: tuple[int, int], batch: int, mean: float) -> None:
    """Relative error at most twice that of dense products of the same weights in the same type; a pair rounds once more."""
    made = packed(shape, any_layout)
    linear, bound = PackedLinear(made), 4 if isinstance(any_layout, PairLayout) else 2
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch)) + mean
    exact, dense = reference.matmul(x.bfloat16(), made), reference.dequantize(made, torch.bfloat16)
    assert relative(linear(x.bfloat16()), exact) <= bound * relative(x.bfloat16() @ dense.T, exact), linear.kernel_for(batch)
    assert relative(linear(x), reference.matmul(x, made)) <= relative(x.bfloat16() @ dense.T, exact)
    assert relative(linear(x.half()), reference.matmul(x.half(), made)) <= 2 * relative(x.bfloat16() @ dense.T, exact)


def test_inputs_of_any_stride_and_none_at_all(packed, any_layout: Layout) -> None:
    linear, x = PackedLinear(packed((32, 128), any_layout)), torch.randn(6, 128).bfloat16()
    y = linear(x)
    assert torch.equal(linear(x.T.contiguous().T), y) and torch.equal(linear(x), y)
    assert torch.equal(linear(x.view(2, 3, 128)), y.view(2, 3, 32))
    assert linear(x[:0]).shape == (0, 32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_come_out_finite(packed, any_layout: Layout, bad: float) -> None:
    """An input that no weight of a row meets may leave that row's output finite where zeros are not multiplied."""
    linear, x = PackedLinear(packed((32, 128), any_layout)), torch.ones(2, 128).bfloat16()
    x[0, 3] = bad
    y = linear(x)
    met = reference.dequantize(linear.packed)[:, 3] != 0
    assert not y[0][met].isfinite().any() and y[1].isfinite().all()


def test_a_layer_is_saved_moved_and_cast_without_losing_a_bit(packed, any_layout: Layout) -> None:
    linear = PackedLinear(packed((32, 128), any_layout))
    before, types = linear.dequantize(), {name: tensor.dtype for name, tensor in linear.packed.tensors.items()}
    moved = nn.Sequential(linear).half().float()[0]
    assert {name: tensor.dtype for name, tensor in moved.packed.tensors.items()} == types and torch.equal(moved.dequantize(), before)
    other = PackedLinear(packed((32, 128), any_layout, seed=3))
    if all(tensor.shape == linear.packed.tensors[name].shape for name, tensor in other.packed.tensors.items()):
        other.load_state_dict(linear.state_dict())
        assert torch.equal(other.dequantize(), before)
    assert linear.stored_bytes == any_layout.nbytes(32, 128) <= linear.resident_bytes and linear.kernel and linear.reason


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_are_rounded_a_row_at_a_time(packed, any_layout: Layout, bits: int) -> None:
    made, bias = packed((32, 128), any_layout), torch.randn(32)
    linear, x = PackedLinear(made, bias, activation_bits=bits), torch.randn(5, 128) * torch.tensor([1.0, 10, 0.01, 0, 1])[:, None]
    wanted = reference.matmul(x, made, bias, activation_bits=bits)
    assert relative(linear(x), wanted) < (1e-2 if isinstance(any_layout, PairLayout) else 2e-3)
    assert relative(linear(x.bfloat16()), reference.matmul(x.bfloat16(), made, bias, activation_bits=bits)) < 2**-7
    if can_concat(any_layout):
        with pytest.raises(ValueError, match="activations"):
            fuse([linear, PackedLinear(made, bias)])


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_of_activations_are_whole_numbers_of_their_width(bits: int) -> None:
    x = torch.randn(7, 50)
    levels, scale = reference.quantize_rows(x, bits)
    assert torch.equal(levels, levels.round()) and levels.abs().amax(1).eq(2 ** (bits - 1) - 1).all()
    assert ((levels * scale - x).abs() <= scale * 0.5001).all()
