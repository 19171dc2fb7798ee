"""How much each layer suffers from each option, each layer on its own: measured once, kept, resumed. Knows which measure comes from which pass.

With D = W - W' for one option: `data_free` is sum D_ij^2 / sum W_ij^2; `activation` is the same with column j weighted by
E[x_j^2] of the layer's inputs (`sensitivity_walk`). `fisher` is the KL divergence of the predictions to second order, from one backward
(`sensitivity_backward`); `loss` is the same, but measured among changed layers where it stands on too little (`sensitivity_context`);
`kl` is that divergence itself with only this layer changed, and `kl_without` what leaving this layer dense saves when all others are
changed (`sensitivity_alone`). How harms of several layers add up none of them knows.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

from torch import Tensor

from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.data.tokens import ids_digest
from bitpress.engine.errors import InputError
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Calibration
from bitpress.engine.sensitivity_alone import score_alone, score_without
from bitpress.engine.sensitivity_backward import score_by_backward
from bitpress.engine.sensitivity_context import score_in_context
from bitpress.engine.sensitivity_file import FISHER, KINDS, KL, KL_WITHOUT, LOSS, NEED_TEXT, OPTIONS, QUICK_KINDS, VERSION, Option, SensitivityReport, read
from bitpress.engine.sensitivity_scoring import Emit, Scoring
from bitpress.engine.sensitivity_walk import score_by_walk

CALIBRATION = Calibration(sequences=8, length=256)


def measure_on_text(
    loaded: Loaded,
    text: str = "auto",
    force: bool = False,
    emit: Emit = lambda kind, data: None,
    should_stop: Callable[[], bool] = lambda: False,
    kinds: Sequence[str] = QUICK_KINDS,
) -> SensitivityReport:
    """Every option for every block linear, on the calibration part of a text. Raises as `measure_sensitivity` does."""
    chosen = calibration_set(loaded, CALIBRATION.model_copy(update={"text": text}))
    return measure_sensitivity(loaded, chosen.ids_SL, kinds=kinds, emit=emit, should_stop=should_stop, text=chosen.text, force=force)


def measure_sensitivity(
    loaded: Loaded,
    ids: Tensor | None,
    options: Sequence[Option] = OPTIONS,
    kinds: Sequence[str] = QUICK_KINDS,
    emit: Emit = lambda kind, data: None,
    should_stop: Callable[[], bool] = lambda: False,
    text: str = "",
    force: bool = False,
) -> SensitivityReport:
    """Score every block linear under every option; kinds that are kept for the same model, tokens and options are not measured again.

    ids: int64 [S, L], needed for all kinds but `data_free`. What is done is kept after each block, and a later call goes on
    from there; `force` measures these kinds anew. Raises InputError for an unknown kind or missing tokens, Cancelled when told to stop.
    """
    report = _new_report(loaded, ids, options, kinds, text)
    kept = read(report.path)
    unfinished = report.path.with_suffix(".unfinished")
    begun = None if force else read(unfinished)
    report = kept or report
    if force:
        _forget(report, kinds)
    missing = [kind for kind in KINDS if kind in kinds and kind not in report.kinds]
    if not missing:
        return report
    if begun is not None:
        known = {(score.layer, score.option, score.kind) for score in report.scores}
        report.scores += [score for score in begun.scores if score.kind in missing and (score.layer, score.option, score.kind) not in known]
    _measure(Scoring(loaded, report, unfinished, emit, should_stop), ids, missing)
    report.save()
    unfinished.unlink(missing_ok=True)
    return report


def _forget(report: SensitivityReport, kinds: Sequence[str]) -> None:
    report.kinds = tuple(kind for kind in report.kinds if kind not in kinds)
    report.scores = [score for score in report.scores if score.kind not in kinds]
    report.seconds_of = {kind: spent for kind, spent in report.seconds_of.items() if kind not in kinds}


def _new_report(loaded: Loaded, ids: Tensor | None, options: Sequence[Option], kinds: Sequence[str], text: str) -> SensitivityReport:
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"There is no sensitivity of kind '{unknown[0]}'.", "", f"Kinds are {', '.join(KINDS)}.")
    if ids is None and (needy := [kind for kind in kinds if kind in NEED_TEXT]):
        raise InputError(f"Sensitivity of kind '{needy[0]}' needs text.", "No tokens were given.", "Give calibration tokens, or ask for data_free alone.")
    tokens = ids_digest(ids) if ids is not None else ""
    decided_by = [VERSION, loaded.anatomy.fingerprint, tokens, [option.model_dump(mode="json") for option in options]]
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
    looked_at = f"inputs from {ids.shape[0]} x {ids.shape[1]} tokens of {text or 'the given text'}" if ids is not None else "no text"
    return SensitivityReport(
        digest=digest,
        model=loaded.anatomy.model,
        fingerprint=loaded.anatomy.fingerprint,
        text=text,
        tokens_sha256=tokens,
        protocol=f"each layer alone, rounding to nearest and magnitude, {looked_at}",
        options=tuple(options),
    )


def _measure(scoring: Scoring, ids: Tensor | None, missing: Sequence[str]) -> None:
    """Measure what is missing, cheap kinds first, those of one pass together."""
    if quick := [kind for kind in QUICK_KINDS if kind != LOSS and (kind in missing or (kind == FISHER and LOSS in missing))]:
        with scoring.timed(quick):
            score_by_backward(scoring, ids, quick) if FISHER in quick and ids is not None else score_by_walk(scoring, ids, quick)
    for kind, score in ((LOSS, score_in_context), (KL, score_alone), (KL_WITHOUT, score_without)):
        if ids is not None and kind in missing:
            with scoring.timed([kind]):
                score(scoring, ids)
