"""How much each layer suffers from each option, each layer on its own: measured once, kept, resumed. Knows weights and input statistics.

With D = W - W' for one option: `data_free` is sum D_ij^2 / sum W_ij^2; `activation` is the same with column j weighted by
E[x_j^2] of the layer's inputs in the dense model, the expected squared change of the output if inputs were uncorrelated.
Neither knows how errors of several layers add up; both only rank.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.engine.calibrate import walk
from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.data.tokens import ids_digest
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import finite
from bitpress.engine.model import surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Calibration, Scheme
from bitpress.engine.sensitivity_file import ACTIVATION, DATA_FREE, KINDS, OPTIONS, VERSION, Option, Score, SensitivityReport, read

Emit = Callable[[str, dict[str, Any]], None]
CALIBRATION = Calibration(sequences=8, length=512)
METHOD_OF = {"weights": "rtn", "sparsity": "magnitude"}


def measure_on_text(
    loaded: Loaded, text: str = "auto", force: bool = False, emit: Emit = lambda kind, data: None, should_stop: Callable[[], bool] = lambda: False
) -> SensitivityReport:
    """Every option and kind for every block linear, with inputs from the calibration part of a text. Raises as `measure_sensitivity` does."""
    chosen = calibration_set(loaded, CALIBRATION.model_copy(update={"text": text}))
    return measure_sensitivity(loaded, chosen.ids_SL, emit=emit, should_stop=should_stop, text=chosen.text, force=force)


def measure_sensitivity(
    loaded: Loaded,
    ids: Tensor | None,
    options: Sequence[Option] = OPTIONS,
    kinds: Sequence[str] = KINDS,
    emit: Emit = lambda kind, data: None,
    should_stop: Callable[[], bool] = lambda: False,
    text: str = "",
    force: bool = False,
) -> SensitivityReport:
    """Score every block linear under every option; a kept measurement of the same model, tokens and options is returned at once.

    ids: int64 [S, L], needed for `activation` alone. What is done is kept after each block, and a later call goes on from
    there; `force` begins anew. Raises InputError for an unknown kind or missing tokens, Cancelled when told to stop.
    """
    report = _new_report(loaded, ids, options, kinds, text)
    unfinished = report.path.with_suffix(".unfinished")
    if force:
        report.path.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
    kept = read(report.path)
    if kept is not None:
        return kept
    scoring = _Scoring(loaded, read(unfinished) or report, unfinished, emit, should_stop)
    scoring.run(ids)
    scoring.report.save()
    unfinished.unlink(missing_ok=True)
    return scoring.report


def _new_report(loaded: Loaded, ids: Tensor | None, options: Sequence[Option], kinds: Sequence[str], text: str) -> SensitivityReport:
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"There is no sensitivity of kind '{unknown[0]}'.", "", f"Kinds are {', '.join(KINDS)}.")
    if ACTIVATION in kinds and ids is None:
        raise InputError("Sensitivity by activations needs text.", "No tokens were given.", "Give calibration tokens, or ask for data_free alone.")
    tokens = ids_digest(ids) if ids is not None else ""
    decided_by = [VERSION, loaded.anatomy.fingerprint, tokens, sorted(kinds), [option.model_dump(mode="json") for option in options]]
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
    looked_at = f"inputs from {ids.shape[0]} x {ids.shape[1]} tokens of {text or 'the given text'}" if ids is not None else "no text"
    return SensitivityReport(
        digest=digest,
        model=loaded.anatomy.model,
        fingerprint=loaded.anatomy.fingerprint,
        kinds=tuple(kinds),
        text=text,
        tokens_sha256=tokens,
        protocol=f"each layer alone, rounding to nearest and magnitude, {looked_at}",
        options=tuple(options),
    )


@dataclass
class _Scoring:
    """One measurement under way; `report` holds the scores so far."""

    loaded: Loaded
    report: SensitivityReport
    unfinished: Path
    emit: Emit
    should_stop: Callable[[], bool]
    started: float = field(default_factory=time.perf_counter)

    def run(self, ids: Tensor | None) -> None:
        """Score the layers that have no score yet, block by block."""
        anatomy, done = self.loaded.anatomy, {score.layer for score in self.report.scores}
        self.left = [part for part in anatomy.linears if part.name not in done]
        self.before = self.report.seconds
        self.emit("stage_started", {"stage": "measuring sensitivity", "total": len(anatomy.linears)})
        if ids is None or ACTIVATION not in self.report.kinds:
            for block in range(anatomy.blocks):
                self.block(block, {})
            return
        requests = {part.name: {"second_moment"} for part in self.left}
        # Nothing is changed on the way, so the plain forward's outputs can be handed on: one pass instead of two.
        walk(self.loaded.model, anatomy, ids, requests, self.block, sequential=False, should_stop=self.should_stop)

    def block(self, block: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Score one block's layers and keep them."""
        for part in (part for part in self.left if part.block == block):
            if self.should_stop():
                raise Cancelled(remedy="Finished blocks are kept; start it again to go on.")
            self.layer(part.name, stats.get(part.name, {}))
            self.emit("progress", {"done": len({score.layer for score in self.report.scores}), "total": len(self.loaded.anatomy.linears)})
        self.report.seconds = self.before + time.perf_counter() - self.started
        self.report.save(self.unfinished)

    def layer(self, name: str, stats: Mapping[str, Tensor]) -> None:
        """All options of one layer. A layer that no input reached has no activation score."""
        weight_NK = finite(surgery.linear_weight(surgery.get(self.loaded.model, name)).detach().float(), name)
        moment_K = stats.get("second_moment")
        weights_K = {DATA_FREE: torch.ones(weight_NK.shape[1])} | ({ACTIVATION: moment_K.float()} if moment_K is not None else {})
        for option in self.report.options:
            for kind, score in option_scores(weight_NK, option.scheme, weights_K).items():
                if kind in self.report.kinds:
                    self.report.scores.append(Score(layer=name, option=option.id, kind=kind, score=score))


def option_scores(weight_NK: Tensor, scheme: Scheme, weights_K: Mapping[str, Tensor]) -> dict[str, float]:
    """sum_ij v_j D_ij^2 / sum_ij v_j W_ij^2 for every column weighting v [K]; 0 for a matrix without weight."""
    part = "weights" if scheme.weights else "sparsity"
    method = registry.linear(METHOD_OF[part])
    made_NK = method.apply(weight_NK, scheme, {}, method.parse({})).weight_NK
    error_K, whole_K = (weight_NK - made_NK).square_().sum(dim=0), weight_NK.square().sum(dim=0)
    totals = {kind: (float(v_K @ error_K), float(v_K @ whole_K)) for kind, v_K in weights_K.items()}
    return {kind: error / whole if whole > 0 else 0.0 for kind, (error, whole) in totals.items()}
