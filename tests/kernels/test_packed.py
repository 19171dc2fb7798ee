"""Packed layers as modules: what they hold, how they move, join and share."""

import copy

import pytest
import torch
from torch import nn

from bitpress.kernels import reference
from bitpress.kernels.layout import UniformLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear, fuse
from bitpress.kernels.rows import join

ROW8 = UniformLayout(8, 0, True)


def test_casting_the_model_leaves_the_stored_types(packed) -> None:
    linear = PackedLinear(packed((32, 128), UniformLayout(3)))
    before, x = linear.dequantize(), torch.randn(1, 128).bfloat16()
    y = linear(x)
    moved = nn.Sequential(linear).to(torch.float16).float()[0]
    assert moved.scales.dtype == torch.bfloat16 and moved.codes.dtype == torch.uint8
    assert torch.equal(moved.dequantize(), before) and torch.equal(moved(x), y)


def test_state_and_copies(packed) -> None:
    linear = PackedLinear(packed((32, 128), UniformLayout(3)))
    assert set(linear.state_dict()) == {"codes", "scales", "zeros"}
    other = PackedLinear(packed((32, 128), UniformLayout(3), seed=1))
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.dequantize(), linear.dequantize()) and torch.equal(copy.deepcopy(linear).codes, linear.codes)


def test_loading_a_state_forgets_the_kernels_layout(packed) -> None:
    linear, other = (PackedLinear(packed((32, 128), UniformLayout(4), seed=seed)) for seed in (0, 1))
    x = torch.randn(1, 128).bfloat16()
    other(x)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_bytes_held_grow_when_a_kernel_lays_codes_out(packed) -> None:
    linear = PackedLinear(packed((32, 128), UniformLayout(4)))
    assert linear.resident_bytes == linear.stored_bytes == UniformLayout(4).nbytes(32, 128)
    linear(torch.randn(1, 128).bfloat16())
    laid_out = linear.form(linear.kernel)
    assert linear.resident_bytes == linear.stored_bytes + laid_out.nbytes
    assert laid_out.nbytes >= 32 * 64


def test_joined_layers_give_the_parts_outputs_and_lend_their_storage(packed) -> None:
    parts = [PackedLinear(packed((rows, 128), UniformLayout(4), seed=rows), torch.randn(rows)) for rows in (32, 16, 16)]
    x = torch.randn(2, 128).bfloat16()
    apart = torch.cat([part(x) for part in parts], -1)
    whole = fuse(parts)
    assert torch.equal(whole(x), apart) and torch.equal(torch.cat([part(x) for part in parts], -1), apart)
    assert parts[1].codes.data_ptr() == whole.codes[32:].data_ptr()
    assert fuse(parts).codes.data_ptr() == whole.codes.data_ptr()


def test_unlike_layers_do_not_fuse_but_still_multiply_as_rows(packed) -> None:
    wide, narrow = PackedLinear(packed((32, 128), UniformLayout(8))), PackedLinear(packed((16, 128), UniformLayout(3)))
    with pytest.raises(ValueError, match="layout"):
        fuse([wide, narrow])
    with pytest.raises(ValueError, match="bias"):
        fuse([narrow, PackedLinear(narrow.packed, torch.zeros(16))])
    x, dense = torch.randn(1, 128).bfloat16(), nn.Linear(128, 4, dtype=torch.bfloat16)
    rows = join([wide, narrow, dense], torch.bfloat16)
    assert torch.equal(rows(x), torch.cat((wide(x), narrow(x), dense(x)), -1))


def test_dense_rows_share_the_layers_storage() -> None:
    parts = [nn.Linear(8, rows, bias=rows == 3, dtype=torch.bfloat16) for rows in (3, 5)]
    x = torch.randn(2, 8).bfloat16()
    apart = torch.cat([part(x) for part in parts], -1)
    rows = join(parts, torch.bfloat16)
    assert torch.allclose(rows(x), apart) and parts[1].weight.data_ptr() == rows.weight_NK[3:].data_ptr()
    assert join(parts, torch.bfloat16).weight_NK.data_ptr() == rows.weight_NK.data_ptr()
    assert rows(x.float()).dtype == torch.float32 and join(parts, torch.float32).weight_NK.dtype == torch.float32


@pytest.mark.parametrize("layout", [ROW8, UniformLayout(4), UniformLayout(3, 0, True)])
def test_embedding_rows_and_the_tied_head(packed, layout) -> None:
    matrix = packed((48, 64), layout)
    embedding, ids = PackedEmbedding(matrix), torch.tensor([[3, 0], [47, 3]])
    assert torch.equal(embedding(ids), reference.dequantize(matrix, torch.bfloat16)[ids])
    assert embedding.head().codes.data_ptr() == embedding.codes.data_ptr()
    assert embedding.float()(ids).dtype == torch.float32 and embedding(ids[:0]).shape == (0, 2, 64)
