"""How much each token of the calibration text counts for a layer: by what an error of its output there does to the model's predictions.

Second moments of a layer's inputs take all tokens alike, and a few tokens with huge inputs that the model hardly reads (the first of a
text, in most models) can fill them. Here a token counts by the mean square of the gradient at its output, of random probes of the
divergence from the model itself (engine.sensitivity_fisher); so weighted, the layer's objective is a block-diagonal Gauss-Newton
approximation of that divergence (Kim et al. 2025, GuidedQuant, arXiv 2505.07004, with one group of outputs). Knows gradients; no methods.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.sensitivity_fisher import listen

SEQUENCES = 4  # of one backward
MOST = 20.0  # times the mean: no single token may stand for many


def token_weights(
    model: nn.Module, anatomy: Anatomy, ids_SL: Tensor, layers: Iterable[str], seed: int = 0, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Tensor]:
    """The weight of every token for each of these layers: float32 [S, L], of mean 1 or a little less where one was cut.

    ids_SL: int64 [S, L]. One forward and one backward of the whole model for all of the text. Raises Cancelled when told to stop.
    """
    return {name: levelled(squares_SL) for name, squares_SL in token_squares(model, anatomy, ids_SL, layers, seed, should_stop).items()}


def token_squares(
    model: nn.Module, anatomy: Anatomy, ids_SL: Tensor, layers: Iterable[str], seed: int = 0, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Tensor]:
    """What the weights are made of: the mean square of the gradient at every token's output, [S, L]; these can be compared between layers."""
    modules = {name: surgery.get(model, name) for name in layers}
    heard: dict[str, list[Tensor]] = {name: [] for name in modules}
    embedding = surgery.get(model, anatomy.embedding.name)

    def on_output(name: str, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        heard[name].append(gradient.float().square().mean(dim=-1))

    for number, part_BL in enumerate(ids_SL.split(SEQUENCES)):
        listen(model, part_BL, modules, on_output, embedding, seed * 100_003 + number, should_stop)
    return {name: torch.cat(parts) for name, parts in heard.items() if parts}


def levelled(squares_SL: Tensor) -> Tensor:
    """Squares over their mean, none above `MOST`; all alike where every square is 0."""
    mean = squares_SL.mean()
    return (squares_SL / mean).clamp_max_(MOST) if mean > 0 else torch.ones_like(squares_SL)
