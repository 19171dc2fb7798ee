"""How much each layer suffers from each option, each layer on its own: measured once, kept, resumed. Knows which measure comes from which pass.

With D = W - W' for one option: `data_free` is sum D_ij^2 / sum W_ij^2; `activation` is the same with column j weighted by
E[x_j^2] of the layer's inputs. `fisher` is the KL divergence of the predictions to second order, from one backward
(`sensitivity_fisher`); `loss` is the same, but measured among changed layers where it stands on too little (`sensitivity_context`);
`kl` is that divergence itself with only this layer changed, and `kl_without` what leaving this layer dense
saves when all others are changed (`sensitivity_truth`). How harms of several layers add up none of them knows.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine import sensitivity_context as context
from bitpress.engine import sensitivity_fisher as fisher
from bitpress.engine import sensitivity_truth as truth
from bitpress.engine.calibrate import walk
from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.data.tokens import ids_digest
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import finite
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Part
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Calibration, Scheme, WeightScheme
from bitpress.engine.sensitivity_cache import CACHE_AXES, cached_outputs, in_cache
from bitpress.engine.sensitivity_file import (
    ACTIVATION,
    CACHE_BITS,
    DATA_FREE,
    DROP,
    EMBEDDING_BITS,
    FISHER,
    KINDS,
    KL,
    KL_WITHOUT,
    LOSS,
    NEED_TEXT,
    OPTIONS,
    QUICK_KINDS,
    VERSION,
    Option,
    Score,
    SensitivityReport,
    cache_layer,
    read,
)

Emit = Callable[[str, dict[str, Any]], None]
CALIBRATION = Calibration(sequences=8, length=256)
METHOD_OF = {"weights": "rtn", "sparsity": "magnitude"}


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
    _Scoring(loaded, report, unfinished, emit, should_stop).run(ids, missing)
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


@dataclass
class _Scoring:
    """One measurement under way; `report` holds the scores so far."""

    loaded: Loaded
    report: SensitivityReport
    unfinished: Path
    emit: Emit
    should_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        """Hold the stored weights: while a pass computes, the modules hold casts of them."""
        modules = {name: surgery.get(self.loaded.model, name) for name in self.loaded.anatomy.by_name}
        self.stored = {name: _matrix(module).detach() for name, module in modules.items()}

    def run(self, ids: Tensor | None, missing: Sequence[str]) -> None:
        """Measure what is missing, cheap kinds first, those of one pass together."""
        quick = [kind for kind in QUICK_KINDS if kind != LOSS and (kind in missing or (kind == FISHER and LOSS in missing))]
        if quick:
            with self.timed(quick):
                self.backward(ids, quick) if FISHER in quick and ids is not None else self.walk(ids, quick)
        if ids is not None and LOSS in missing:
            with self.timed([LOSS]):
                self.spent(ids)
        if ids is not None and KL in missing:
            with self.timed([KL]):
                self.alone(ids)
        if ids is not None and KL_WITHOUT in missing:
            with self.timed([KL_WITHOUT]):
                self.without(ids)

    @contextmanager
    def timed(self, kinds: Sequence[str]) -> Iterator[None]:
        """The time of a pass, shared by the kinds that came from it. They count as measured once it is through."""
        began = time.perf_counter()
        try:
            yield
        finally:
            share = (time.perf_counter() - began) / len(kinds)
            self.report.seconds_of |= {kind: self.report.seconds_of.get(kind, 0.0) + share for kind in kinds}
        self.report.kinds = tuple(kind for kind in KINDS if kind in (*self.report.kinds, *kinds))

    def done(self, kind: str) -> set[tuple[str, str]]:
        """(layer, option) of the scores of a kind."""
        return {(score.layer, score.option) for score in self.report.scores if score.kind == kind}

    def keep(self, layer: str, option: str, kind: str, score: float) -> None:
        self.report.scores.append(Score(layer=layer, option=option, kind=kind, score=score))

    def weight(self, name: str) -> Tensor:
        """A layer's weight as float32 [N, K]; of an embedding its rows. Raises InputError when it is not finite."""
        return finite(self.stored[name].float(), name)

    # Errors of weights and outputs: a walk ---------------------------------------------------------------------------

    def walk(self, ids: Tensor | None, kinds: Sequence[str]) -> None:
        """Score the layers that have no score yet, block by block."""
        anatomy, done = self.loaded.anatomy, {layer for layer, _ in self.done(kinds[0])}
        self.left = [part for part in anatomy.linears if part.name not in done]
        self.walked = kinds
        self.emit("stage_started", {"stage": "measuring sensitivity", "total": len(anatomy.linears)})
        if ids is None or ACTIVATION not in kinds:
            for block in range(anatomy.blocks):
                self.block(block, {})
            return
        requests = {part.name: {"second_moment"} for part in self.left}
        # Nothing is changed on the way, so the plain forward's outputs can be handed on: one pass instead of two.
        walk(self.loaded.model, anatomy, ids, requests, self.block, sequential=False, should_stop=self.should_stop)

    def block(self, block: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Score one block's layers and keep them."""
        for part in (part for part in self.left if part.block == block):
            self.check()
            self.layer(part.name, stats.get(part.name, {}))
            self.emit("progress", {"done": len({layer for layer, _ in self.done(self.walked[0])}), "total": len(self.loaded.anatomy.linears)})
        self.report.save(self.unfinished)

    def check(self) -> None:
        if self.should_stop():
            raise Cancelled(remedy="Finished blocks are kept; start it again to go on.")

    def layer(self, name: str, stats: Mapping[str, Tensor]) -> None:
        """All options of one layer. A layer that no input reached has no activation score."""
        weight_NK, moment_K = self.weight(name), stats.get("second_moment")
        weights_K = {DATA_FREE: torch.ones(weight_NK.shape[1])} | ({ACTIVATION: moment_K.float()} if moment_K is not None else {})
        for option in self.report.options:
            for kind, score in weighted_errors(weight_NK, made_of(weight_NK, option.scheme), weights_K).items():
                if kind in self.walked:
                    self.keep(name, option.id, kind, score)

    # The divergence to second order: one backward --------------------------------------------------------------------

    def backward(self, ids: Tensor, kinds: Sequence[str]) -> None:
        """All quick kinds from one forward and backward; cheap enough to begin anew after a stop."""
        self.report.scores = [score for score in self.report.scores if score.kind not in kinds]
        model, anatomy = self.loaded.model, self.loaded.anatomy
        ids = ids.to(next(model.parameters()).device)
        pass_ = _Backward(self, ids, kinds)
        modules = {part.name: surgery.get(model, part.name) for part in anatomy.linears}
        modules |= {f"{anatomy.block_prefix}.{index}": block for index, block in enumerate(surgery.get(model, anatomy.block_prefix).children())}
        embedding = surgery.get(model, anatomy.embedding.name)
        modules[anatomy.embedding.name] = embedding
        if anatomy.head is not None:
            modules[anatomy.head.name] = surgery.get(model, anatomy.head.name)
        elif head := fisher.tied_head(model, embedding):
            modules[pass_.tie(head[0])] = head[1]
        self.emit("stage_started", {"stage": "measuring sensitivity", "total": len(anatomy.linears)})
        fisher.listen(model, ids, modules, pass_.hear, embedding, should_stop=self.should_stop)
        pass_.finish()
        self.stand = pass_.stand

    def spent(self, ids: Tensor) -> None:
        """What a budget spends by: the divergences to second order, but of doubtful layers what they do among changed ones."""
        doubtful = context.doubtful(self.stand, len(ids), fisher.windows(ids.shape))
        known = [score for score in self.report.scores if score.kind == FISHER and score.layer not in doubtful]
        self.report.scores = [score for score in self.report.scores if score.kind != LOSS] + [score.model_copy(update={"kind": LOSS}) for score in known]
        if doubtful:
            self.emit("stage_started", {"stage": "measuring layers that scores do not tell", "total": len(doubtful)})
            for layer, option, harm in context.harms(self.loaded, self.report, ids, doubtful, self.made):
                self.check()
                self.keep(layer, option, LOSS, harm)

    def made(self, name: str, option: Option) -> Tensor:
        """A layer's matrix under an option; `dense` is itself."""
        return self.weight(name) if option.scheme.is_dense else made_of(self.weight(name), option.scheme)

    # The divergence itself: one layer at a time ----------------------------------------------------------------------

    def alone(self, ids: Tensor) -> None:
        """Only this layer changed; whole blocks left out, and the embedding at its widths, as well."""
        prefixes = truth.Prefixes(self.loaded.model, self.loaded.anatomy, ids)
        jobs = self.jobs(KL)
        anatomy, done = self.loaded.anatomy, self.done(KL)
        drops = [block for block in range(anatomy.blocks) if (f"{anatomy.block_prefix}.{block}", DROP) not in done]
        total = len(anatomy.linears) * len(self.report.options)
        count = total - len(jobs)
        self.emit("stage_started", {"stage": "measuring each layer alone", "total": total})
        with prefixes.open():
            prefixes.take()
            prefixes.refer()
            for block in range(anatomy.blocks):
                if block in drops:
                    self.keep(f"{anatomy.block_prefix}.{block}", DROP, KL, prefixes.kl_without_block(block))
                for part, option in (job for job in jobs if job[0].block == block):
                    self.check()
                    with truth.changed(surgery.get(self.loaded.model, part.name), made_of(self.weight(part.name), option.scheme)):
                        self.keep(part.name, option.id, KL, prefixes.kl_from(block))
                    count += 1
                    self.emit("progress", {"done": count, "total": total})
                self.cache_alone(prefixes, block)
                self.report.save(self.unfinished)
            self.ends_alone(prefixes)

    def jobs(self, kind: str) -> list[tuple[Part, Option]]:
        """Layers and options without a score of this kind."""
        done = self.done(kind)
        return [(part, option) for part in self.loaded.anatomy.linears for option in self.report.options if (part.name, option.id) not in done]

    def cache_alone(self, prefixes: truth.Prefixes, block: int) -> None:
        """Keys and values of one block as a cache of few bits holds them."""
        parts = {part.role: part.name for part in self.loaded.anatomy.of_block(block) if part.role in CACHE_AXES}
        if len(parts) < len(CACHE_AXES):
            return
        done = self.done(KL)
        for bits in (bits for bits in CACHE_BITS if (cache_layer(block), f"{bits}-bit") not in done):
            self.check()
            with cached_outputs({role: surgery.get(self.loaded.model, name) for role, name in parts.items()}, bits):
                self.keep(cache_layer(block), f"{bits}-bit", KL, prefixes.kl_from(block))

    def ends_alone(self, prefixes: truth.Prefixes) -> None:
        """Embedding (with the head tied to it) and a head of its own."""
        anatomy = self.loaded.anatomy
        for name in (part.name for part in (anatomy.embedding, anatomy.head) if part):
            for bits in EMBEDDING_BITS:
                self.check()
                with truth.changed(surgery.get(self.loaded.model, name), made_of(self.weight(name), rows_scheme(bits))):
                    self.keep(name, f"{bits}-bit", KL, prefixes.kl_plain())

    def without(self, ids: Tensor) -> None:
        """Everything changed but this layer: how much less harm than with everything changed. An option at a time."""
        prefixes = truth.Prefixes(self.loaded.model, self.loaded.anatomy, ids)
        jobs, total = self.jobs(KL_WITHOUT), len(self.loaded.anatomy.linears) * len(self.report.options)
        self.emit("stage_started", {"stage": "measuring all layers but one", "total": total})
        with prefixes.open():
            prefixes.take()
            prefixes.refer()
            for option in self.report.options:
                mine = [part for part, wanted in jobs if wanted == option]
                if mine:
                    self.without_each(prefixes, option, mine, total)

    def without_each(self, prefixes: truth.Prefixes, option: Option, parts: Sequence[Part], total: int) -> None:
        model = self.loaded.model
        layers = {part.name: surgery.get(model, part.name) for part in self.loaded.anatomy.linears}
        with truth.all_changed({module: made_of(self.weight(name), option.scheme) for name, module in layers.items()}):
            prefixes.take()
            whole = prefixes.kl_from(len(prefixes.blocks))
            for part in parts:
                self.check()
                with truth.changed(layers[part.name], self.stored[part.name]):
                    self.keep(part.name, option.id, KL_WITHOUT, whole - prefixes.kl_from(part.block or 0))
                self.emit("progress", {"done": len(self.done(KL_WITHOUT)), "total": total})
                self.report.save(self.unfinished)


class _Backward:
    """Turns inputs and gradients of every module into scores, as they are heard."""

    def __init__(self, scoring: _Scoring, ids: Tensor, kinds: Sequence[str]) -> None:
        self.scoring, self.ids, self.kinds = scoring, ids, kinds
        anatomy = scoring.loaded.anatomy
        self.linears = {part.name for part in anatomy.linears}
        self.ends = {part.name: part.name for part in (anatomy.embedding, anatomy.head) if part}
        self.errors = {name: self._end_errors(name) for name in self.ends}
        self.products: dict[tuple[str, str], list[Tensor]] = {}
        self.sides: dict[tuple[int, int], list[Tensor]] = {}
        self.stand: dict[str, list[float]] = {}
        self.heard = 0

    def tie(self, head: str) -> str:
        """The name under which the tied head is heard; what it adds belongs to the embedding."""
        self.ends[head] = self.scoring.loaded.anatomy.embedding.name
        return head

    def _end_errors(self, name: str) -> dict[str, Tensor]:
        weight_VD = self.scoring.weight(name)
        return {f"{bits}-bit": made_of(weight_VD, rows_scheme(bits)) - weight_VD for bits in EMBEDDING_BITS}

    def hear(self, name: str, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        """One module's turn; layers come from the last to the first."""
        if name in self.linears:
            self.linear(name, x.flatten(0, -2), gradient.flatten(0, -2))
            self.cached(name, y, gradient)
        elif name in self.ends:
            self.end(name, x, gradient)
        else:
            self.keep(name, DROP, ((x - y) * gradient).flatten(0, -2).sum(-1, dtype=torch.float32))

    def linear(self, name: str, x_MK: Tensor, gradient_MN: Tensor) -> None:
        scoring = self.scoring
        weight_NK = scoring.weight(name)
        weights_K = {DATA_FREE: torch.ones(weight_NK.shape[1]), ACTIVATION: x_MK.float().square().mean(0)}
        for option in scoring.report.options:
            made_NK = made_of(weight_NK, option.scheme)
            for kind, score in weighted_errors(weight_NK, made_NK, weights_K).items():
                if kind in self.kinds:
                    scoring.keep(name, option.id, kind, score)
            products_M = _products(x_MK, (made_NK - weight_NK).to(x_MK.dtype), gradient_MN)
            self.stand.setdefault(name, []).append(fisher.stands_on(products_M.view_as(self.ids)))
            self.keep(name, option.id, products_M)
        self.heard += 1
        scoring.emit("progress", {"done": self.heard, "total": len(self.linears)})

    def cached(self, name: str, y_SLN: Tensor, gradient_SLN: Tensor) -> None:
        """Keys or values of a block as a cache of few bits holds them; both sides are needed for a score."""
        part = self.scoring.loaded.anatomy.by_name[name]
        if part.role in CACHE_AXES and part.block is not None:
            for bits in CACHE_BITS:
                error_SLN = in_cache(y_SLN, bits, CACHE_AXES[part.role]) - y_SLN.float()
                self.sides.setdefault((part.block, bits), []).append((error_SLN * gradient_SLN).sum(-1, dtype=torch.float32))

    def end(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Rows that are looked up, or logits of a slice of positions: kept until all of both are heard."""
        for option, error_VD in self.errors[self.ends[name]].items():
            if x.is_floating_point():
                product = ((gradient.to(error_VD.dtype) @ error_VD) * x).sum(-1)
            else:
                product = (torch.nn.functional.embedding(x, error_VD) * gradient).sum(-1)
            self.products.setdefault((name, option), []).append(product.flatten())

    def keep(self, name: str, option: str, products_M: Tensor) -> None:
        self.scoring.keep(name, option, FISHER, fisher.second_order(products_M.view_as(self.ids)) / self.ids.numel())

    def finish(self) -> None:
        """The embedding and what is tied to it, position by position."""
        totals: dict[tuple[str, str], Tensor] = {}
        for (name, option), pieces in self.products.items():
            key = (self.ends[name], option)
            totals[key] = totals.get(key, torch.zeros(())) + torch.cat(pieces)
        for (name, option), products_M in totals.items():
            self.keep(name, option, products_M)
        for (block, bits), sides in self.sides.items():
            if len(sides) == len(CACHE_AXES):
                self.keep(cache_layer(block), f"{bits}-bit", sides[0] + sides[1])


def _products(x_MK: Tensor, error_NK: Tensor, gradient_MN: Tensor) -> Tensor:
    """<g, D x> of every row: float32 [M], by way of whichever side is narrower."""
    rows, columns = error_NK.shape
    if columns < rows:
        return ((gradient_MN @ error_NK) * x_MK).sum(-1, dtype=torch.float32)
    return ((x_MK @ error_NK.t()) * gradient_MN).sum(-1, dtype=torch.float32)


def _matrix(module: nn.Module) -> Tensor:
    return module.weight if isinstance(module, nn.Embedding) else surgery.linear_weight(module)


def rows_scheme(bits: int) -> Scheme:
    """What embeddings and heads become: one symmetric scale a row."""
    return Scheme(weights=WeightScheme(bits=bits, group_size=0, symmetric=True))


def made_of(weight_NK: Tensor, scheme: Scheme) -> Tensor:
    """The matrix under a scheme, by the plain method of its part: float32 [N, K]."""
    method = registry.linear(METHOD_OF["weights" if scheme.weights else "sparsity"])
    return method.apply(weight_NK, scheme, {}, method.parse({})).weight_NK


def weighted_errors(weight_NK: Tensor, made_NK: Tensor, weights_K: Mapping[str, Tensor]) -> dict[str, float]:
    """sum_ij v_j D_ij^2 / sum_ij v_j W_ij^2 for every column weighting v [K]; 0 for a matrix without weight."""
    error_K, whole_K = (weight_NK - made_NK).square_().sum(dim=0), weight_NK.square().sum(dim=0)
    totals = {kind: (float(v_K @ error_K), float(v_K @ whole_K)) for kind, v_K in weights_K.items()}
    return {kind: error / whole if whole > 0 else 0.0 for kind, (error, whole) in totals.items()}
