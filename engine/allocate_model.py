"""Allocation for a model by its id: finds what is kept of it, and says what is missing. Knows files; torch-free."""

from collections.abc import Callable, Mapping, Sequence

from bitpress.engine import sensitivity_file
from bitpress.engine.allocate import Allocation, allocate
from bitpress.engine.choices import choices_of
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.latency_table import kept_table
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe


def allocate_model(
    model: str,
    budgets: Mapping[str, float],
    kind: str | None = None,
    ties: Sequence[str] = (),
    locks: Mapping[str, str] | None = None,
    embedding_bits: int | None = 8,
    measure: Callable[[], object] | None = None,
    base: Recipe | None = None,
    drops: bool = False,
) -> Allocation:
    """The recipe for a model of the library. `measure` is called where no suitable sensitivity is kept.

    Raises InputError as `choices_of` and `allocate` do, and where nothing is kept and nothing can be measured.
    """
    library.model_path(model)
    report = _kept(model, kind)
    if report is None and measure is not None:
        measure()
        report = _kept(model, kind)
    if report is None:
        what = f"No sensitivity{f' of kind {kind}' if kind else ''} is kept for {model}."
        raise InputError(what, "", f"Run `bitpress sensitivity {model}{f' --kind {kind}' if kind else ''}` once.")
    choices = choices_of(anatomy_of(model), report, kind or report.spent_by, ties, locks, embedding_bits)
    return allocate(choices, budgets, base, kept_table(), drops)


def _kept(model: str, kind: str | None) -> sensitivity_file.SensitivityReport | None:
    try:
        fingerprint = anatomy_of(model).fingerprint
    except BitpressError:
        return None
    return sensitivity_file.find(fingerprint, [kind] if kind else [sensitivity_file.FISHER])


def anatomy_of(model: str) -> Anatomy:
    """The kept anatomy. Raises BitpressError before a worker has looked at the model."""
    try:
        return Anatomy.load(library.anatomy_path(model))
    except (OSError, ValueError):
        raise BitpressError(f"{model} was not looked at yet.", "Its anatomy.json is missing.", f"Run `bitpress sensitivity {model}` once.") from None
