"""QuantGPT: quantisation-aware training beside the dense model, with module-wise dynamic scaling and token-level contrast (METHODS 12)."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LearnedWeight, Lesson, ModelMethod, Objective, Outcome, TrainingOptions
from bitpress.engine.methods.distill.losses import TokenBank, divergence, token_contrast
from bitpress.engine.methods.distill.quantisers import at_least, factor_of, levels_of, rounded, start_step, step_of, stored
from bitpress.engine.methods.quantize.pipeline import SCALE_DTYPE, Codes, from_groups, to_groups
from bitpress.engine.recipe import BITS, Scheme

LEAST_FACTOR = 0.01  # of its start: a step of no size would end the training


class QuantGPTOptions(TrainingOptions):
    """Quantiser, losses and rates."""

    quantiser: Literal["dynamic", "lsq", "pact"] = Field(
        default="dynamic", title="Quantiser",
        description="What is learned of the levels: a multiple of the mean weight (dynamic, QuantGPT's own), the step (lsq), or the clip (pact).",
    )  # fmt: skip
    shared: bool = Field(
        default=False, title="One factor a matrix",
        description="Learn one factor for the whole matrix, as the paper does for blocks, instead of one for each row or group, as it does for embeddings.",
    )  # fmt: skip
    least_error: bool = Field(
        default=True, title="Start at the least error",
        description="Begin with the steps of least squared error in the weights; without it, with those of the papers, which suit 2 bits only.",
    )  # fmt: skip
    contrast: float = Field(
        default=0.1, ge=0.0, le=10.0, title="Weight of the contrast",
        description="Of the token-level contrast beside the divergence of the logits; 0 is plain distillation.",
    )  # fmt: skip
    temperature: float = Field(default=0.1, gt=0.0, le=10.0, title="Temperature of the contrast", description="Smaller looks more at the most alike tokens.")
    momentum: float = Field(
        default=0.5, ge=0.0, lt=1.0, title="Momentum of the bank", description="Share of a token's kept state in what is contrasted; 0 keeps nothing."
    )
    rate: float = Field(default=1e-3, gt=0.0, le=0.1, title="Learning rate", description="Of the weights; rises over the first steps, then falls to 0.")
    factor_rate: float = Field(default=1e-2, gt=0.0, le=1.0, title="Learning rate of the factors", description="Relative to their start.")


class QuantGPT(ModelMethod):
    """The dense model teaches; every step sees the weights as they would be stored."""

    name = "quantgpt"
    title = "QuantGPT"
    family = "distill"
    summary = (
        "Trains the rounded model to agree with the dense one, with levels that follow each matrix and a contrast that keeps tokens apart. "
        "Takes minutes for millions of weights, hours for hundreds of millions on a CPU."
    )
    citation = "Tao et al. 2022, Compression of Generative Pre-trained Language Models via Quantization, ACL 2022, arXiv 2203.10705."
    cost = "About two minutes for 3 million weights and 300 steps on two cores; grows with weights times tokens times steps."
    use_when = "Choose it at 2 bits, or when the embedding gets few bits too, and there is time and text to train on."
    ability = Ability(part="weights", bits=BITS, zeros=(), factors=False)
    Options = QuantGPTOptions

    def start(self, weight_NK: Tensor, scheme: Scheme, options: QuantGPTOptions) -> LearnedWeight:
        """The dense weights themselves, with the first factors."""
        return RoundedWeight(weight_NK, scheme, options)

    def objective(self, options: QuantGPTOptions) -> Objective:
        """Divergence of the logits and, unless its weight is 0, the contrast."""
        return Distillation(options)


class RoundedWeight(LearnedWeight):
    """One matrix: weights that training moves, and the factors of its levels."""

    def __init__(self, weight_NK: Tensor, scheme: Scheme, options: QuantGPTOptions) -> None:
        super().__init__()
        if scheme.weights is None or not scheme.weights.symmetric:
            raise ValueError("quantgpt was given a scheme without symmetric weights")
        self.shape, self.bits, self.options = tuple(weight_NK.shape), scheme.weights.bits, options
        self.levels = levels_of(options.quantiser, self.bits)
        groups_Rg = to_groups(weight_NK, scheme.weights.group_size).flatten(0, 1)
        first_R1 = start_step(options.quantiser, groups_Rg, self.levels, options.least_error)
        self.factor = nn.Parameter(factor_of(options.quantiser, first_R1, groups_Rg, self.levels, options.shared))
        self.least = float(self.factor.detach().mean()) * LEAST_FACTOR
        self.size = float(self.factor.detach().mean())
        self.weight_Rg = nn.Parameter(groups_Rg.clone())
        pruned = scheme.sparsity is not None and scheme.sparsity.ratio > 0
        self.kept_Rg = groups_Rg != 0 if pruned else None

    def step(self) -> Tensor:
        """The steps as they are stored, [R, 1]."""
        factor = at_least(self.factor, self.least)
        return stored(step_of(self.options.quantiser, factor, self.weight_Rg, self.levels))

    def forward(self) -> Tensor:
        """Rounded weights; pruned ones stay zero."""
        weight_Rg = self.weight_Rg if self.kept_Rg is None else self.weight_Rg * self.kept_Rg
        return from_groups(rounded(self.options.quantiser, weight_Rg, self.step(), self.levels), self.shape)

    def rates(self) -> list[dict[str, Any]]:
        """The weights' rate, and the factors' in proportion to their size."""
        options = self.options
        return [{"params": [self.weight_Rg], "lr": options.rate}, {"params": [self.factor], "lr": options.factor_rate * self.size}]

    @torch.no_grad()
    def outcome(self) -> Outcome:
        """Symmetric uniform codes: the level m is stored as m + 2**(bits - 1)."""
        made_NK, step_R1 = self().contiguous(), self.step()
        whole_Rg = (to_groups(made_NK, self.weight_Rg.shape[1]).flatten(0, 1) / step_R1).round_()
        codes_NK = from_groups(whole_Rg + 2 ** (self.bits - 1), self.shape).to(torch.uint8).contiguous()
        return Outcome(made_NK, Codes(codes_NK, step_R1.view(self.shape[0], -1).to(SCALE_DTYPE), None))


class Distillation(Objective):
    """Mean divergence of the logits a token, plus the weighted contrast of the states."""

    def __init__(self, options: QuantGPTOptions) -> None:
        self.options, self.bank = options, TokenBank(options.momentum)
        self.reads_states = options.contrast > 0

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        """`logits` and `contrast`."""
        found = {"logits": lesson.over_logits(divergence) / lesson.student_BTd[..., 0].numel()}
        if self.options.contrast:
            blended_BTd = self.bank.blend(lesson.chosen_B, lesson.sequences, lesson.student_BTd)
            found["contrast"] = self.options.contrast * token_contrast(blended_BTd, lesson.teacher_BTd, self.options.temperature)
        return found

    def state(self) -> dict[str, Tensor]:
        """The bank's."""
        return self.bank.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Give it to the bank."""
        self.bank.load(state)
