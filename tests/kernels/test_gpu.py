"""The Triton kernels against the oracle, over widths, groups, batches and types: interpreted on a CPU, compiled where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so its kernels cannot be interpreted")

from bitpress.kernels import gpu, reference
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, Layout, TableLayout, TwoFourLayout, UniformLayout, words_of

pytestmark = pytest.mark.skipif(bool(gpu.why_not()), reason=f"the Triton kernels cannot run here: {gpu.why_not()}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = 0
SMALL = gpu.Tile(outputs=64)  # one program takes a whole test matrix: the interpreter's time is programs times steps
CASES: tuple[tuple[Layout, tuple[int, int]], ...] = (
    (UniformLayout(2, 64), (40, 300)), (UniformLayout(3, 32), (33, 288)), (UniformLayout(4, 64), (48, 256)), (UniformLayout(4, 96, True), (17, 200)),
    (UniformLayout(5, 128), (40, 520)), (UniformLayout(6, ROW), (64, 100)), (UniformLayout(8, 64), (50, 256)), (UniformLayout(8, ROW, True), (7, 31)),
    (UniformLayout(4, 64, zero="float"), (40, 300)), (UniformLayout(3, 128, zero="float"), (20, 256)), (UniformLayout(4, 512), (20, 300)),
    (TableLayout("nf4"), (40, 300)), (TableLayout("fp4", 32, double_scales=True), (33, 256)), (TableLayout("codebook"), (40, 300)),
    (BinaryLayout(2, 64), (40, 300)), (BinaryLayout(3, ROW), (33, 256)),
)  # fmt: skip


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double().cpu() - exact).norm() / exact.norm())


def inputs(batch: int, columns: int, dtype: torch.dtype, mean: float = 1.0) -> torch.Tensor:
    """With a mean, where an error in zeros or shifts would add up."""
    return (torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)) + mean).to(dtype)


def words(matrix: PackedTensor) -> gpu.Words:
    return gpu.words(matrix.to(DEVICE))


@pytest.mark.parametrize("dtype", gpu.TYPES, ids=str)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=[f"{words_of(layout)} {shape}" for layout, shape in CASES])
def test_products_are_as_exact_as_a_dense_matmul(packed, layout, shape, dtype) -> None:
    matrix = packed(shape, layout)
    x = inputs(3, shape[1], dtype)
    exact = reference.matmul(x, matrix)
    y = gpu.product(x.to(DEVICE), words(matrix), SMALL)
    assert y.dtype == dtype and y.shape == (3, shape[0])
    assert error(y, exact) <= 2 * error(x @ reference.dequantize(matrix, dtype).T, exact)


@pytest.mark.parametrize(("layout", "shape"), CASES, ids=[f"{words_of(layout)} {shape}" for layout, shape in CASES])
def test_dequantising_is_the_oracles_to_the_bit(packed, layout, shape) -> None:
    matrix = packed(shape, layout)
    assert torch.equal(gpu.dequantize(words(matrix), torch.bfloat16).cpu(), reference.dequantize(matrix, torch.bfloat16))


@pytest.mark.parametrize("batch", [1, 2, 7, 16, 17, 33, 64])
def test_every_batch(packed, batch) -> None:
    matrix = packed((24, 96), UniformLayout(4, 32))
    x = inputs(batch, 96, torch.bfloat16)
    exact = reference.matmul(x, matrix)
    assert error(gpu.product(x.to(DEVICE), words(matrix), SMALL), exact) <= 2 * error(x @ reference.dequantize(matrix, torch.bfloat16).T, exact)


@pytest.mark.parametrize("layout", [UniformLayout(4), UniformLayout(3, 96), TableLayout("nf4"), BinaryLayout(2)], ids=words_of)
@pytest.mark.parametrize("tile", [gpu.Tile(16, 16, splits=2), gpu.Tile(64, 32, splits=8, scaled=True), gpu.Tile(128, 64, scaled=True)], ids=str)
def test_tiles_and_splits_change_no_more_than_rounding(packed, layout, tile) -> None:
    matrix = packed((40, 700), layout)
    x = inputs(5, 700, torch.bfloat16)
    exact, held = reference.matmul(x, matrix), words(matrix)
    first, again = (gpu.product(x.to(DEVICE), held, tile) for _ in range(2))
    assert error(first, exact) <= 2 * error(x @ reference.dequantize(matrix, torch.bfloat16).T, exact)
    assert torch.equal(first, again), "the programs of a tile must add up in one order, and leave the counters as they were"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("layout", [UniformLayout(4), UniformLayout(8, ROW, True), TableLayout("nf4"), BinaryLayout(2)], ids=words_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(packed, layout, value) -> None:
    x = torch.ones(3, 100).bfloat16()
    x[1, 3] = value
    y = gpu.product(x.to(DEVICE), words(packed((20, 100), layout)), SMALL).cpu()
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_words_hold_what_the_codes_say(packed) -> None:
    """Slot j of a chunk lies in field j: inputs 32 j .. 32 j + 31, input 0 of the chunk in the lowest bits of word 0."""
    matrix = packed((3, 256), UniformLayout(4))
    held, codes = gpu.words(matrix), matrix.tensors["codes"]
    assert held.low.shape == (1, 3, 32) and held.low.dtype == torch.int32
    assert (held.low[0, :, 0] & 15).tolist() == (codes[:, 0] & 15).tolist()
    assert (held.low[0, :, 1] >> 4 & 15).tolist() == (codes[:, 16] >> 4).tolist()  # input 33


@pytest.mark.parametrize("bits", gpu.PLANES)
def test_words_are_no_larger_than_what_is_stored(packed, bits) -> None:
    """Zeros of less than 8 bits take a byte each; everything else is as large as on disk."""
    matrix = packed((64, 512), UniformLayout(bits, 64))
    zeros = matrix.tensors["zeros"].nbytes
    assert gpu.words(matrix).nbytes - matrix.nbytes == 64 * 8 - zeros


@pytest.mark.parametrize(
    ("layout", "dtype", "words"),
    [
        (UniformLayout(4, 48), torch.bfloat16, "multiple of 32, not 48"), (UniformLayout(4), torch.float32, "float32"),
        (BitmapLayout(0.5), torch.bfloat16, "bitmap"), (TwoFourLayout(DenseLayout()), torch.bfloat16, "2:4"),
    ],
)  # fmt: skip
def test_refusals_say_why(packed, layout, dtype, words) -> None:
    assert words in gpu.refusal(layout, 128, dtype)
    if dtype != torch.float32:
        with pytest.raises(ValueError, match="cannot be laid out"):
            gpu.words(packed((16, 128), layout))


def test_wrong_inputs_are_refused(packed) -> None:
    held = words(packed((16, 64), UniformLayout(4)))
    with pytest.raises(ValueError, match=r"rows of 64; got torch\.float32"):
        gpu.product(torch.ones(1, 64, device=DEVICE), held, SMALL)
    with pytest.raises(ValueError, match="of 32"):
        gpu.product(torch.ones(1, 32, device=DEVICE).half(), held, SMALL)
