"""Losses, divergence and agreement of two rows of logits, against float64."""

import pytest
import torch
from torch import Tensor

from bitpress.kernels import cpu_build
from bitpress.kernels.compare import by_torch, compare, losses


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu_build, "library", lambda: None)
    elif cpu_build.library() is None:
        pytest.skip(f"no compiled library: {cpu_build.why_not()}")


def rows(positions: int, vocab: int, dtype: torch.dtype, apart: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(positions + vocab)
    dense = 4 * torch.randn(positions, vocab, generator=chance)
    other = dense + apart * torch.randn(positions, vocab, generator=chance)
    return dense.to(dtype), other.to(dtype), torch.randint(vocab, (positions,), generator=chance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("positions", "vocab"), [(1, 2), (3, 17), (7, 512), (5, 513), (40, 5001)])
@pytest.mark.parametrize("apart", [0.0, 0.01, 3.0])
def test_they_are_the_definitions(dtype: torch.dtype, positions: int, vocab: int, apart: float) -> None:
    dense, other, targets = rows(positions, vocab, dtype, apart)
    logp, logq = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    nll_dense, nll, kl, same = compare(dense, other, targets)
    at = torch.arange(positions)
    torch.testing.assert_close(nll_dense.double(), -logp[at, targets], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(nll.double(), -logq[at, targets], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(kl.double(), (logp.exp() * (logp - logq)).sum(-1), rtol=1e-4, atol=1e-5)
    assert same.dtype == torch.bool
    assert torch.equal(same, dense.float().argmax(-1) == other.float().argmax(-1))
    torch.testing.assert_close(losses(other, targets), nll)


@pytest.mark.usefixtures("way")
def test_of_tokens_alike_the_first_is_the_likeliest() -> None:
    dense = torch.zeros(2, 1500)
    dense[:, [700, 1400]] = 5.0
    other = torch.zeros(2, 1500)
    other[0, 700], other[1, 1400] = 5.0, 5.0
    assert compare(dense, other, torch.zeros(2, dtype=torch.int64))[3].tolist() == [True, False]


@pytest.mark.usefixtures("way")
def test_logits_far_apart_stay_finite_and_broken_ones_are_seen() -> None:
    dense, other = torch.tensor([[300.0, -300.0, 0.0]]), torch.tensor([[-300.0, 300.0, 0.0]])
    _, nll, kl, same = compare(dense, other, torch.tensor([0]))
    assert (nll.item(), kl.item(), same.item()) == (600.0, 600.0, False)
    broken = dense.clone()
    broken[0, 2] = float("nan")
    _, nll, kl, _ = compare(dense, broken, torch.tensor([0]))
    assert nll.isnan().all()
    assert kl.isnan().all()


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        compare(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([4]))


@pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
def test_rows_that_lie_apart_are_read_where_they_lie() -> None:
    dense, other, targets = rows(6, 200, torch.float32)
    apart = dense[::2, ::2], other[::2, ::2], targets[::2] // 2
    for one, two in zip(compare(*apart), by_torch(*apart), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
