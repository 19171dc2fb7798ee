"""Layers whose scores stand on next to nothing, measured where they will be used. Knows one forward after another; nothing of gradients.

A second-order score is a mean over many stretches of text. Where a matrix writes the outliers of the first token that everything later
attends to (Sun et al. 2024, "Massive Activations in Large Language Models"), it is a handful of squares of one probe instead, and what
rounding that matrix does depends on what all others do. Such layers are few: each option of theirs is tried with every other layer
as a budget would have it, and its harm is the rise of the text's loss over the option that does best there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bitpress.engine import sensitivity_truth as truth
from bitpress.engine.allocate import frontier
from bitpress.engine.choices import DENSE, choices_of
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.sensitivity_file import FISHER, LOSS, Option, SensitivityReport
from bitpress.engine.sensitivity_fisher import windows
from bitpress.engine.sensitivity_options import made_of
from bitpress.engine.sensitivity_scoring import Scoring

BITS = 3.5  # a linear weight, of the context
MOST = 3  # layers that are measured
FEWEST_WINDOWS = 4  # in a sequence, for it to matter on which of them a score stands
Made = Callable[[str, Option], Tensor]  # the matrix of a layer under an option


def score_in_context(scoring: Scoring, ids_SL: Tensor) -> None:
    """What a budget spends by: the divergences to second order, but of doubtful layers what they do among changed ones."""
    layers, report = doubtful(scoring.stand, len(ids_SL), windows(ids_SL.shape)), scoring.report
    known = [score for score in report.scores if score.kind == FISHER and score.layer not in layers]
    report.scores = [score for score in report.scores if score.kind != LOSS] + [score.model_copy(update={"kind": LOSS}) for score in known]
    if layers:
        scoring.emit("stage_started", {"stage": "measuring layers that scores do not tell", "total": len(layers)})
        made = lambda name, option: scoring.weight(name) if option.scheme.is_dense else made_of(scoring.weight(name), option.scheme)  # noqa: E731
        for layer, option, harm in harms(scoring.loaded, report, ids_SL, layers, made):
            scoring.check()
            scoring.keep(layer, option, LOSS, harm)


def doubtful(stand: Mapping[str, Sequence[float]], sequences: int, count: int) -> list[str]:
    """Layers most of whose scores stand on fewer windows than half the sequences, the worst first.

    stand: layer -> how many windows each of its scores stands on. count: windows of all sequences together.
    """
    if count < FEWEST_WINDOWS * sequences:
        return []
    middle = {layer: sorted(counts)[len(counts) // 2] for layer, counts in stand.items()}
    return sorted((layer for layer, count in middle.items() if count < sequences / 2), key=lambda layer: middle[layer])[:MOST]


def options_at(loaded: Loaded, report: SensitivityReport, bits: float = BITS) -> dict[str, Option]:
    """Layer -> its option in the best recipe, by Fisher scores, of so many bits a linear weight, or the nearest there is."""
    choices = choices_of(loaded.anatomy, report, FISHER)
    curve = frontier(choices)
    within = [point.step for point in curve.points if point.linear_bits <= bits]
    choice = curve.inner.choice(max(within, default=0))
    return {layer: choices.options[option] for layers, option in zip(choices.items, choice, strict=True) for layer in layers}


def harms(loaded: Loaded, report: SensitivityReport, ids_SL: Tensor, layers: Sequence[str], made: Made) -> Iterator[tuple[str, str, float]]:
    """(layer, option, harm in nats a token) of every option of these layers, all others as `options_at` has them."""
    model, anatomy = loaded.model, loaded.anatomy
    around = options_at(loaded, report)
    prefixes = truth.Prefixes(model, anatomy, ids_SL)
    with prefixes.open():
        weights = {surgery.get(model, name): made(name, option).to(prefixes.dtype) for name, option in around.items() if option is not DENSE}
        with truth.all_changed(weights):
            prefixes.take()
            for layer in layers:
                losses = {option.id: _loss(prefixes, loaded, layer, made(layer, option)) for option in (*report.options, DENSE)}
                least = min(losses.values())
                yield from ((layer, option.id, losses[option.id] - least) for option in report.options)


def _loss(prefixes: truth.Prefixes, loaded: Loaded, layer: str, weight_NK: Tensor) -> float:
    with torch.inference_mode(), truth.changed(surgery.get(loaded.model, layer), weight_NK):
        return prefixes.loss_from(loaded.anatomy.by_name[layer].block or 0)
