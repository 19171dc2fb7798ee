"""Low rank and the KV cache side by side: perplexity at equal size, the search for ranks against chance, cache bytes and decode time.

Five tables, of which `--tables` names some. `weights`: a share of the block linears' parameters removed by every method. `search`: Bayesian
optimisation and random draws of the same number of evaluations, over seeds. `cache`: dense, latent, coded and forgetful caches, all
measured through the cache itself. `steps`: milliseconds of a decode step behind a long context, all caches in turn. `sharing`: codebooks
and products beside a rounded matrix next to plain rounding at about the same bits, blocks that share next to blocks that go. Ratios are
paired over the same windows with their 95% interval. Rows of JSON go to stdout, tables to stderr:

    python tests/bench/lowrank.py --model stories-15m --tables weights cache --removed 0.1 0.2 0.3
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bitpress.engine.accounting import cache_bytes, removed_share, side_bytes, size_of
from bitpress.engine.cache_bench import step_times
from bitpress.engine.calibration_set import CalibrationSet, calibration_set
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.kv_ranks import progressive_ranks, spread_ranks
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.measure.perplexity import measure_pair, perplexity
from bitpress.engine.mixing import value_losses
from bitpress.engine.model import library, surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import Loaded, load
from bitpress.engine.rank_search import HELD_OUT, OBJECTIVE_LENGTH, SPANS, Objective, Space, Trial, objective_on, search, search_ranks
from bitpress.engine.recipe import CacheSide, Calibration, KVCache, Measure, Recipe

METHODS = ("svd", "asvd", "svd-llm", "rom")
COLUMNS = {
    "weights": ("removed", "entrant", "kept", "perplexity", "ratio", "low", "high", "kl", "seconds"),
    "search": ("removed", "kind", "seed", "bo", "random", "first", "even", "seconds", "cpu_s", "setup_cpu_s"),
    "cache": ("entrant", "bytes_per_token", "share", "ratio", "low", "high", "kl"),
    "sharing": ("entrant", "bits_linears", "kept", "perplexity", "ratio", "low", "high", "kl", "seconds"),
    "steps": ("entrant", "context", "cache_bytes", "share", "step_ms", "p10_ms", "tokens_per_s", "faster"),
}
LATENT = ("latent, SVD, progressive (LoRC)", "latent, SVD, each head", "latent, whitened, values only", "whitened latent and KIVI 4 bit")
MIXED, MIXED_8 = "KIVI 4 bit keys, latent values", "KIVI 4 bit keys, latent values at 8 bit"
SPEED = (*LATENT, MIXED, MIXED_8, "KIVI 4 bit", "KIVI 2 bit")


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
        whole = uniform(loaded, keep)  # values whole, biases
        entrants = [(name, name, [{"match": "*", "rank": {"keep": keep}}]) for name in METHODS]
        entrants += [("bolaco, uniform", "bolaco", whole), ("bolaco, values too", "bolaco", [{"match": "*", "rank": {"keep": keep, "bias": True}}])]
        entrants += [("svd-llm, values whole", "svd-llm", [{**line, "rank": {"rank": line["rank"]["rank"]}} for line in whole])]
        entrants += [(f"bolaco, {kind}", "bolaco", []) for kind in asked.kinds]
        for entrant, method, lines in entrants:
            if asked.entrants and entrant not in asked.entrants:
                continue
            if not lines:
                lines = best_lines(loaded, tokens, text_SL, removed, entrant.split()[-1], asked)
            plan, began = recipe(asked.model, schemes=lines, stages=[{"method": method}]), time.perf_counter()
            made = compress(loaded, plan, calibration=tokens).model
            seconds = time.perf_counter() - began
            kept = 1 - removed_share(plan, loaded.anatomy)
            yield {"removed": removed, "entrant": entrant, "kept": kept, "seconds": seconds, **quality(loaded, made, ids_NT)}


def best_lines(loaded: Loaded, tokens: CalibrationSet, text_SL: torch.Tensor, removed: float, kind: Any, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The best allocation among the trials that `--trials` names, or of a search of its own where that has none."""
    rows = [json.loads(row) for row in asked.trials.read_text().splitlines()] if asked.trials else []
    known = [row for row in rows if row["table"] == "trial" and not row["random"] and (row["removed"], row["kind"]) == (removed, kind)]
    if known:
        return Space(loaded.anatomy, SPANS[kind]).lines(min(known, key=lambda row: row["objective"])["ratios"])
    return search_ranks(loaded, tokens.ids_SL, text_SL, 1 - removed, kind, asked.evaluations)[1]


