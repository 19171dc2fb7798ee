"""Rounding, binary coding and the methods that optimise a block, side by side: error of the blocks' outputs and perplexity, over seeds.

Every optimised method has the same steps, text and number of learning rates to choose from; rates are chosen on a seed that is not
reported, by the error on held-out calibration sequences. "=" marks uniform codes in groups so small that they take as many bytes as
binary codes (a scale and a zero against one alpha a bit and a shift). A row of JSON a run goes to stdout, a table of means to stderr:

    python tests/bench/block_reconstruction.py --model tiny-stories --bits 2 3 4 --seeds 0 1 2 --tune
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.accounting import size_of
from bitpress.engine.compress import compress
from bitpress.engine.measure.measure import windows_for
from bitpress.engine.measure.perplexity import measure_pair
from bitpress.engine.methods import registry
from bitpress.engine.model import library, surgery
from bitpress.engine.model.load import Loaded, load
from bitpress.engine.recipe import Measure, Recipe

TUNING_SEED = 100
RATES = (2e-3, 1e-3, 5e-4, 2e-4)  # METHODS 1.8
CLIP_RATES = (2e-2, 1e-2, 5e-3, 2e-3)  # of OmniQuant's strengths, whose scale is that of a sigmoid's argument


@dataclass(frozen=True)
class Entrant:
    """A method with fixed options, and the options to choose from on the tuning seed."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    small_groups: bool = False  # uniform codes in groups so small that they take the bytes of binary codes
    choices: tuple[dict[str, Any], ...] = ()

    @property
    def format(self) -> str:
        """The stored format of its codes."""
        return registry.get(self.method).ability.formats[0]


def entrants() -> list[Entrant]:
    """Everything that is installed of the comparison in METHODS 1.8."""
    found = [
        Entrant("RTN", "rtn"),
        Entrant("RTN clip", "rtn", {"clip_search": True}),
        Entrant("GPTQ clip", "gptq", {"clip_search": True}),
        Entrant("GPTQ clip =", "gptq", {"clip_search": True}, small_groups=True),
        Entrant("BCQ", "bcq"),
        Entrant("FlexRound", "flexround", choices=tuple({"rate": rate} for rate in RATES)),
        Entrant("FlexRound =", "flexround", small_groups=True, choices=tuple({"rate": rate} for rate in RATES)),
        Entrant("OmniQuant", "omniquant", choices=tuple({"rate": rate} for rate in CLIP_RATES)),
        Entrant("UniQuanF", "uniquanf", choices=tuple({"rate": rate, "alpha_rate": rate / 10} for rate in RATES)),
    ]
    return [entrant for entrant in found if entrant.method in registry.all_methods()]


def recipe_of(entrant: Entrant, bits: int, seed: int, asked: argparse.Namespace, options: dict[str, Any]) -> Recipe:
    """All block linears at one width and group."""
    budget = {"steps": asked.steps} if entrant.choices else {}
    group = asked.group * (16 + bits) // (16 * (bits + 1)) if entrant.small_groups else asked.group
    weights = {"bits": bits, "group_size": group, "format": entrant.format}
    stage = {"method": entrant.method, "options": {**entrant.options, **budget, **options}}
    calibration = {"sequences": asked.sequences, "length": asked.length}
    schemes = [{"match": asked.match, "weights": weights}]
    return Recipe.from_dict({"model": asked.model, "seed": seed, "calibration": calibration, "schemes": schemes, "stages": [stage]})


def block_error(loaded: Loaded, made: nn.Module, ids_NT: Tensor) -> float:
    """Mean over blocks and tokens of |output - dense output|^2 / |dense output|^2, each model fed by its own earlier blocks."""
    outputs = [_block_outputs(model, loaded.anatomy.block_prefix, ids_NT) for model in (loaded.model, made)]
    return statistics.fmean(float(((other - dense).square().sum(-1) / dense.square().sum(-1)).mean()) for dense, other in zip(*outputs, strict=True))


@torch.inference_mode()
def _block_outputs(model: nn.Module, prefix: str, ids_NT: Tensor) -> list[Tensor]:
    heard: list[Tensor] = []
    blocks = surgery.get(model, prefix).children()
    handles = [block.register_forward_hook(lambda _, __, out: heard.append((out if isinstance(out, Tensor) else out[0]).float())) for block in blocks]
    model(input_ids=ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return heard


def run(loaded: Loaded, entrant: Entrant, bits: int, seed: int, asked: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """One compression, measured. `held_out`: sum over blocks of the error that training reached."""
    plan, said = recipe_of(entrant, bits, seed, asked, options), []
    begun = time.perf_counter()
    made = compress(loaded, plan, lambda kind, data: said.append(data) if kind == "block_loss" else None)
    seconds = time.perf_counter() - begun
    windows = windows_for(loaded, library.find(loaded.model_id), Measure(tier=asked.tier)).ids_NT[: asked.windows]
    quality = measure_pair(loaded.model, made.model, windows, early_stop=False)
    row = {"label": entrant.label, "bits": bits, "seed": seed, "options": options, "seconds": round(seconds, 1)}
    row |= {"log_ratio": statistics.fmean(quality.log_ratios), "kl": quality.kl()[0], "bits_per_weight": size_of(plan, loaded.anatomy).bits_per_weight_linears}
    last = {data["block"]: data["best"] for data in said}
    return {**row, "block_error": block_error(loaded, made.model, windows[:4]), "held_out": sum(last.values())}


def tuned(loaded: Loaded, entrant: Entrant, bits: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The choice of least held-out loss on the tuning seed; the middle one without `--tune`."""
    if not entrant.choices or not asked.tune:
        return entrant.choices[1] if entrant.choices else {}
    return min(entrant.choices, key=lambda options: run(loaded, entrant, bits, TUNING_SEED, asked, options)["held_out"])


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds."""
    lines = [f"{'bits':>4} {'method':<12} {'bits/weight':>11} {'block error':>20} {'perplexity ratio':>22} {'seconds':>8}"]
    for bits, label in dict.fromkeys((row["bits"], row["label"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["label"]) == (bits, label)]
        error, ratio = ([row[name] for row in same] for name in ("block_error", "log_ratio"))
        ratios = [math.exp(value) for value in ratio]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (error, ratios)]
        seconds = statistics.median(row["seconds"] for row in same)
        figures = f"{statistics.fmean(error):.5f} ({spread[0]:.5f})", f"{statistics.fmean(ratios):.4f} ({spread[1]:.4f})"
        lines.append(f"{bits:>4} {label:<12} {same[0]['bits_per_weight']:>11.3f} {figures[0]:>20} {figures[1]:>22} {seconds:>8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-stories")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--match", default="*", help="the layers to compress; the others stay dense")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tier", default="quick")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="labels of the methods to run")
    parser.add_argument("--tune", action="store_true", help="choose learning rates, four for every optimised method")
    asked = parser.parse_args()
    loaded, rows = load(asked.model), []
    for bits in asked.bits:
        for entrant in (each for each in entrants() if not asked.only or each.label in asked.only):
            options = tuned(loaded, entrant, bits, asked)
            for seed in asked.seeds if entrant.choices or entrant.method == "gptq" else asked.seeds[:1]:
                rows.append(run(loaded, entrant, bits, seed, asked, options))
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
