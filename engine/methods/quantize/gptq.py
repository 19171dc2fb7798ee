"""GPTQ: weights are rounded input by input, and those not yet rounded make up for the error (METHODS 15.2).

Shapes: N outputs, K inputs, G groups a row, g inputs a group.
"""

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.obs import factorise, keeping, sweep
from bitpress.engine.methods.quantize.pipeline import (
    SCALE_DTYPE,
    ClipSearch,
    Codes,
    Grid,
    codes_on,
    decode,
    dequantize_groups,
    encode,
    group_range,
    make_grid,
    search_grid,
    to_groups,
)  # fmt: skip
from bitpress.engine.methods.quantize.refine import refine, target_of
from bitpress.engine.recipe import BITS, Scheme, WeightScheme


class GptqOptions(MethodOptions):
    """The order of rounding, the grids and the damping."""

    act_order: bool = Field(
        default=True,
        title="Largest inputs first",
        description="Round the inputs of largest mean square first, while most weights are left to make up for their errors. The grids are then fixed before.",
    )
    static_groups: bool = Field(
        default=True,
        title="Fix the grids before rounding",
        description="Take each group's grid from the original weights; otherwise from the corrected ones when its turn comes. Always on with largest first.",
    )
    damping: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        title="Damping",
        description="Share of the mean diagonal that is added to the second moments. It is raised tenfold, and the run says so, when they are singular.",
    )
    true_sequential: bool = Field(
        default=False,
        title="One group of layers after another",
        description="Within a block, look again at the inputs of o after q, k and v were rounded, and so on. Takes about twice as long.",
    )
    clip_search: bool = Field(
        default=True,
        title="Search the clipping range",
        description="Try narrower ranges for each group and keep the one of least error, each weight's error weighted by its input's mean square.",
    )
    candidates: int = Field(default=40, ge=2, le=99, title="Ranges tried", description="The range is shrunk by 1% for each one tried. Used with the search.")
    by_loss: bool = Field(
        default=False,
        title="Weigh tokens by what they decide",
        description="A token's errors count by what they do to the predictions, by one backward. Few tokens then decide, so it wants much text.",
    )
    rounds: int = Field(
        default=0,
        ge=0,
        le=50,
        title="Rounds of mending",
        description="Then scales and codes are changed in turn wherever that lowers the error of the outputs. A round takes about as long as the rounding.",
    )
    exponent: float = Field(
        default=2.0, ge=1.0, le=4.0, title="Error exponent", description="The search minimises the sum of |error| to this power. Larger avoids large errors."
    )


class Gptq(LinearMethod):
    """Optimal brain compression with a fixed order for all rows."""

    name = "gptq"
    title = "GPTQ"
    family = "quantize"
    summary = "Rounds weights one input at a time and lets those that are left make up for the error in the layer's output. Reads the calibration text once."
    citation = "Frantar et al. 2023, GPTQ: accurate post-training quantization for generative pre-trained transformers, arXiv 2210.17323."
    cost = "About a minute for 135 million weights on two cores; grows with the calibration text and with the cube of a layer's inputs."
    use_when = "Choose it at 3 and 4 bits when there is text that resembles what the model will read."
    ability = Ability(part="weights", bits=BITS, zeros=("integer", "float"))
    needs = frozenset({"gram"})
    Options = GptqOptions

    def needs_for(self, options: GptqOptions) -> frozenset[str]:
        """Second moments of the inputs, each token's alike or by its weight."""
        return frozenset({"loss_gram"}) if options.by_loss else self.needs

    def within_block(self, options: GptqOptions) -> bool:
        """With `true_sequential` each group of layers sees what the rounded layers before it in the block put out."""
        return options.true_sequential

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: GptqOptions) -> Outcome:
        """Quantise one matrix so that the error of its outputs on the calibration inputs is small."""
        weights = self.weights_of(scheme)
        gram_KK = stats["loss_gram" if options.by_loss else "gram"]
        power_K = gram_KK.diagonal()
        order_K = power_K.argsort(descending=True, stable=True) if options.act_order else torch.arange(len(power_K))
        factor = factorise(gram_KK[order_K][:, order_K], options.damping)
        clip = ClipSearch(options.candidates, options.exponent) if options.clip_search else None
        whole = weights.model_copy(update={"zero": "integer"})
        grids = Grids(whole, clip, power_K.float())
        if options.static_groups or options.act_order:
            grids.fix(weight_NK)
        pruned = scheme.sparsity is not None and scheme.sparsity.ratio > 0
        keep_NK = weight_NK != 0 if pruned else None
        codes = round_in_order(weight_NK, order_K, factor.upper_KK, grids, keep_NK)
        codes = refine(floating(codes, weights), target_of(weight_NK, gram_KK, options.damping), weights, options.rounds, keep_NK)
        return Outcome(dequantize_groups(codes, weights), codes, notes=factor.notes)


