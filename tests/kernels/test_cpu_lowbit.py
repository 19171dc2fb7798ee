"""The C++ kernels against float64 over shapes, widths and groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.kernels import cpu_build, cpu_lowbit, dispatch, reference
from bitpress.kernels.layout import BITS, BinaryLayout, TableLayout, UniformLayout, words_of
from bitpress.kernels.packed import PackedLinear

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
SHAPES = [(16, 32), (33, 70), (192, 576), (100, 288), (1, 4)]


def random_matrix(outputs: int, inputs: int, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = 1 if group == 0 or group >= inputs else -(-inputs // group)
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (outputs, groups), dtype=torch.uint8)
    return codes, (torch.rand(outputs, groups) + 0.1).bfloat16(), zeros


def exact_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    of_input = torch.arange(codes.shape[1]) // (group or codes.shape[1])
    return (codes.double() - zeros.double()[:, of_input]) * scales.double()[:, of_input]


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("bits", cpu_lowbit.PLANES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_is_closer_to_float64_than_a_bf16_matmul(bits: int, shape: tuple[int, int], group: int, rows: int) -> None:
    torch.manual_seed(bits)
    codes, scales, zeros = random_matrix(*shape, bits, group)
    weight = exact_weight(codes, scales, zeros, group)
    x = torch.randn(rows, shape[1]).bfloat16()
    wanted = x.double() @ weight.T
    found = cpu_lowbit.linear(x, cpu_lowbit.tile(codes, scales, zeros, bits, group))
    dense = relative(x @ weight.bfloat16().T, wanted)
    assert relative(found, wanted) <= 2 * dense + 2**-9
    assert relative(cpu_lowbit.linear(x.float(), cpu_lowbit.tile(codes, scales, zeros, bits, group)), wanted) < 1e-3


@given(outputs=st.integers(1, 40), inputs=st.integers(1, 130), rows=st.integers(0, 6), bits=st.sampled_from(list(cpu_lowbit.PLANES)))
@settings(max_examples=40, deadline=None)
def test_any_shape(outputs: int, inputs: int, rows: int, bits: int) -> None:
    codes, scales, zeros = random_matrix(outputs, inputs, bits, 32)
    x = torch.randn(rows, inputs)
    wanted = x.double() @ exact_weight(codes, scales, zeros, 32).T
    found = cpu_lowbit.linear(x, cpu_lowbit.tile(codes, scales, zeros, bits, 32))
    assert found.shape == (rows, outputs)
    assert torch.allclose(found.double(), wanted, atol=1e-3 * float(x.abs().max() if rows else 1) * inputs * 2**bits)


@pytest.mark.parametrize("layout", [*(UniformLayout(bits) for bits in BITS), UniformLayout(8, 0, True), UniformLayout(4, 32, True)])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (64, torch.bfloat16), (1, torch.float32), (200, torch.float32)])
def test_packed_layers_run_on_it(packed, layout: UniformLayout, rows: int, dtype: torch.dtype) -> None:
    """Inputs with a mean too, where an error in the zeros would add up."""
    matrix = packed((40, 100), layout)
    linear, x = PackedLinear(matrix), (torch.randn(rows, 100) + 1).to(dtype)
    assert linear.kernel_for(rows, dtype).kernel == dispatch.LOWBIT
    wanted = reference.matmul(x, matrix)
    dense = relative((x.bfloat16() @ reference.dequantize(matrix, torch.bfloat16).T), wanted)
    assert relative(linear(x), wanted) <= 2 * dense


def test_large_bf16_batches_meet_panels_where_there_are_any(packed) -> None:
    linear = PackedLinear(packed((32, 64), UniformLayout(4)))
    choice = linear.kernel_for(65, torch.bfloat16)
    assert ("32 rows of weights" if cpu_build.panels(65, torch.bfloat16) else "above 64 rows") in choice.reason
    assert "float16" in linear.kernel_for(1, torch.float16).reason and linear.kernel_for(1, torch.float16).kernel == dispatch.DEQUANTIZE


PANEL_LAYOUTS = (*(UniformLayout(bits) for bits in BITS), UniformLayout(4, 0, True), UniformLayout(3, 32, zero="float"), TableLayout("nf4", 16),
                 TableLayout("fp4", 0, True), BinaryLayout(1), BinaryLayout(3, 32), BinaryLayout(4, 0))  # fmt: skip


@pytest.mark.parametrize("layout", PANEL_LAYOUTS, ids=words_of)
@pytest.mark.parametrize(("shape", "rows"), [((33, 72), 24), ((100, 288), 67), ((8, 40), 130), ((192, 576), 29)])
def test_panels_are_a_dense_bf16_product(packed, layout, shape: tuple[int, int], rows: int) -> None:
    """The weights are the oracle's to the bit and sums are float32: only the order of adding differs from a dense product."""
    if not cpu_build.panels(rows, torch.bfloat16):
        pytest.skip("this processor has no bfloat16 dot products")
    matrix = packed(shape, layout)
    linear, x = PackedLinear(matrix), (torch.randn(rows, shape[1]) + 0.5).bfloat16()
    assert linear.kernel_for(rows).kernel != dispatch.DEQUANTIZE
    exact = x.double() @ reference.dequantize(matrix, torch.bfloat16).double().T
    assert relative(linear(x), exact) < 2**-8 and torch.equal(linear(x), linear(x))
    x[3, 5] = float("nan")
    assert linear(x)[3].isnan().all() and linear(x)[4:].isfinite().all()


def test_symmetric_codes_need_no_zeros_and_bias_is_added() -> None:
    codes, scales, _ = random_matrix(20, 64, 4, 64)
    x, bias = torch.randn(3, 64), torch.randn(20)
    wanted = x.double() @ exact_weight(codes, scales, torch.full((20, 1), 8), 64).T + bias.double()
    assert relative(cpu_lowbit.linear(x, cpu_lowbit.tile(codes, scales, None, 4, 64), bias), wanted) < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_come_out_finite(bad: float) -> None:
    tiles = cpu_lowbit.tile(*random_matrix(16, 64, 4, 32), 4, 32)
    x = torch.randn(2, 64)
    x[0, 5] = bad
    out = cpu_lowbit.linear(x, tiles)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_input_that_is_not_contiguous() -> None:
    tiles = cpu_lowbit.tile(*random_matrix(16, 64, 4, 32), 4, 32)
    x = torch.randn(64, 3)
    assert torch.equal(cpu_lowbit.linear(x.T, tiles), cpu_lowbit.linear(x.T.contiguous(), tiles))


def test_refuses_other_dtypes_and_widths() -> None:
    tiles = cpu_lowbit.tile(*random_matrix(16, 64, 4, 32), 4, 32)
    with pytest.raises(ValueError, match="rows of 64"):
        cpu_lowbit.linear(torch.randn(1, 64).half(), tiles)
    assert "no 7-bit path" in cpu_lowbit.refusal(7, 64, 64)
    assert "multiple of 32" in cpu_lowbit.refusal(4, 48, 96)


def test_no_compiler_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_NO_COMPILER", "1")
    assert cpu_build._library.__wrapped__() is None
    assert "no C++ compiler" in cpu_build.why_not()
    monkeypatch.setattr(cpu_build, "_reason", "")
