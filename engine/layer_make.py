"""One matrix from dense to stored: what its methods make of it, and in which packed form that is kept. Knows a job; no model, no files."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitpress.engine.errors import InputError
from bitpress.engine.layer_job import LayerJob
from bitpress.engine.layer_store import StoredLayer
from bitpress.engine.methods.base import LinearMethod, Outcome, Statistics, finite
from bitpress.engine.methods.lowrank.pipeline import act
from bitpress.engine.model import surgery
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import BitmapLayout, DenseLayout, FactorLayout, Layout, PairLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.pairs import dense as pack_dense
from bitpress.kernels.pairs import pack_pair
from bitpress.kernels.reference import dequantize
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes

Tell = Callable[[str], None]


def make_layer(module: nn.Module, job: LayerJob, stats: Statistics, tell: Tell = lambda note: None) -> StoredLayer:
    """Run the job's methods on one matrix; `tell` hears what a method has to say of it. Raises InputError as `dense_weight` and `prepared`."""
    dense_NK = dense_weight(module, job)
    return finished(module, job, dense_NK, prepared(dense_NK, job, stats, tell))


def dense_weight(module: nn.Module, job: LayerJob) -> Tensor:
    """A matrix of the dense model, float32 [N, K]. Raises InputError that names the layer when its weights are not finite."""
    dense = module.weight if isinstance(module, nn.Embedding) else surgery.linear_weight(module)
    return finite(dense.detach().float(), job.part.name)


def prepared(weight_NK: Tensor, job: LayerJob, stats: Statistics, tell: Tell) -> Outcome:
    """What those of the job's methods make of a matrix that act on one matrix alone. Raises InputError when no calibration token reached it."""
    if job.needs - stats.keys():
        remedy = "Calibrate on more text, or point a method at it that looks at no text."
        raise InputError(f"The layer {job.part.name} cannot be compressed.", "No token of the calibration text reached it.", remedy)
    outcome = Outcome(weight_NK)
    for method, options in job.methods:
        if isinstance(method, LinearMethod):
            outcome = act(method, outcome, job.asked_of(method), stats, options)
            for note in outcome.notes:
                tell(f"{job.part.name}: {note}.")
    return outcome


def finished(module: nn.Module, job: LayerJob, dense_NK: Tensor, outcome: Outcome) -> StoredLayer:
    """An outcome in its stored form, and how far it is from the dense matrix of the module."""
    dtype = next(module.parameters()).dtype
    content = stored_form(outcome, job.layout, dtype)
    plain = outcome.codes is None and outcome.packed is None
    made_NK = outcome.weight_NK.to(dtype).float() if plain else outcome.weight_NK
    if outcome.factors:
        assert isinstance(content, PackedTensor)
        made_NK = dequantize(content)
    return StoredLayer(job.part.name, content, job.method, relative_error(dense_NK, made_NK), _with_bias(module, outcome.bias_N, dtype))


def _with_bias(module: nn.Module, added_N: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The layer's bias with what a method adds to it; None where nothing is added."""
    if added_N is None:
        return None
    own_N = surgery.bias_of(module)
    return (added_N if own_N is None else own_N.detach().float() + added_N).to(dtype)


def stored_form(outcome: Outcome, layout: Layout, dtype: torch.dtype) -> PackedTensor | Tensor:
    """What is kept of an outcome: its codes or its zeros packed as the layout says, else its weights in `dtype`.

    Raises ValueError when a method hands over a packed matrix of another layout, or weights that break the pattern of the layout.
    """
    match layout, outcome.codes:
        case _, _ if outcome.packed is not None:
            if outcome.packed.layout != layout:
                raise ValueError(f"a matrix of {outcome.packed.layout} was handed over where the scheme asks for {layout}")
            return outcome.packed
        case PairLayout(), _ if outcome.factors:
            left, right = (_factor(made, side, dtype) for made, side in zip(outcome.factors, (layout.left, layout.right), strict=True))
            base = pack(*outcome.codes, layout.base) if outcome.codes is not None and isinstance(layout.base, UniformLayout) else None
            return pack_pair(left, right, layout, base)
        case UniformLayout(), codes if codes is not None:
            return pack(*codes, layout)
        case TwoFourLayout(), codes if codes is not None:
            return pack_two_four_codes(*codes, layout)
        case TwoFourLayout(values=DenseLayout(itemsize)), _:
            return pack_two_four(outcome.weight_NK.to(_sized(dtype, itemsize)), layout)
        case BitmapLayout(itemsize=itemsize), _:
            return pack_bitmap(outcome.weight_NK.to(_sized(dtype, itemsize)), layout)
    return outcome.weight_NK.to(dtype)


def _factor(outcome: Outcome, layout: FactorLayout, dtype: torch.dtype) -> PackedTensor:
    kind = _sized(dtype, layout.itemsize) if isinstance(layout, DenseLayout) else dtype
    content = stored_form(outcome, layout, kind)
    return content if isinstance(content, PackedTensor) else pack_dense(content)


def _sized(dtype: torch.dtype, itemsize: int) -> torch.dtype:
    """The type itself where its numbers have that many bytes; a model may lie in memory in another type than its file."""
    return dtype if dtype.itemsize == itemsize else torch.bfloat16 if itemsize == 2 else torch.float32


def relative_error(weight_NK: Tensor, made_NK: Tensor) -> float:
    """||W - W'|| / ||W||, 0 for a matrix of zeros."""
    norm = torch.linalg.vector_norm(weight_NK)
    return float(torch.linalg.vector_norm(weight_NK - made_NK) / norm) if norm > 0 else 0.0
