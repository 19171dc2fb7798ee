"""Rounding in groups by the compiled loop against the plain operations, to the bit."""

import itertools

import pytest
import torch

from bitpress.engine.methods.quantize.pipeline import dequantize_groups, quantize_groups
from bitpress.engine.recipe import WeightScheme
from bitpress.kernels import cpu_build
from bitpress.kernels.rounding import round_groups, widen_codes

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason=f"no compiled library: {cpu_build.why_not()}")
MATRICES = {
    "usual": torch.randn(70, 200, generator=torch.Generator().manual_seed(0)),
    "halves": torch.randint(-7, 8, (9, 130), generator=torch.Generator().manual_seed(1)).float() / 2,  # ties between two levels
    "one side": torch.rand(5, 64, generator=torch.Generator().manual_seed(2)) + 3,
    "zeros": torch.zeros(3, 33),
    "tiny": torch.randn(4, 96, generator=torch.Generator().manual_seed(3)) * 1e-40,
    "huge": torch.randn(4, 96, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * 3.0e38 / 2,
    "one column": torch.randn(7, 1, generator=torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("name", list(MATRICES))
def test_codes_scales_and_zeros_are_the_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_NK = MATRICES[name]
    for bits, size, symmetric in itertools.product((2, 3, 4, 8), (0, 8, 32, 64), (False, True)):
        scheme = WeightScheme(bits=bits, group_size=size, symmetric=symmetric)
        found = round_groups(weight_NK, bits, size, symmetric)
        assert found is not None
        codes = quantize_groups(weight_NK, scheme)
        widened = dequantize_groups(codes, scheme)
        with monkeypatch.context() as plain:
            plain.setattr(cpu_build, "library", lambda: None)
            wanted = quantize_groups(weight_NK, scheme)
            made_NK = dequantize_groups(wanted, scheme)
        for one, two in zip(found, wanted, strict=True):
            assert (one is None and two is None) or torch.equal(one, two), (bits, size, symmetric)
        assert torch.equal(widened, made_NK)


def test_zeros_between_levels_are_widened_too() -> None:
    codes, scales = torch.randint(0, 16, (6, 40), dtype=torch.uint8), torch.rand(6, 5).bfloat16()
    zeros = 15 * torch.rand(6, 5)
    found = widen_codes(codes, scales, zeros, 8)
    wanted = (codes.view(6, 5, 8).float() - zeros[..., None]) * scales.float()[..., None]
    assert torch.equal(found, wanted.view(6, 40))


def test_other_types_and_nothing_at_all_are_left_to_the_caller() -> None:
    assert round_groups(torch.ones(2, 4, dtype=torch.float64), 4, 0, False) is None
    assert round_groups(torch.ones(0, 4), 4, 0, False) is None


def test_columns_that_lie_apart_are_read_as_they_are_meant() -> None:
    weight_KN = torch.randn(40, 6)
    found, wanted = round_groups(weight_KN.t(), 4, 8, False), round_groups(weight_KN.t().contiguous(), 4, 8, False)
    assert found is not None
    assert wanted is not None
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
