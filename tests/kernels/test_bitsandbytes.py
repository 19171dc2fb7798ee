"""bitsandbytes as a backend of NF4: the same product from our packed codes, where it is installed; the reason where it is not or cannot."""

import importlib.util

import pytest
import torch

from bitpress.kernels import reference
from bitpress.kernels.gpu_ops import OPS
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.tables import pack_table

OP = OPS["bitsandbytes"]
HERE = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed")
def test_without_it_the_reason_is_that_it_is_not_installed() -> None:
    assert OP.refusal(TableLayout("nf4", 64), (32, 128), torch.bfloat16) == "bitsandbytes is not installed"


@pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("layout", [TableLayout("fp4", 64), TableLayout("nf4", 32), TableLayout("nf4", 64, double_scales=True)])
def test_what_it_cannot_take_is_refused_with_the_reason(layout: TableLayout) -> None:
    assert "bitsandbytes takes NF4 with groups" in OP.refusal(layout, (32, 128), torch.bfloat16)
    assert "bitsandbytes takes NF4 with groups" in OP.refusal(TableLayout("nf4", 64), (32, 96), torch.bfloat16), "a short last group"


@pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("rows", [1, 5])
def test_its_product_is_the_oracles(rows: int) -> None:
    chance = torch.Generator().manual_seed(rows)
    codes, scales = torch.randint(0, 16, (48, 128), generator=chance), torch.rand(48, 2, generator=chance).bfloat16()
    packed = pack_table(codes, scales, TableLayout("nf4", 64))
    assert OP.refusal(packed.layout, packed.shape, torch.float32) == ""
    x_MK = torch.randn(rows, 128, generator=chance)
    expected = x_MK @ reference.dequantize(packed).t()
    torch.testing.assert_close(OP.form(packed).matmul(x_MK), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
