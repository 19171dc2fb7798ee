import pytest
import torch

from bitpress.kernels import cpu_build, outer

SHAPES = [(1, 1, 1), (2, 12, 32), (5, 7, 33), (64, 40, 96), (301, 130, 65), (1024, 24, 31)]


def filled(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu_build, "library", lambda: None)
    elif cpu_build.library() is None or not cpu_build.library().bitpress_has_panels():
        pytest.skip("no compiled bfloat16 kernels on this machine")
    return request.param


@pytest.mark.parametrize(("rows", "lefts", "rights"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_it_is_the_product_added_to_what_was_there(way: str, rows: int, lefts: int, rights: int, dtype: torch.dtype) -> None:
    left, right = filled(rows, lefts, dtype), filled(rows, rights, dtype)
    total = torch.full((lefts, rights), 2.0, dtype=torch.float64)
    outer.add_outer(total, left, right)
    torch.testing.assert_close(total, 2 + left.double().t() @ right.double(), rtol=1e-5, atol=1e-5 * rows**0.5)


@pytest.mark.parametrize("width", [1, 31, 64, 300])
def test_the_upper_triangle_is_whole(way: str, width: int) -> None:
    x = filled(50, width, torch.bfloat16)
    total = torch.zeros(width, width, dtype=torch.float64)
    outer.add_outer(total, x, x, upper=True)
    torch.testing.assert_close(total.triu(), (x.double().t() @ x.double()).triu(), rtol=1e-5, atol=1e-4)


def test_rows_may_lie_apart(way: str) -> None:
    x = filled(40, 64, torch.bfloat16)
    total = torch.zeros(32, 20, dtype=torch.float64)
    outer.add_outer(total, x[::2, ::2], x[::2, 10:30])
    torch.testing.assert_close(total, x[::2, ::2].double().t() @ x[::2, 10:30].double(), rtol=1e-5, atol=1e-4)


def test_no_rows_change_nothing(way: str) -> None:
    total = torch.ones(3, 4, dtype=torch.float64)
    outer.add_outer(total, torch.zeros(0, 3, dtype=torch.bfloat16), torch.zeros(0, 4, dtype=torch.bfloat16))
    assert torch.equal(total, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen(way: str, bad: float) -> None:
    left, right = filled(9, 13, torch.bfloat16), filled(9, 40, torch.bfloat16)
    left[3, 5] = bad
    total = torch.zeros(13, 40, dtype=torch.float64)
    outer.add_outer(total, left, right)
    assert not total[5].isfinite().any()
    assert total[[row for row in range(13) if row != 5]].isfinite().all()