def search_rows(loaded: Loaded, tokens: CalibrationSet, text_SL: torch.Tensor, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The best objective of optimisation and of chance after the same number of evaluations; every trial is told as it comes, with its CPU time.

    The directions are taken once and serve all searches: the time of a search alone is `setup_cpu_s` and its own `cpu_s`.
    """
    for kind in asked.kinds:
        began = time.process_time()
        with objective_on(loaded, Space(loaded.anatomy, SPANS[kind]), tokens.ids_SL, text_SL) as objective:
            spent = {"setup_cpu_s": time.process_time() - began}
            for removed, seed in product(asked.removed, asked.seeds):
                row = {"removed": removed, "kind": kind, "seed": seed}
                yield {**row, **searched(objective, row, asked), **spent}


def searched(objective: Objective, row: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """One seed of both searches; without `--chance` of optimisation only."""

    def tried(random: bool) -> list[Trial]:
        def tell(trial: Trial) -> None:
            spent = {"cpu_s": time.process_time() - began, "random": random}
            print(json.dumps({"table": "trial", **row, **spent, "objective": trial.objective, "read": trial.read, "ratios": trial.ratios}), flush=True)

        began = time.process_time()
        return search(objective, 1 - row["removed"], asked.evaluations, row["seed"], random, tell)

    def best(trials: list[Trial]) -> float:
        return min(trial.objective for trial in trials)

    began, spent = time.perf_counter(), time.process_time()
    wise = tried(random=False)
    times = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - spent}
    chance = {"random": best(tried(random=True))} if asked.chance else {}
    return {"bo": best(wise), **chance, "first": wise[0].objective, "even": wise[1].objective, **times}


# Sharing ---------------------------------------------------------------------------------------------------------


def shared(anatomy: Anatomy) -> list[tuple[str, dict[str, Any]]]:
    """(entrant, fields of a recipe): what shares next to what does not."""

    def rounded(method: str, weights: dict[str, Any], **rank: Any) -> dict[str, Any]:
        return {"schemes": [{"match": "*", "weights": weights, **({"rank": {**rank, "beside": True}} if rank else {})}], "stages": [{"method": method}]}

    def together(pairs: int, rank: int) -> dict[str, Any]:
        return {"structure": {"share_rank": rank or None}, "stages": [{"method": "block-sharing", "options": {"pairs": pairs}}]}

    pairs, middle, rows = max(1, anatomy.blocks // 10), anatomy.blocks // 2, {"bits": 8, "group_size": 0, "symmetric": True}
    return [
        *((f"rtn 4 bit, {name}", rounded("rtn", {"bits": 4, "group_size": size})) for name, size in (("group 64", 64), ("row", 0))),
        ("nf4, row", rounded("nf4", {"bits": 4, "group_size": 0, "format": "nf4"})),
        *((f"codebook, {name}", rounded("codebook", {"bits": 4, "group_size": size, "format": "codebook"})) for name, size in (("group 64", 64), ("row", 0))),
        *((f"rtn 3 bit, group {size}", rounded("rtn", {"bits": 3, "group_size": size})) for size in (64, 32, 16)),
        (
            "lqer 3 bit, group 64, rank 16 at 8 bit",
            rounded("lqer", {"bits": 3, "group_size": 64}, rank=16, factors=rows),
        ),
        *((f"{pairs} pairs of blocks share, rank {rank}", together(pairs, rank)) for rank in (0, 32)),
        (f"{pairs} blocks of the middle go", {"structure": {"drop_blocks": list(range(middle, middle + pairs))}}),
    ]


def sharing_rows(loaded: Loaded, ids_NT: torch.Tensor, tokens: CalibrationSet, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every entrant, with the bits that a weight of the block linears takes, and the share of their parameters that is held."""
    for entrant, fields in shared(loaded.anatomy):
        if asked.entrants and entrant not in asked.entrants:
            continue
        began = time.perf_counter()
        made = compress(loaded, recipe(asked.model, **fields), calibration=tokens)
        size, seconds = size_of(made.recipe, loaded.anatomy), time.perf_counter() - began
        bits = 8 * size.linear_bytes / loaded.anatomy.linear_params
        yield {"entrant": entrant, "bits_linears": bits, "kept": size.linear_params / loaded.anatomy.linear_params, "seconds": seconds,
               **quality(loaded, made.model, ids_NT)}  # fmt: skip


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


def mixed_caches(loaded: Loaded, keep: float, window: int, lost: list[list[float]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Coded keys beside latent values by what attention mixes, together at most `keep` of the dense cache; and the values in codes of 8 bits too."""
    heads, keys = loaded.anatomy.kv_heads, {**coded(4, 32), "values": None}

    def values(share: float) -> dict[str, Any]:
        return {"rank": {"ranks": list(spread_ranks(lost, share, heads)), "heads": "each", "sides": "values"}}

    left = 2 * keep - side_bytes(CacheSide(**coded(4, 32)["keys"]), KVCache(residual_window=32), 1, window) / (2 * window)
    return [
        (MIXED, "mixed-values", {**keys, **values(min(1.0, left))}),
        (MIXED_8, "mixed-values", {**keys, "values": {"bits": 8, "axis": "token"}, **values(0.94)}),
    ]


def cache_rows(loaded: Loaded, ids_NT: torch.Tensor, tokens: CalibrationSet, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every cache at about one share of the dense one's bytes where it has a choice."""
    length = ids_NT.shape[1]
    dense = cache_bytes(None, loaded.anatomy, length)
    mixed = mixed_caches(loaded, asked.cache_keep, length, value_losses(loaded, tokens.ids_SL[:32]))
    for entrant, method, cache in [*caches(loaded, asked.cache_keep, length), *mixed]:
        if asked.entrants and entrant not in asked.entrants:
            continue
        plan = recipe(asked.model, kv_cache=cache, stages=[{"method": method}] if method else [])
        made = compress(loaded, plan, calibration=tokens).model
        size = cache_bytes(plan, loaded.anatomy, length)
        yield {"entrant": entrant, "bytes_per_token": size / length, "share": size / dense, **quality(loaded, made, ids_NT)}


def step_rows(loaded: Loaded, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step behind many tokens; rounds in which every cache takes one step, so that the machine's moods are shared out.

    Factors are those of plain SVD throughout: what a step costs depends on their shapes only.
    """
    for context in asked.context:
        room = min(context, loaded.anatomy.context - asked.steps - 1) if loaded.anatomy.context else context
        decoders = {"dense": Decoder(loaded.model, None, room + asked.steps + 1)}
        alike = [[(1 - number / loaded.anatomy.head_dim) ** 2 for number in range(loaded.anatomy.head_dim + 1)]] * loaded.anatomy.blocks
        for entrant, _, cache in [*caches(loaded, asked.cache_keep, room), *mixed_caches(loaded, asked.cache_keep, room, alike)]:
            if entrant in (asked.entrants or SPEED):
                plan = recipe(asked.model, kv_cache=cache, stages=[{"method": "lorc"}] if "rank" in cache else [])
                decoders[entrant] = Decoder(compress(loaded, plan).model, None, room + asked.steps + 1)
        times = step_times(decoders, room, asked.steps)
        sizes = {entrant: decoder.cache_bytes for entrant, decoder in decoders.items()}
        for entrant, taken in times.items():
            p10, median = sorted(taken)[len(taken) // 10], statistics.median(taken)
            ratio = statistics.median(one / other for one, other in zip(times["dense"], taken, strict=True))
            row = {"entrant": entrant, "context": room, "cache_bytes": sizes[entrant], "share": sizes[entrant] / sizes["dense"]}
            yield {**row, "step_ms": median, "p10_ms": p10, "tokens_per_s": 1000 / median, "faster": ratio}


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
    parser.add_argument("--entrants", nargs="*", default=[], help="by name; all without it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--objective", type=int, default=HELD_OUT, help="sequences that allocations are judged on, 16 at most")
    parser.add_argument("--no-chance", dest="chance", action="store_false", help="leave random search away")
    parser.add_argument("--trials", type=Path, help="rows of `--tables search`, whose best ranks are used in `weights`")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--windows", type=int, default=1 << 20)
    parser.add_argument("--cache-keep", type=float, default=0.6)
    parser.add_argument("--context", nargs="*", type=int, default=[8192])
    parser.add_argument("--steps", type=int, default=24)
    return parser.parse_args()


def main() -> None:
    """Print the tables that are asked for."""
    asked = arguments()
    loaded, entry = load(asked.model), library.find(asked.model)
    if asked.tables == ["steps"]:  # looks at no text
        show(asked, "steps", step_rows(loaded, asked), "noise in the cache")
        return
    ids_NT = windows_for(loaded, entry, Measure(tier=asked.tier)).ids_NT[: asked.windows]
    drawn = calibration_set(loaded, Calibration(sequences=asked.sequences + HELD_OUT, length=asked.length))
    tokens = CalibrationSet(drawn.text, drawn.seed, drawn.sha256, drawn.ids_SL[:-HELD_OUT])
    text_SL = drawn.ids_SL[-asked.objective :, :OBJECTIVE_LENGTH]
    makers = {
        "weights": lambda: weight_rows(loaded, ids_NT, tokens, text_SL, asked),
        "search": lambda: search_rows(loaded, tokens, text_SL, asked),
        "cache": lambda: cache_rows(loaded, ids_NT, tokens, asked),
        "sharing": lambda: sharing_rows(loaded, ids_NT, tokens, asked),
        "steps": lambda: step_rows(loaded, asked),
    }
    for kind in asked.tables:
        show(asked, kind, makers[kind](), f"{len(ids_NT)} windows of {ids_NT.shape[1]}")


def show(asked: argparse.Namespace, kind: str, made: Iterator[dict[str, Any]], protocol: str) -> None:
    """Print each row as it comes, then all as a table."""
    rows = []
    for row in made:
        rows.append(row)
        print(json.dumps({"table": kind, "model": asked.model, **row}), flush=True)
    print(f"\n{asked.model}, {protocol}\n{table(kind, rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
