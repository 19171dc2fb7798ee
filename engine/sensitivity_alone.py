"""The divergence itself, one layer at a time: only this one changed (`kl`), or everything but it (`kl_without`). Goes on from the scores it finds."""

from collections.abc import Sequence

from torch import Tensor

from bitpress.engine import sensitivity_truth as truth
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Part
from bitpress.engine.sensitivity_cache import CACHE_AXES, cached_outputs
from bitpress.engine.sensitivity_file import CACHE_BITS, DROP, EMBEDDING_BITS, KL, KL_WITHOUT, Option, cache_layer
from bitpress.engine.sensitivity_options import made_of, rows_scheme
from bitpress.engine.sensitivity_scoring import Scoring


def score_alone(scoring: Scoring, ids_SL: Tensor) -> None:
    """Only this layer changed; whole blocks left out, and the embedding at its widths, as well."""
    prefixes = truth.Prefixes(scoring.loaded.model, scoring.loaded.anatomy, ids_SL)
    jobs = _jobs(scoring, KL)
    anatomy, done = scoring.loaded.anatomy, scoring.done(KL)
    drops = [block for block in range(anatomy.blocks) if (f"{anatomy.block_prefix}.{block}", DROP) not in done]
    total = len(anatomy.linears) * len(scoring.report.options)
    count = total - len(jobs)
    scoring.emit("stage_started", {"stage": "measuring each layer alone", "total": total})
    with prefixes.open():
        prefixes.take()
        prefixes.refer()
        for block in range(anatomy.blocks):
            if block in drops:
                scoring.keep(f"{anatomy.block_prefix}.{block}", DROP, KL, prefixes.kl_without_block(block))
            for part, option in (job for job in jobs if job[0].block == block):
                scoring.check()
                with truth.changed(surgery.get(scoring.loaded.model, part.name), made_of(scoring.weight(part.name), option.scheme)):
                    scoring.keep(part.name, option.id, KL, prefixes.kl_from(block))
                count += 1
                scoring.emit("progress", {"done": count, "total": total})
            _cache_alone(scoring, prefixes, block)
            scoring.save()
        _ends_alone(scoring, prefixes)


def _cache_alone(scoring: Scoring, prefixes: truth.Prefixes, block: int) -> None:
    """Keys and values of one block as a cache of few bits holds them."""
    parts = {part.role: part.name for part in scoring.loaded.anatomy.of_block(block) if part.role in CACHE_AXES}
    if len(parts) < len(CACHE_AXES):
        return
    done = scoring.done(KL)
    for bits in (bits for bits in CACHE_BITS if (cache_layer(block), f"{bits}-bit") not in done):
        scoring.check()
        with cached_outputs({role: surgery.get(scoring.loaded.model, name) for role, name in parts.items()}, bits):
            scoring.keep(cache_layer(block), f"{bits}-bit", KL, prefixes.kl_from(block))


def _ends_alone(scoring: Scoring, prefixes: truth.Prefixes) -> None:
    """Embedding (with the head tied to it) and a head of its own."""
    anatomy = scoring.loaded.anatomy
    for name in (part.name for part in (anatomy.embedding, anatomy.head) if part):
        for bits in EMBEDDING_BITS:
            scoring.check()
            with truth.changed(surgery.get(scoring.loaded.model, name), made_of(scoring.weight(name), rows_scheme(bits))):
                scoring.keep(name, f"{bits}-bit", KL, prefixes.kl_plain())


def score_without(scoring: Scoring, ids_SL: Tensor) -> None:
    """Everything changed but this layer: how much less harm than with everything changed. An option at a time."""
    prefixes = truth.Prefixes(scoring.loaded.model, scoring.loaded.anatomy, ids_SL)
    jobs, total = _jobs(scoring, KL_WITHOUT), len(scoring.loaded.anatomy.linears) * len(scoring.report.options)
    scoring.emit("stage_started", {"stage": "measuring all layers but one", "total": total})
    with prefixes.open():
        prefixes.take()
        prefixes.refer()
        for option in scoring.report.options:
            mine = [part for part, wanted in jobs if wanted == option]
            if mine:
                _without_each(scoring, prefixes, option, mine, total)


def _without_each(scoring: Scoring, prefixes: truth.Prefixes, option: Option, parts: Sequence[Part], total: int) -> None:
    model = scoring.loaded.model
    layers = {part.name: surgery.get(model, part.name) for part in scoring.loaded.anatomy.linears}
    with truth.all_changed({module: made_of(scoring.weight(name), option.scheme) for name, module in layers.items()}):
        prefixes.take()
        whole = prefixes.kl_from(len(prefixes.blocks))
        for part in parts:
            scoring.check()
            with truth.changed(layers[part.name], scoring.stored[part.name]):
                scoring.keep(part.name, option.id, KL_WITHOUT, whole - prefixes.kl_from(part.block or 0))
            scoring.emit("progress", {"done": len(scoring.done(KL_WITHOUT)), "total": total})
            scoring.save()


def _jobs(scoring: Scoring, kind: str) -> list[tuple[Part, Option]]:
    """Layers and options without a score of this kind."""
    done = scoring.done(kind)
    return [(part, option) for part in scoring.loaded.anatomy.linears for option in scoring.report.options if (part.name, option.id) not in done]
