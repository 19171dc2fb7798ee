"""What zeros bring here, in words: bytes from the stored layout, speed from this machine's own figures. Knows schemes and timings; no widget."""

from bitpress.app.ui.numbers import TIMES, amount
from bitpress.engine.accounting import layout_of
from bitpress.engine.latency_table import LatencyTable
from bitpress.engine.model.anatomy import Part
from bitpress.engine.recipe import Scheme

NO_KERNEL = "No kernel makes this pattern faster here"
FASTER = 1.02  # what is less than 2% faster is not told from noise


def zeros_note(scheme: Scheme, part: Part, table: LatencyTable | None) -> str:
    """A sentence or two on a matrix with zeros, against the same matrix without them; empty for one that has none."""
    if not scheme.sparsity or not scheme.sparsity.ratio:
        return ""
    zeros, plain = (layout_of(one) for one in (scheme, scheme.model_copy(update={"sparsity": None})))
    if zeros == plain:
        return f"Stored as if there were no zeros, 0 % smaller. {NO_KERNEL}: nothing is left out."
    smaller = 1 - zeros.nbytes(part.out_features, part.in_features) / plain.nbytes(part.out_features, part.in_features)
    stored = f"Stored {smaller:.0%} smaller than without zeros."
    if table is None or not (table.knows(zeros) and table.knows(plain)):
        return f"{stored} Not timed on this machine yet: run `bitpress bench kernels`."
    gain = table.product_seconds(plain, part.out_features, part.in_features) / table.product_seconds(zeros, part.out_features, part.in_features)
    if gain < FASTER:
        return f"{stored} {NO_KERNEL}: measured {amount(gain)}{TIMES} the speed of the same matrix without zeros."
    return f"{stored} Measured {amount(gain)}{TIMES} the speed of the same matrix without zeros, one token at a time."
