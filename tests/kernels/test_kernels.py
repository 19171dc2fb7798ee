"""torch's ready kernels against the oracle: float64 products of the dequantised matrix, over the grid where kernels differ.

The C++ kernels would take most of these first; they are put aside here, as on a machine without a compiler.
"""

import pytest
import torch

from bitpress.kernels import cpu, cpu_build, dispatch, reference
from bitpress.kernels.layout import BITS, UniformLayout
from bitpress.kernels.packed import PackedLinear

ROW = 0


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: None)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [ROW, 32, 64, 128, 48])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(96, 576), (48, 288), (32, 50), (40, 64)])
def test_products_are_as_exact_as_dense_bfloat16(packed, shape, bits, group, symmetric) -> None:
    """Relative error at most twice that of a dense bfloat16 product of the same weights, also for inputs with a mean."""
    matrix = packed(shape, UniformLayout(bits, group, symmetric))
    linear, dense = PackedLinear(matrix), reference.dequantize(matrix, torch.bfloat16)
    for batch in (1, 7, 64, 65):
        for mean in (0.0, 1.0):
            x = (torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch)) + mean).bfloat16()
            exact = reference.matmul(x, matrix)
            assert error(linear(x), exact) <= 2 * error(x @ dense.T, exact), (batch, mean, linear.kernel_for(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 16, 33])
def test_other_input_types_are_dequantised(packed, dtype, batch) -> None:
    matrix = packed((48, 288), UniformLayout(4, 64))
    linear, x = PackedLinear(matrix), torch.randn(batch, 288).to(dtype)
    assert linear.kernel_for(batch, dtype).kernel == dispatch.DEQUANTIZE
    y = linear(x)
    assert y.dtype == dtype and error(y, reference.matmul(x, matrix)) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [ROW, 64, 48])
@pytest.mark.parametrize("bits", BITS)
def test_fast_dequantising_is_the_oracles_to_the_bit(packed, bits, group, dtype, monkeypatch) -> None:
    matrix = packed((40, 100), UniformLayout(bits, group))
    monkeypatch.setattr(cpu, "CHUNK", 700)  # several chunks of rows, the last one short
    assert torch.equal(cpu.dequantize(matrix, dtype), reference.dequantize(matrix, dtype))


def test_large_matrices_are_multiplied_in_slices(packed, monkeypatch) -> None:
    matrix, x = packed((50, 64), UniformLayout(4)), torch.randn(3, 64)
    whole = cpu.dequantized_matmul(x, matrix)
    monkeypatch.setattr(cpu, "SCRATCH", 64 * 16)
    assert torch.allclose(cpu.dequantized_matmul(x, matrix), whole, atol=1e-6)


@pytest.mark.parametrize("layout", [UniformLayout(4), UniformLayout(6), UniformLayout(8, ROW, True), UniformLayout(3, 48)])
@pytest.mark.parametrize("batch", [1, 80])
def test_nan_and_infinity_come_through(packed, layout, batch) -> None:
    linear, x = PackedLinear(packed((32, 128), layout)), torch.ones(batch, 128).bfloat16()
    for value in (float("nan"), float("inf")):
        x[0, 3] = value
        y = linear(x)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("layout", [UniformLayout(4), UniformLayout(8, ROW, True)])
def test_inputs_of_any_stride_shape_and_alignment(packed, layout) -> None:
    linear, x = PackedLinear(packed((32, 128), layout)), torch.randn(6, 128).bfloat16()
    y = linear(x)
    assert torch.equal(linear(x.T.contiguous().T), y)
    assert torch.equal(linear(x.view(2, 3, 128)), y.view(2, 3, 32))
    shifted = torch.cat((torch.zeros(1).bfloat16(), x[:1].flatten()))[1:]
    assert shifted.data_ptr() % 32 and torch.equal(linear(shifted[None]), linear(x[:1].clone()))
    assert linear(x[:0]).shape == (0, 32)


def test_same_inputs_same_bits_and_a_bias(packed) -> None:
    matrix, x, bias = packed((32, 128), UniformLayout(4)), torch.randn(2, 128).bfloat16(), torch.randn(32).bfloat16()
    linear = PackedLinear(matrix, bias)
    assert torch.equal(linear(x), linear(x)) and torch.equal(linear(x), PackedLinear(matrix)(x) + bias)
    assert error(linear(x.float()), reference.matmul(x, matrix, bias)) < 1e-6


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "batch", "kernel", "words"),
    [
        (UniformLayout(4), (32, 128), torch.bfloat16, 1, dispatch.INT4, "ready kernel"),
        (UniformLayout(3), (32, 128), torch.bfloat16, 1, dispatch.INT4, "3-bit codes sit in 4-bit slots"),
        (UniformLayout(4), (32, 288), torch.bfloat16, 1, dispatch.INT4, "ready kernel"),
        (UniformLayout(6), (32, 128), torch.bfloat16, 1, dispatch.INT4_SPLIT, "6-bit"),
        (UniformLayout(8, ROW, False), (32, 128), torch.bfloat16, 1, dispatch.INT4_SPLIT, "8-bit"),
        (UniformLayout(8, ROW, True), (33, 128), torch.bfloat16, 1, dispatch.INT8, "one scale a row"),
        (UniformLayout(8, ROW, True), (32, 100), torch.bfloat16, 1, dispatch.DEQUANTIZE, "not 100"),
        (UniformLayout(4), (33, 128), torch.bfloat16, 1, dispatch.DEQUANTIZE, "not 33"),
        (UniformLayout(4, 48), (32, 96), torch.bfloat16, 1, dispatch.DEQUANTIZE, "groups of 48"),
        (UniformLayout(4), (32, 128), torch.float32, 1, dispatch.DEQUANTIZE, "float32"),
        (UniformLayout(4), (32, 128), torch.bfloat16, 65, dispatch.DEQUANTIZE, "above 64 rows"),
    ],
)  # fmt: skip
def test_dispatch_gives_its_reason(layout, shape, dtype, batch, kernel, words) -> None:
    choice = dispatch.choose(layout, shape, "cpu", dtype, batch)
    assert choice.kernel == kernel and words in choice.reason


def test_old_processors_dequantise(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in dispatch.choose(UniformLayout(4), (32, 128), "cpu", torch.bfloat16, 1).reason


def test_a_form_that_cannot_be_is_refused(packed) -> None:
    with pytest.raises(ValueError, match="groups of 48"):
        cpu.int4_form(packed((32, 96), UniformLayout(4, 48)))
