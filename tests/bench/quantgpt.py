"""Training of the rounded weights side by side: QuantGPT, plain distillation, LSQ, PACT, and rounding to nearest, at the same budget.

Every trained method has the same steps, text, rates and start (steps of least squared error); block linears and embedding have the same
bits, one scale a row. A row of JSON a run goes to stdout, a table to stderr:

    python tests/bench/quantgpt.py --model tiny-stories --bits 2 4 8 --seeds 0 1 2
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from bitpress.engine.accounting import size_of
from bitpress.engine.compress import compress
from bitpress.engine.measure.interval import t_interval
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.measure.perplexity import measure_pair, perplexity
from bitpress.engine.model import library
from bitpress.engine.model.load import Loaded, load
from bitpress.engine.recipe import Measure, Recipe
from bitpress.engine.similarity import similarity

ENTRANTS: dict[str, dict[str, Any] | None] = {  # label -> options of quantgpt; None is rounding to nearest
    "RTN": None,
    "PACT": {"quantiser": "pact", "contrast": 0.0},
    "LSQ": {"quantiser": "lsq", "contrast": 0.0},
    "KD only": {"contrast": 0.0},
    "QuantGPT": {},
}


def recipe_of(label: str, bits: int, seed: int, asked: argparse.Namespace) -> Recipe:
    """Block linears and embedding at one width."""
    options = ENTRANTS[label]
    stage = {"method": "rtn"} if options is None else {"method": "quantgpt", "options": {**options, "steps": asked.steps, "sequences": asked.batch}}
    return Recipe.from_dict(
        {
            "model": asked.model, "seed": seed, "stages": [stage], "embedding": {"bits": bits},
            "schemes": [{"match": "*", "weights": {"bits": bits, "group_size": 0, "symmetric": True}}],
            "calibration": {"sequences": asked.sequences, "length": asked.length},
        }
    )  # fmt: skip


def run(loaded: Loaded, label: str, bits: int, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One compression, measured; `log_ratios` are of the windows, `alike` the mean cosine of two tokens' embeddings."""
    plan = recipe_of(label, bits, seed, asked)
    begun = time.perf_counter()
    made = compress(loaded, plan)
    seconds = time.perf_counter() - begun
    windows = windows_for(loaded, library.find(loaded.model_id), Measure(tier=asked.tier)).ids_NT[: asked.windows]
    quality = measure_pair(loaded.model, made.model, windows, early_stop=False)
    found = similarity(loaded.model, made.model, windows[:1])
    return {
        "label": label, "bits": bits, "seed": seed, "seconds": round(seconds, 1), "log_ratios": [round(value, 5) for value in quality.log_ratios],
        "perplexity_dense": perplexity(quality.nll_dense), "perplexity": perplexity(quality.nll), "kl": quality.kl()[0],
        "bits_per_weight": size_of(plan, loaded.anatomy).bits_per_weight_model, "alike": {kind: sides["compressed"]["mean"] for kind, sides in found.items()},
        "alike_dense": {kind: sides["dense"]["mean"] for kind, sides in found.items()},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds; the interval is of the ratio of perplexities over windows, each window's log-ratio averaged over seeds."""
    lines = [f"{'bits':>4} {'method':<9} {'seeds':>5} {'bits/weight':>11} {'perplexity':>10} {'ratio, 95% over windows':>28} {'KL':>8} {'seconds':>8}"]
    for bits, label in dict.fromkeys((row["bits"], row["label"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["label"]) == (bits, label)]
        interval = t_interval([statistics.fmean(values) for values in zip(*(row["log_ratios"] for row in same), strict=True)])
        ratio = "" if interval is None else f"{interval.exp().mean:.4f} ({interval.exp().low:.4f} to {interval.exp().high:.4f})"
        mean = {name: statistics.fmean(row[name] for row in same) for name in ("perplexity", "kl")}
        seconds = statistics.median(row["seconds"] for row in same)
        figures = f"{same[0]['bits_per_weight']:>11.3f} {mean['perplexity']:>10.3f} {ratio:>28} {mean['kl']:>8.4f} {seconds:>8.1f}"
        lines.append(f"{bits:>4} {label:<9} {len(same):>5} {figures}")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-stories")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--sequences", type=int, default=288)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch; fewer are faster on a machine that others use too")
    parser.add_argument("--only", nargs="+", choices=list(ENTRANTS), default=list(ENTRANTS))
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    loaded, rows = load(asked.model), []
    for bits in asked.bits:
        for label in asked.only:
            for seed in asked.seeds if ENTRANTS[label] is not None else asked.seeds[:1]:
                rows.append(run(loaded, label, bits, seed, asked))
                print(json.dumps(rows[-1]), flush=True)
    print(f"dense perplexity {rows[0]['perplexity_dense']:.3f}\n{table(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
