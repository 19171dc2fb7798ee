"""What other processors run: the sources compiled for older x86-64, against the oracle. The newest path is tested everywhere else."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from bitpress.kernels import cpu_build, dispatch, reference
from bitpress.kernels.layout import BinaryLayout, BitmapLayout, DenseLayout, TableLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.packed import PackedLinear

LAYOUTS = (
    *(UniformLayout(bits, 32) for bits in (2, 3, 4, 5, 6, 8)), UniformLayout(4, 0, True), UniformLayout(4, 32, zero="float"), TableLayout("nf4", 16),
    BinaryLayout(2, 32), BinaryLayout(4, 0), BitmapLayout(0.5), TwoFourLayout(DenseLayout()), TwoFourLayout(UniformLayout(4, 32)),
)  # fmt: skip


@pytest.fixture(scope="module", params=["x86-64", "x86-64-v3"])
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library for a processor without vector extensions of the last fifteen years, and for one with AVX2."""
    compiler, level = shutil.which("g++"), request.param
    if compiler is None or cpu_build.platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    if level == "x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    target = tmp_path_factory.mktemp(level) / "kernels.so"
    flags = [flag for flag in cpu_build.FLAGS if not flag.startswith(("-march", "-O"))]
    subprocess.run([compiler, *flags, "-shared", "-O1", f"-march={level}", "-o", str(target), *map(str, cpu_build.SOURCES)], check=True, timeout=180)
    return cpu_build._declare(ctypes.CDLL(str(target)))


def test_the_vector_path_is_left_out(older: ctypes.CDLL) -> None:
    assert older.bitpress_vectorised() == 0


@pytest.mark.parametrize("shape", [(33, 72), (16, 288)])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_paths_give_the_same_products(packed, older: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], batch: int) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: older)
    for layout in LAYOUTS:
        matrix, x = packed(shape, layout), torch.randn(batch, shape[1]) + 0.3
        linear = PackedLinear(matrix)
        for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 2**-7)):
            assert linear.kernel_for(batch, dtype).kernel != dispatch.DEQUANTIZE, layout
            wanted = reference.matmul(x.to(dtype), matrix)
            assert (linear(x.to(dtype)).double() - wanted).norm() <= bound * wanted.norm(), (layout, dtype)
