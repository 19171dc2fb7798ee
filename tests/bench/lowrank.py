"""Low rank and the KV cache side by side: perplexity at equal size, the search for ranks against chance, cache bytes and decode time.

Three tables, of which `--tables` names some. `weights`: a share of the block linears' parameters removed by every method. `search`: Bayesian
optimisation and random draws of the same number of evaluations, over seeds. `cache`: dense, latent, coded and forgetful caches, all
measured through the cache itself. Ratios are paired over the same windows with their 95% interval. Rows of JSON go to stdout, tables to stderr:

    python tests/bench/lowrank.py --model stories-15m --tables weights cache --removed 0.1 0.2 0.3
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from bitpress.engine.accounting import cache_bytes, removed_share
from bitpress.engine.calibration_set import CalibrationSet, calibration_set
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.kv_ranks import progressive_ranks
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.measure.perplexity import measure_pair, perplexity
from bitpress.engine.model import library, surgery
from bitpress.engine.model.load import Loaded, load
from bitpress.engine.rank_search import Space, Trial, search_ranks
from bitpress.engine.recipe import Calibration, Measure, Recipe

METHODS = ("svd", "asvd", "svd-llm", "rom")
COLUMNS = {
    "weights": ("removed", "entrant", "kept", "perplexity", "ratio", "low", "high", "kl", "seconds"),
    "search": ("removed", "kind", "seed", "bo", "random", "first", "seconds"),
    "cache": ("entrant", "bytes_per_token", "share", "ratio", "low", "high", "kl", "step_ms", "context"),
}


def recipe(model: str, **fields: Any) -> Recipe:
    """A recipe for one row."""
    return Recipe.from_dict({"model": model, **fields})


def quality(loaded: Loaded, made: Any, ids_NT: torch.Tensor) -> dict[str, Any]:
    """Perplexity, its ratio to the dense model's with interval, and mean divergence."""
    found = measure_pair(loaded.model, made, ids_NT, early_stop=False)
    ratio = found.ratio()
    spread = {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high} if ratio else {}
    return {"perplexity": perplexity(found.nll), "dense": perplexity(found.nll_dense), "kl": found.kl()[0], "windows": found.windows, **spread}


# Weights ---------------------------------------------------------------------------------------------------------


def uniform(loaded: Loaded, keep: float) -> list[dict[str, Any]]:
    """Bolaco's lines with one ratio for every role but v, at this share of all parameters."""
    space = Space(loaded.anatomy, 1)
    return space.lines(space.scaled(dict.fromkeys(space.parts, keep), keep))


