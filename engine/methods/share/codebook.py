"""Codebook: all weights of a matrix share sixteen values, found by k-means and looked up by 4-bit codes (METHODS 14).

A weight is one of the values times its group's scale. The values are those of least squared error, by Lloyd's turns of nearest value and
weighted mean; one of them stays 0. Shape letters: N outputs, K inputs, G groups a row, S weights of a matrix, L values.
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bitpress.engine.accounting import coded_layout
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import from_groups, to_groups
from bitpress.engine.recipe import Scheme
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.reference import dequantize
from bitpress.kernels.tables import levels, nearest_of, pack_table, round_scales, scales_of


class CodebookOptions(MethodOptions):
    """How the values are looked for."""

    rounds: int = Field(
        default=100, ge=0, le=10_000, title="Rounds",
        description="Turns of nearest value and weighted mean at most; 0 keeps the start, the levels of NF4. They end where nothing changes.",
    )  # fmt: skip
    by_inputs: bool = Field(
        default=True, title="Weigh errors by inputs",
        description="Errors of weights whose inputs are large count more, by the inputs' mean square on the calibration text. Off: no text is read.",
    )  # fmt: skip


class Sorted(NamedTuple):
    """Numbers in ascending order with the sums that means of runs of them need."""

    values_S: Tensor
    weight_sums: Tensor  # float64 [S + 1]: of the weights before each
    value_sums: Tensor  # float64 [S + 1]: of weight times value


class Codebook(LinearMethod):
    """k-means in one dimension, over all weights of a matrix at once."""

    name = "codebook"
    title = "Codebook (k-means)"
    family = "share"
    summary = (
        "Lets all weights of a matrix share sixteen values of its own, found by k-means. Each weight is a 4-bit place in that list, times a "
        "scale; takes seconds."
    )
    citation = (
        "Han et al. 2016, Deep compression: pruning, trained quantization and Huffman coding, arXiv 1510.00149; weighing by what errors do after "
        "Kim et al. 2023, SqueezeLLM, arXiv 2306.07629, here by the inputs' mean square."
    )
    cost = "Seconds for a small model; by inputs one pass over the text."
    use_when = "Choose it at 4 bits with large groups or whole rows, where even levels fit worst; with `format: codebook`."
    ability = Ability(part="weights", bits=(4,), formats=("codebook",))
    Options = CodebookOptions

    def needs_for(self, options: CodebookOptions) -> frozenset[str]:
        """Text is looked at only to weigh errors."""
        return frozenset({"second_moment"}) if options.by_inputs else self.needs

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: CodebookOptions) -> Outcome:
        """Find the values of one matrix, and the nearest one to each weight on its group's stored scale."""
        layout = coded_layout(self.weights_of(scheme))
        if not isinstance(layout, TableLayout) or not layout.own_levels:
            raise ValueError(f"{self.name} was given a scheme without its format")
        groups = to_groups(weight_NK, layout.group_size)
        stored_NG, supers = round_scales(groups.abs().amax(-1), layout)
        scales_NG1 = scales_of(stored_NG, supers).unsqueeze(-1)
        shares = groups / scales_NG1.where(scales_NG1 > 0, 1.0)
        counts = importance(weight_NK, stats, options.by_inputs)
        errors = to_groups(counts, layout.group_size) * scales_NG1.square()  # of a share, as the weight sees it
        own_L = codebook(from_groups(shares, weight_NK.shape), from_groups(errors, weight_NK.shape), options.rounds)
        codes_NK = from_groups(nearest_of(shares, own_L), weight_NK.shape).contiguous()
        packed = pack_table(codes_NK, stored_NG, layout, supers, own_L)
        return Outcome(dequantize(packed), packed=packed)


def importance(weight_NK: Tensor, stats: Statistics, by_inputs: bool) -> Tensor:
    """What an error of each weight counts, [N, K]."""
    if not by_inputs:
        return torch.ones_like(weight_NK)
    return stats["second_moment"].to(weight_NK).expand_as(weight_NK)


def codebook(values: Tensor, weights: Tensor, rounds: int) -> Tensor:
    """Sixteen values, ascending, one of them 0, rounded to bfloat16, float32 [L]: a local least of sum weight (value - nearest)^2.

    values, weights: of the same shape; weights that are all 0 count alike. A value that nothing is nearest to stays where it is.
    """
    known, found_L = sort(values, weights), levels("nf4", torch.float64).to(values.device)
    zero = int(found_L.abs().argmin())
    for _ in range(rounds):
        moved_L = means(known, found_L)
        moved_L[zero] = 0.0
        if torch.equal(moved_L, found_L):
            break
        found_L = moved_L
    return found_L.bfloat16().float()


def sort(values: Tensor, weights: Tensor) -> Sorted:
    """All numbers in order, with their sums."""
    values_S, order = values.flatten().sort()
    counts_S = weights.flatten()[order].double()
    counts_S = counts_S if bool(counts_S.any()) else torch.ones_like(counts_S)
    sums = (torch.nn.functional.pad(column.cumsum(0), (1, 0)) for column in (counts_S, counts_S * values_S))
    return Sorted(values_S, *sums)


def means(known: Sorted, found_L: Tensor) -> Tensor:
    """The weighted mean of the numbers nearest to each value; the value itself where there are none."""
    ends = torch.searchsorted(known.values_S, ((found_L[1:] + found_L[:-1]) / 2).to(known.values_S), right=True)
    cuts = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), len(known.values_S))))
    totals, sums = known.weight_sums[cuts].diff(), known.value_sums[cuts].diff()
    return torch.where(totals > 0, sums / totals.where(totals > 0, 1.0), found_L)
