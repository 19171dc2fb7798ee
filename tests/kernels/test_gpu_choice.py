"""What is chosen on a GPU and why: candidates by their refusals, the fastest that is right, a table that survives the process."""

import json
import math

import pytest
import torch

from bitpress.kernels import dispatch, gpu, gpu_choice, gpu_ops, reference
from bitpress.kernels.layout import BinaryLayout, DenseLayout, TableLayout, TwoFourLayout, UniformLayout

BF16 = torch.bfloat16
ROW8 = UniformLayout(8, 0, True)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """An empty table in a folder of its own."""
    held: dict = {}
    monkeypatch.setattr(gpu_choice, "_table", lambda: held)
    monkeypatch.setattr(gpu_choice, "_path", lambda: tmp_path / "kernels" / "gpu.json")
    return held


@pytest.fixture
def triton_here(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "")


def test_without_a_gpu_or_triton_the_reason_says_so(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "Triton is not installed")
    choice = dispatch.choose(UniformLayout(4), (64, 128), "cuda", BF16, 1)
    assert choice.kernel == dispatch.DEQUANTIZE and "Triton is not installed" in choice.reason


@pytest.mark.parametrize(
    ("layout", "dtype", "batch", "kernel", "words"),
    [
        (UniformLayout(3), BF16, 1, gpu_choice.TRITON, "3 bits, group 64"), (TableLayout("nf4"), torch.float16, 64, gpu_choice.TRITON, "nf4"),
        (BinaryLayout(2), BF16, 16, gpu_choice.TRITON, "binary"), (UniformLayout(4), BF16, 65, gpu_choice.TRITON_DENSE, "65 rows"),
        (UniformLayout(4), torch.float32, 1, dispatch.DEQUANTIZE, "float32"), (UniformLayout(4, 48), BF16, 1, dispatch.DEQUANTIZE, "multiple of 32"),
        (TwoFourLayout(DenseLayout()), BF16, 1, dispatch.DEQUANTIZE, "2:4"), (DenseLayout(), BF16, 1, dispatch.DENSE, "stored as it is"),
    ],
)  # fmt: skip
def test_dispatch_on_a_gpu_by_rule(triton_here, monkeypatch, layout, dtype, batch, kernel, words) -> None:
    """Before anything was measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = dispatch.choose(layout, (64, 128), "cuda", dtype, batch)
    assert choice.kernel == kernel and words in choice.reason


def test_rounded_activations_take_the_same_kernels(triton_here, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose(ROW8, (64, 128), "cuda", BF16, 1, activation_bits=8).kernel == gpu_choice.TRITON


def test_the_fastest_that_was_measured_is_chosen_and_kept(triton_here, monkeypatch, table, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []
    times = {gpu_choice.TRITON: (5e-6, {"outputs": 64}), "torch int4": (4e-6, {}), gpu_choice.TRITON_DENSE: (90e-6, {})}
    monkeypatch.setattr(gpu_choice, "measure", lambda *arguments: asked.append(arguments) or times)
    for batch in (3, 9, 16):
        choice = dispatch.choose(UniformLayout(4), (64, 128), "cuda", BF16, batch)
        assert choice.kernel == "torch int4" and "torch int4 4.0 µs, Triton low-bit 5.0 µs, Triton dequantise 90.0 µs" in choice.reason
    assert len(asked) == 1 and asked[0][3] == 16, "batches are measured at the next size of the table, once"
    kept = json.loads((tmp_path / "kernels" / "gpu.json").read_text())
    assert kept[f"{UniformLayout(4)}, 64 x 128, bfloat16, 16"]["kernel"] == "torch int4"


def test_nothing_is_measured_while_a_graph_is_captured(triton_here, monkeypatch, table) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose(UniformLayout(4), (64, 128), "cuda", BF16, 1).kernel == gpu_choice.TRITON and not table


def test_an_unreadable_table_counts_as_empty(monkeypatch, tmp_path) -> None:
    (tmp_path / "gpu.json").write_text("{half")
    monkeypatch.setattr(gpu_choice, "_path", lambda: tmp_path / "gpu.json")
    assert gpu_choice._table.__wrapped__() == {}


class Wrong:
    """A product that is off by a tenth."""

    nbytes = 0

    def __init__(self, packed) -> None:
        self.weight = reference.dequantize(packed, BF16)

    def matmul(self, x_MK):
        return 1.1 * (x_MK @ self.weight.T)


def _fails(packed):
    raise RuntimeError("no such instruction on this card")


def test_wrong_and_failing_candidates_are_dropped(monkeypatch) -> None:
    """However fast they are."""
    monkeypatch.setattr(gpu, "why_not", lambda: "there is no CUDA device")
    takes = lambda layout, shape, dtype: ""  # noqa: E731
    ops = {"wrong": gpu_ops.Op(takes, Wrong), "fails": gpu_ops.Op(takes, _fails), "right": gpu_ops.Op(takes, Right)}
    monkeypatch.setattr(gpu_ops, "OPS", ops)
    times = gpu_choice.measure(UniformLayout(4), (64, 128), BF16, 4, clock=lambda work: (work(), 1e-6)[1], device="cpu")
    assert times["right"] == (1e-6, {}) and times.get("wrong", (math.inf,))[0] == times.get("fails", (math.inf,))[0] == math.inf


class Right(Wrong):
    def matmul(self, x_MK):
        return x_MK @ self.weight.T


@pytest.mark.skipif(bool(gpu.why_not()), reason=f"the Triton kernels cannot run here: {gpu.why_not()}")
def test_both_triton_kernels_are_right_and_share_their_words(packed) -> None:
    matrix = packed((40, 100), UniformLayout(4))
    form = gpu_choice.GpuForm.of(matrix)
    for batch in (2, 65):
        x = torch.randn(batch, 100).bfloat16()
        exact = reference.matmul(x, matrix)
        assert float((form.matmul(x).double() - exact).norm() / exact.norm()) < 2e-3 * 2
    assert form.nbytes == form.words.nbytes


@pytest.mark.parametrize(
    ("op", "layout", "shape", "dtype", "words"),
    [
        ("torch int4", UniformLayout(4, 96), (64, 192), BF16, "not 96"), ("torch int4", UniformLayout(3), (64, 128), BF16, "4-bit"),
        ("torch int8", UniformLayout(8), (64, 128), BF16, "one scale a row"), ("torch 2:4", TwoFourLayout(UniformLayout(4)), (64, 128), BF16, "plain values"),
        ("torch 2:4", TwoFourLayout(DenseLayout()), (60, 128), BF16, "multiples of 64"),
    ],
)  # fmt: skip
def test_ops_say_what_they_cannot_take(op, layout, shape, dtype, words) -> None:
    assert words in gpu_ops.OPS[op].refusal(layout, shape, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("layout", [UniformLayout(4), UniformLayout(3), ROW8, TableLayout("nf4"), BinaryLayout(2), TwoFourLayout(DenseLayout())])
def test_measuring_on_a_device(layout, table) -> None:
    found = gpu_choice.measured(layout, (256, 512), BF16, 1)
    assert found is not None and 0 < found.seconds < 1