def weight_rows(loaded: Loaded, ids_NT: torch.Tensor, tokens: CalibrationSet, text_SL: torch.Tensor, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every method at every share."""
    for removed in asked.removed:
        keep = 1 - removed
        entrants = [(name, name, [{"match": "*", "rank": {"keep": keep}}]) for name in METHODS]
        entrants += [("bolaco, uniform", "bolaco", uniform(loaded, keep))]
        for kind in asked.kinds:
            _, lines = search_ranks(loaded, tokens.ids_SL, text_SL, keep, kind, asked.evaluations)
            entrants.append((f"bolaco, {kind}", "bolaco", lines))
        for entrant, method, lines in entrants:
            plan, began = recipe(asked.model, schemes=lines, stages=[{"method": method}]), time.perf_counter()
            made = compress(loaded, plan, calibration=tokens).model
            seconds = time.perf_counter() - began
            kept = 1 - removed_share(plan, loaded.anatomy)
            yield {"removed": removed, "entrant": entrant, "kept": kept, "seconds": seconds, **quality(loaded, made, ids_NT)}


def search_rows(loaded: Loaded, tokens: CalibrationSet, text_SL: torch.Tensor, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The best objective of optimisation and of chance after the same number of evaluations."""

    def best(trials: list[Trial]) -> float:
        return min(trial.objective for trial in trials)

    for removed in asked.removed:
        for kind in asked.kinds:
            for seed in asked.seeds:
                began = time.perf_counter()
                wise, _ = search_ranks(loaded, tokens.ids_SL, text_SL, 1 - removed, kind, asked.evaluations, seed)
                seconds = time.perf_counter() - began
                chance, _ = search_ranks(loaded, tokens.ids_SL, text_SL, 1 - removed, kind, asked.evaluations, seed, random=True)
                row = {"removed": removed, "kind": kind, "seed": seed, "bo": best(wise), "random": best(chance)}
                yield {**row, "first": wise[0].objective, "seconds": seconds}


# Cache -----------------------------------------------------------------------------------------------------------


def conditions(loaded: Loaded) -> list[float]:
    """cond(W_k) * cond(W_v) of every block."""
    found = [1.0] * loaded.anatomy.blocks
    for part in loaded.anatomy.linears:
        if part.role in ("k", "v") and part.block is not None:
            values = torch.linalg.svdvals(surgery.linear_weight(surgery.get(loaded.model, part.name)).float())
            found[part.block] *= float(values[0] / values[-1].clamp_min(1e-6 * float(values[0])))
    return found


def coded(bits: int, window: int) -> dict[str, Any]:
    """KIVI at one width."""
    return {"keys": {"bits": bits, "axis": "channel"}, "values": {"bits": bits, "axis": "token"}, "residual_window": window}


def caches(loaded: Loaded, keep: float, window: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(entrant, low-rank method, cache)."""
    width = loaded.anatomy.kv_heads * loaded.anatomy.head_dim
    ranks = list(progressive_ranks(conditions(loaded), width, keep))
    return [
        ("latent, SVD, uniform", "lorc", {"rank": {"keep": keep}}),
        ("latent, SVD, progressive (LoRC)", "lorc", {"rank": {"ranks": ranks}}),
        ("latent, SVD, each head", "lorc", {"rank": {"keep": keep, "heads": "each"}}),
        ("latent, whitened, uniform", "svd-llm", {"rank": {"keep": keep}}),
        ("latent, whitened, progressive", "svd-llm", {"rank": {"ranks": ranks}}),
        ("latent, whitened, values only", "svd-llm", {"rank": {"keep": max(0.1, 2 * keep - 1), "sides": "values"}}),
        ("KIVI 8 bit", "", coded(8, 32)),
        ("KIVI 4 bit", "", coded(4, 32)),
        ("KIVI 2 bit", "", coded(2, 32)),
        ("tokens for both, 2 bit", "", {**coded(2, 32), "keys": {"bits": 2, "axis": "token"}}),
        ("whitened latent and KIVI 4 bit", "svd-llm", {"rank": {"keep": keep}, **coded(4, 32)}),
        ("sinks and window", "", {"window": {"recent": max(1, int(keep * window) - 4)}}),
    ]


def cache_rows(loaded: Loaded, ids_NT: torch.Tensor, tokens: CalibrationSet, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every cache at about one share of the dense one's bytes where it has a choice."""
    length = ids_NT.shape[1]
    dense = cache_bytes(None, loaded.anatomy, length)
    for context in asked.context:
        yield {"entrant": "dense", "bytes_per_token": dense / length, "share": 1.0, "step_ms": step_ms(loaded, loaded.model, context), "context": context}
    for entrant, method, cache in caches(loaded, asked.cache_keep, length):
        plan = recipe(asked.model, kv_cache=cache, stages=[{"method": method}] if method else [])
        made = compress(loaded, plan, calibration=tokens).model
        size = cache_bytes(plan, loaded.anatomy, length)
        row = {"entrant": entrant, "bytes_per_token": size / length, "share": size / dense, **quality(loaded, made, ids_NT)}
        yield {**row, **({} if asked.context else {"context": length})}
        for context in asked.context:
            yield {"entrant": entrant, "step_ms": step_ms(loaded, made, context), "context": context}


def step_ms(loaded: Loaded, model: Any, context: int, steps: int = 12) -> float:
    """Median milliseconds of a decode step behind `context` tokens."""
    decoder = Decoder(model, None, context + steps + 1)
    ids_T = torch.arange(context) * 7919 % loaded.anatomy.vocab
    for piece in ids_T.split(512):
        decoder.extend(piece)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        decoder.step(5)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[2:])


def table(kind: str, rows: list[dict[str, Any]]) -> str:
    """Rows as text."""
    shown = [[_short(row.get(name, "")) for name in COLUMNS[kind]] for row in rows]
    widths = [max(len(line[index]) for line in [list(COLUMNS[kind]), *shown]) for index in range(len(COLUMNS[kind]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [list(COLUMNS[kind]), *shown])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories-15m")
    parser.add_argument("--tables", nargs="+", choices=list(COLUMNS), default=["weights", "cache"])
    parser.add_argument("--removed", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--kinds", nargs="*", choices=["5x1", "5x4"], default=["5x1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--windows", type=int, default=1 << 20)
    parser.add_argument("--cache-keep", type=float, default=0.6)
    parser.add_argument("--context", nargs="*", type=int, default=[])
    return parser.parse_args()


def main() -> None:
    """Print the tables that are asked for."""
    asked = arguments()
    loaded, entry = load(asked.model), library.find(asked.model)
    ids_NT = windows_for(loaded, entry, Measure(tier=asked.tier)).ids_NT[: asked.windows]
    drawn = calibration_set(loaded, Calibration(sequences=asked.sequences + 16, length=asked.length))
    tokens, text_SL = CalibrationSet(drawn.text, drawn.seed, drawn.sha256, drawn.ids_SL[:-16]), drawn.ids_SL[-16:, :256]
    makers = {
        "weights": lambda: weight_rows(loaded, ids_NT, tokens, text_SL, asked),
        "search": lambda: search_rows(loaded, tokens, text_SL, asked),
        "cache": lambda: cache_rows(loaded, ids_NT, tokens, asked),
    }
    for kind in asked.tables:
        rows = []
        for row in makers[kind]():
            rows.append(row)
            print(json.dumps({"table": kind, "model": asked.model, **row}), flush=True)
        print(f"\n{asked.model}, {len(ids_NT)} windows of {ids_NT.shape[1]}\n{table(kind, rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