def floating(codes: Codes, scheme: WeightScheme) -> Codes:
    """The same codes, whole zeros kept as floats where the scheme has those."""
    return codes if scheme.zero == "integer" or codes.zeros_NG is None else codes._replace(zeros_NG=codes.zeros_NG.to(SCALE_DTYPE))


class Grids:
    """The grid of every group: fixed from the original weights, or made when the rounding reaches the group."""

    def __init__(self, scheme: WeightScheme, clip: ClipSearch | None, power_K: Tensor) -> None:
        """power_K: mean square of each input, by which the clip search weighs the errors."""
        self.scheme, self.clip = scheme, clip
        self.size = scheme.group_size or len(power_K)
        self.power_1Gg = to_groups(power_K.unsqueeze(0), scheme.group_size)
        self.top = 2**scheme.bits - 1
        self.by_group: dict[int, Grid] = {}  # scale and zero [N]

    def fix(self, weight_NK: Tensor) -> None:
        """Make every grid now, from these weights."""
        grid = self._make(to_groups(weight_NK, self.scheme.group_size), self.power_1Gg)
        for group in range(grid.scale.shape[1]):
            self.by_group[group] = Grid(grid.scale[:, group, 0].contiguous(), grid.zero[:, group, 0].contiguous(), self.top)

    def rounded(self, weight_KN: Tensor, at: int, index: int) -> Tensor:
        """Row `at`, which holds the weights of input `index`, on its grid: [N]."""
        grid = self.of(index, weight_KN)
        return decode(encode(weight_KN[at], grid), grid)

    def codes(self, made_NK: Tensor) -> Codes:
        """What is stored, of a matrix whose every weight is a level of its grid."""
        made = [self.by_group[group] for group in sorted(self.by_group)]
        scale_NG1, zero_NG1 = (torch.stack(column, dim=1).unsqueeze(-1) for column in zip(*((grid.scale, grid.zero) for grid in made), strict=True))
        return codes_on(to_groups(made_NK, self.scheme.group_size), Grid(scale_NG1, zero_NG1, self.top), self.scheme, made_NK.shape)

    def of(self, index: int, weight_KN: Tensor) -> Grid:
        """The grid of input `index`; a group without one gets it from the weights as they are now."""
        group = index // self.size
        if group not in self.by_group:
            start = group * self.size
            members_Ng = weight_KN[start : start + self.size].t()
            grid = self._make(members_Ng, self.power_1Gg[0, group, : members_Ng.shape[1]])
            self.by_group[group] = Grid(grid.scale[:, 0], grid.zero[:, 0], self.top)
        return self.by_group[group]

    def _make(self, groups: Tensor, power: Tensor) -> Grid:
        return search_grid(groups, self.scheme, self.clip, power) if self.clip else make_grid(*group_range(groups), self.scheme)


def round_in_order(weight_NK: Tensor, order_K: Tensor, upper_KK: Tensor, grids: Grids, keep_NK: Tensor | None = None) -> Codes:
    """Codes of a matrix whose inputs are rounded in the order `order_K`, each error spread over the inputs still to come.

    upper_KK: factor of the inverse second moments, of the inputs in that order. Grids that are not fixed need the inputs
    in their own order, since a group's grid is made when its first input is reached. keep_NK: weights that may differ
    from zero; None for all.
    """
    order = order_K.tolist()
    choose = None if keep_NK is None else keeping(keep_NK[:, order_K])
    made_NK = torch.empty_like(weight_NK)
    made_NK[:, order_K] = sweep(weight_NK[:, order_K], upper_KK, choose, rounding=lambda w_KN, at: grids.rounded(w_KN, at, order[at]), group_size=grids.size)
    return grids.codes(made_NK)
