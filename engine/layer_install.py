"""A stored matrix in its place in the compressed model: a packed layer, or new dense weights. Knows modules and jobs; refuses to know methods."""

import torch
from torch import nn

from bitpress.engine.layer_job import LayerJob
from bitpress.engine.layer_store import StoredLayer
from bitpress.engine.model import surgery
from bitpress.kernels.formats import PackedTensor
from bitpress.kernels.packed import PackedEmbedding, PackedLinear

DENSE_REASON = "stored dense, 0% smaller: no format here stores a matrix of so few zeros smaller"


def install(model: nn.Module, job: LayerJob, stored: StoredLayer) -> tuple[str, str]:
    """Put a finished matrix in its place; returns the kernel that multiplies it in decoding, and why."""
    module = surgery.get(model, job.place)
    if not isinstance(stored.content, PackedTensor):
        surgery.set_linear_weight(module, stored.content)
        return "dense", DENSE_REASON
    if isinstance(module, nn.Embedding):
        return _install_embedding(model, job.place, module, stored.content)
    bias_N = surgery.bias_of(module) if stored.bias_N is None else stored.bias_N
    rounding = job.scheme.activations
    packed = PackedLinear(stored.content, bias_N, *((rounding.bits, rounding.outliers) if rounding else ()))
    surgery.replace(model, job.place, packed)
    return packed.kernel, packed.reason


def _install_embedding(model: nn.Module, place: str, module: nn.Embedding, content: PackedTensor) -> tuple[str, str]:
    """Replace the embedding, and the head that is tied to it by a layer on the same storage."""
    packed = PackedEmbedding(content, module.weight.dtype)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:  # Gemma 3 multiplies inside its embedding module
        packed.register_forward_hook(lambda _, __, rows: rows * torch.as_tensor(scale).to(rows.dtype))
    head = next((name for name, other in model.named_modules() if isinstance(other, nn.Linear) and other.weight is module.weight), None)
    surgery.replace(model, place, packed)
    if head is None:
        return "lookup", "rows are looked up and dequantised"
    tied = packed.head(surgery.bias_of(surgery.get(model, head)))
    surgery.replace(model, head, tied)
    return tied.kernel, tied.reason
