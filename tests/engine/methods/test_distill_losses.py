"""Losses of training beside a teacher: golden values, gradients against finite differences, the bank of tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.engine.methods.distill.losses import TokenBank, divergence, token_contrast


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_contrast_of_two_tokens() -> None:
    """Cosines of the first token 1 and 0, of the second .6 and .8; temperature .5."""
    student = torch.tensor([[[2.0, 0.0], [3.0, 4.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    own = [1 / 0.5, 0.8 / 0.5]
    sums = [math.exp(2.0) + 1, math.exp(0.6 / 0.5) + math.exp(0.8 / 0.5)]
    assert float(token_contrast(student, teacher, 0.5)) == pytest.approx(sum(math.log(s) - o for o, s in zip(own, sums, strict=True)) / 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 2.0))
def test_contrast_is_the_definition_written_out(seed: int, temperature: float) -> None:
    """METHODS 12.3, token by token; negatives are the other tokens of the same sequence only."""
    student, teacher = states(seed, 2, 5, 4), states(seed + 1, 2, 5, 4)
    total = 0.0
    for b in range(2):
        for i in range(5):
            alike = [float(torch.cosine_similarity(student[b, i], teacher[b, j], dim=0)) / temperature for j in range(5)]
            total -= alike[i] - math.log(sum(map(math.exp, alike)))
    assert float(token_contrast(student, teacher, temperature)) == pytest.approx(total / 10, rel=1e-9)


def test_gradient_of_the_contrast_against_finite_differences() -> None:
    teacher = states(1, 2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: token_contrast(x, teacher, 0.1), states(0, 2, 4, 3).requires_grad_())


def test_gradient_through_the_bank_against_finite_differences() -> None:
    teacher, chosen = states(1, 2, 4, 3), torch.tensor([1, 0])
    kept = states(2, 3, 4, 3)

    def loss(student: Tensor) -> Tensor:
        bank = TokenBank(0.5)
        bank.load({"states": kept.clone(), "seen": torch.tensor([True, False, True])})
        return token_contrast(bank.blend(chosen, 3, student), teacher, 0.1)

    assert torch.autograd.gradcheck(loss, states(0, 2, 4, 3).requires_grad_())


def test_alike_tokens_are_pushed_apart() -> None:
    """The case the method is for: a student whose tokens have become nearly one."""
    teacher = states(0, 1, 6, 8)
    student = (torch.ones(1, 6, 8, dtype=torch.float64) + 0.05 * states(1, 1, 6, 8)).requires_grad_()

    def spread() -> float:
        unit = torch.nn.functional.normalize(student.detach(), dim=-1)[0]
        return float((unit @ unit.t()).mean())

    before = spread()
    optimiser = torch.optim.Adam([student], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        token_contrast(student, teacher, 0.1).backward()
        optimiser.step()
    assert spread() < before - 0.5


def test_the_bank_is_a_running_mean_without_history() -> None:
    bank, first, second = TokenBank(0.5), states(0, 1, 2, 3).requires_grad_(), states(1, 1, 2, 3)
    assert torch.equal(bank.blend(torch.tensor([2]), 4, first), first), "a new sequence stands for itself"
    blended = bank.blend(torch.tensor([2]), 4, second)
    assert torch.allclose(blended, 0.5 * first.detach() + 0.5 * second)
    assert not blended.requires_grad, "what is kept has no history"
    assert bank.seen_S.tolist() == [False, False, True, False]
    again = TokenBank(0.5)
    again.load({name: value.clone() for name, value in bank.state().items()})
    assert torch.equal(again.blend(torch.tensor([2]), 4, second), bank.blend(torch.tensor([2]), 4, second))


def test_divergence_is_the_sum_over_positions() -> None:
    student, teacher = states(0, 3, 7), states(1, 3, 7)
    p = teacher.softmax(-1)
    assert float(divergence(student, teacher)) == pytest.approx(float((p * (p.log() - student.log_softmax(-1))).sum()))
    assert float(divergence(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)
