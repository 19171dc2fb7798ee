"""NF4: sixteen fixed levels, closer together near 0 where most weights lie, times the largest weight of a group (METHODS 15.7)."""

from typing import ClassVar, Literal

from torch import Tensor

from bitpress.engine.accounting import coded_layout
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.base import LinearMethod, MethodOptions, Outcome, Statistics
from bitpress.engine.methods.quantize.pipeline import from_groups, to_groups
from bitpress.engine.recipe import Scheme
from bitpress.kernels.layout import TableLayout
from bitpress.kernels.reference import dequantize
from bitpress.kernels.tables import nearest, pack_table, round_scales, scales_of


class Nf4(LinearMethod):
    """Nearest level of the table after division by the group's largest |weight|."""

    name = "nf4"
    title = "NF4"
    family = "quantize"
    summary = "Rounds every weight to the nearest of sixteen levels placed as the weights of a normal distribution lie. Takes seconds and looks at no text."
    citation = "Dettmers et al. 2023, QLoRA: efficient finetuning of quantized LLMs, arXiv 2305.14314."
    cost = "Seconds for a small model."
    use_when = "Choose it at 4 bits when there is no text to calibrate on, or before training adapters on the rounded model."
    table: ClassVar[Literal["nf4", "fp4"]] = "nf4"
    ability = Ability(part="weights", bits=(4,), formats=("nf4",))

    def apply(self, weight_NK: Tensor, scheme: Scheme, stats: Statistics, options: MethodOptions) -> Outcome:
        """Round one matrix on the scheme's group; with `double_quant` the scales are 8-bit codes too, rounded before the weights are."""
        layout = coded_layout(scheme.weights) if scheme.weights else None
        if not isinstance(layout, TableLayout):
            raise ValueError(f"{self.name} was given a scheme without its format")
        groups = to_groups(weight_NK, layout.group_size)
        stored_NG, supers = round_scales(groups.abs().amax(-1), layout)
        scales_NG1 = scales_of(stored_NG, supers).unsqueeze(-1)
        codes_NK = from_groups(nearest(groups / scales_NG1.where(scales_NG1 > 0, 1.0), self.table), weight_NK.shape)
        packed = pack_table(codes_NK.contiguous(), stored_NG, layout, supers)
        return Outcome(dequantize(packed), packed=packed)
