"""K-pruning: what a unit knows of the predictions and of its sublayer's output, from the bottom up, each sublayer refitted (METHODS 2).

The paper is on encoders; on a causal model a head is a key-value group or a query head and a neuron the gated product. At the very first
sublayer the model still equals its teacher, so that predictive knowledge is zero there and only representational knowledge decides.

The paper fits to the teacher's stream. On a causal model that loses: errors from below reach the predictions by many ways, few of which a sublayer's own
features can tell, and the fit that comes nearest to the stream (also on text it has not seen) predicts worse than none. So the default fits to what the
sublayer itself lost, at the tokens that matter; `catch_up` is the paper's.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.measure.logits import scorer_of
from bitpress.engine.methods.repair import Repairing
from bitpress.engine.methods.structured import Scores, StructuredMethod, StructuredOptions, Units, budget_of, remove_bottom_up, select
from bitpress.engine.model.surgery import twin
from bitpress.engine.scene import Scene
from bitpress.engine.sublayers import (
    Caught,
    Key,
    Loss,
    Stream,
    drawn_from,
    drawn_loss,
    knowledge_loss,
    last_matrix,
    mask_gradients,
    predicting,
    sizes_in_stream,
    task_loss,
)


class KPruneOptions(StructuredOptions):
    """Weights of the two kinds of knowledge, and how often they are measured."""

    repair: Repairing = Field(
        default="least_squares",
        title="Repair",
        description="K-pruning refits the last matrix of each sublayer to what the sublayer did before, or, as in the paper, to what the model did there.",
    )
    measured: Literal["sublayer", "block", "once"] = Field(
        default="sublayer",
        title="Knowledge measured",
        description="Anew at every sublayer, as the authors do; at every block, in half the time; or once, in a few minutes at most.",
    )
    predictive_from: Literal["drawn", "drift", "text"] = Field(
        default="drawn",
        title="Predictions known from",
        description="Tokens drawn from the dense model's predictions; the drift from them so far, as the authors do, which is nothing at first; or the text.",
    )
    temperature: float = Field(default=2.0, gt=0.0, le=20.0, title="Temperature", description="Softens both models' predictions.")
    predictive: float = Field(default=1.0, ge=0.0, le=1e6, title="Weight of predictive knowledge", description="How much the predictions count.")
    representational: float = Field(default=0.25, ge=0.0, le=1e6, title="Weight of representational knowledge", description="How much the outputs count.")
    heads_weight: float = Field(default=1.0, gt=0.0, le=1e6, title="Weight of heads", description="What a head counts beside neurons of the same cost.")
    skip_first: bool = Field(
        default=True, title="Leave out first tokens", description="The first token of a sequence is huge in causal models and would decide alone."
    )


class KPrune(StructuredMethod):
    """Knowledge measurement, knowledge-preserving mask search, knowledge-preserving weight tuning."""

    name = "k-prune"
    title = "K-pruning"
    summary = (
        "Removes the heads and neurons that know least of the model's predictions and outputs, sublayer by sublayer, and refits each to what it did before. "
        "Needs a forward and a backward pass over some text for every sublayer."
    )
    citation = "Park, Choi and Kang 2024, Accurate retraining-free pruning for pretrained encoder-based language models, arXiv 2308.03449."
    cost = "A forward and a backward pass for every sublayer, or one in all with the knowledge measured once."
    use_when = "For narrower blocks, when nothing can be trained and quality matters most."
    Options = KPruneOptions

    def score(self, scene: Scene, units: Units, options: KPruneOptions) -> Scores:
        """Knowledge of every unit, measured on the model as it is."""
        return Knowledge(scene, units, options).scores(list(units.keys), None)

    def shape(self, scene: Scene, options: KPruneOptions) -> None:
        """Measure, select within what is left of the budget, prune the sublayer at hand, refit it, and go on to the next."""
        units = Units(scene, options)
        if units.shares is not None or options.allocation == "uniform":  # what stays is settled before anything goes
            super().shape(scene, options)
            return
        knowledge = Knowledge(scene, units, options)
        left, known = budget_of(units, options.remove), dict[Key, Tensor]()

        def decide(key: Key, student: Stream, caught: Caught) -> list[int]:
            nonlocal left, known
            ahead = [other for other in units.keys if other >= key]
            if not known or options.measured == "sublayer" or (options.measured == "block" and key.kind == "heads"):
                known = knowledge.scores(ahead, student)
            stay = select(units, {other: known[other] for other in ahead}, left)[key]
            left -= len(stay) * units.cost(key)
            return stay

        remove_bottom_up(scene, units, decide, options.repair)


class Knowledge:
    """Measures the knowledge of units against a teacher, the model as it was."""

    def __init__(self, scene: Scene, units: Units, options: KPruneOptions) -> None:
        self.scene, self.units, self.options = scene, units, options
        self.teacher = scorer_of(twin(scene.model))
        with torch.no_grad():
            taught = [predicting(self.teacher.hidden(ids_BL)) for ids_BL in scene.batches()]
        temperature = options.temperature
        self.losses: list[Loss]  # of every batch; made once, for the teacher stays as it is
        if options.predictive_from == "drift":
            self.losses = [knowledge_loss(self.teacher, taught_PD, temperature) for taught_PD in taught]
        elif options.predictive_from == "drawn":
            self.losses = [drawn_loss(drawn_from(self.teacher, each_PD, temperature, number), temperature) for number, each_PD in enumerate(taught)]

    def scores(self, keys: list[Key], student: Stream | None) -> Scores:
        """(lam_rep K_rep + lam_pred K_pred) / F of every unit of these sublayers, heads times their weight; each kind as a share of its sum."""
        options = self.options
        predictive, representational = shares(self.predictive(keys, student)), shares(self.representational(keys, student))
        found: Scores = {}
        for key in keys:
            value_F = options.representational * representational[key] + options.predictive * predictive[key]
            weight = options.heads_weight if key.kind == "heads" else 1.0
            found[key] = weight * self.units.per_unit(key, value_F) / self.units.cost(key)
        return found

    def predictive(self, keys: list[Key], student: Stream | None) -> dict[Key, Tensor]:
        """Per feature: sum over batches of half the squared gradient of the loss in its mask, over the number of sequences."""
        anatomy = self.scene.anatomy  # made anew at every look
        found = {key: torch.zeros(last_matrix(anatomy, key).in_features, dtype=torch.float64) for key in keys}
        for batch in mask_gradients(self.scene, keys, self._loss, student):
            for key, gradient_F in batch.items():
                found[key] += 0.5 * gradient_F.double().square()
        return {key: total_F / len(self.scene.ids_SL) for key, total_F in found.items()}

    def _loss(self, number: int, ids_BL: Tensor) -> Loss:
        if self.options.predictive_from == "text":
            return task_loss(self.scene.model, ids_BL)
        return self.losses[number]

    def representational(self, keys: list[Key], student: Stream | None = None) -> dict[Key, Tensor]:
        """What each feature adds to its sublayer's output."""
        return sizes_in_stream(self.scene, keys, self.options.skip_first, student)


def shares(values: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The same values over their sum; zeros stay zeros."""
    total = sum(float(value_F.sum()) for value_F in values.values())
    return {key: value_F / total if total > 0 else value_F for key, value_F in values.items()}
