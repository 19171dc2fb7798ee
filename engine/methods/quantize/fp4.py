"""FP4: the sixteen numbers of a 4-bit float times the largest weight of a group (METHODS 15.7)."""

from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.quantize.nf4 import Nf4


class Fp4(Nf4):
    """As NF4, on another table."""

    name = "fp4"
    title = "FP4"
    summary = "Rounds every weight to the nearest of the sixteen values of a 4-bit float, scaled by the group. Takes seconds and looks at no text."
    citation = "As in bitsandbytes; Dettmers and Zettlemoyer 2023, The case for 4-bit precision, arXiv 2212.09720."
    use_when = "Choose it to compare with NF4, which is nearly always closer; its levels are those of 4-bit floating-point hardware."
    table = "fp4"
    ability = Ability(part="weights", bits=(4,), formats=("fp4",))
