"""How good and how fast the sensitivities are, and what a budget spent by them is worth: measured on SmolLM2-135M beside what must hold.

    python tests/bench/sensitivity.py [--parts map truth solve recipe] [--rivals DIR] [--seconds 600]

map: seconds of the whole Fisher map. truth: the divergence of single layers by cached prefixes against plain forwards, and the rank
correlation of the scores with it; layers are taken in a random order, so that a bench that is cut short has a fair sample.
solve: time of a budget and of the frontier. recipe: perplexity of the recipe at `--bits` against uniform widths of the same bytes,
a greedy walk on the same scores, the best recipe and a greedy walk by the second-order scores alone, and at 3.5 bits auto-round's
AutoScheme (skipped, and named, without its environment under `--rivals`). `--seed` draws other calibration tokens.

What was measured is kept in `--out`, so that a later start goes on. A table goes to stderr, JSON to stdout. Exit 1 when a promise is broken.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr

from bitpress.engine import sensitivity as engine
from bitpress.engine import sensitivity_truth as truth
from bitpress.engine.accounting import size_of
from bitpress.engine.allocate import allocate, frontier
from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.choices import Choices, choices_of
from bitpress.engine.compress import compress
from bitpress.engine.data.texts import load_text, resolve_text
from bitpress.engine.data.tokens import token_windows
from bitpress.engine.home import home
from bitpress.engine.measure.interval import safe_exp, t_interval
from bitpress.engine.measure.perplexity import measure_alone
from bitpress.engine.model import library, load, surgery
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.resident import compute_in
from bitpress.engine.sensitivity_file import FISHER, LOSS, OPTIONS
from bitpress.engine.sensitivity_options import made_of

MODEL, EVALUATION = "smollm2-135m", "wikitext2-raw/test"
CHECKED = ("3-bit", "50%", "2:4")
GROUP, SCHEME_BITS = 64, 3.5
MAP_SECONDS, PREFIX_SHARE, IDENTICAL, RHO, SOLVE_SECONDS, FRONTIER_SECONDS = 15.0, 0.72, 1e-5, 0.9, 0.1, 1.0
PAIRS = 16  # single layers that are also measured by plain forwards
RIVAL = ("autoround", "autoround_scheme.py")
Row = dict[str, Any]


class Bench:
    """The model, its tokens, and what was measured before."""

    def __init__(self, say: argparse.Namespace) -> None:
        self.say, self.rows = say, list[Row]()
        self.loaded = load.load(MODEL)
        self.stored = {part.name: surgery.linear_weight(surgery.get(self.loaded.model, part.name)).detach() for part in self.loaded.anatomy.linears}
        self.ids_SL = calibration_set(self.loaded, engine.CALIBRATION, say.seed).ids_SL
        drawn = f"-seed{say.seed}" if say.seed else ""
        self.path = Path(say.out) / f"{MODEL}-{'x'.join(map(str, self.ids_SL.shape))}{drawn}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf8").splitlines() if self.path.exists() else []
        self.kept: list[Row] = [json.loads(line) for line in lines]

    def keep(self, **values: Any) -> Row:
        """Write down one measurement."""
        self.kept.append(values)
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(values) + "\n")
        return values

    def known(self, kind: str) -> list[Row]:
        """What is kept of one kind."""
        return [row for row in self.kept if row["kind"] == kind]

    def row(self, name: str, value: float, unit: str, bound: str, kept: bool, conditions: str) -> None:
        """A promise with what was found, as `bitpress.engine.bench` prints it."""
        self.rows.append({"name": name, "value": value, "unit": unit, "bound": bound, "kept": kept, "conditions": conditions})
        print(f"{'kept  ' if kept else 'BROKEN'} {name}: {value:.4g} {unit} {bound}  ({conditions})", file=sys.stderr, flush=True)

    def report(self, force: bool = False) -> Any:
        """The Fisher scores of these tokens, kept as the app keeps them."""
        return engine.measure_sensitivity(self.loaded, self.ids_SL, kinds=engine.QUICK_KINDS, text="wiki", force=force)

    def choices(self, kind: str = LOSS) -> Choices:
        """What allocation chooses from: the head at 8 bits."""
        return choices_of(self.loaded.anatomy, self.report(), kind)


def busy() -> str:
    """How busy the machine is, for the conditions of a time."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def whole_map(bench: Bench) -> None:
    """Every linear x every option, and the embedding at 8 and 4 bits, from one backward; then what autotune adds, losses of doubtful layers."""
    began, used = time.perf_counter(), time.process_time()
    report = bench.report(force=True)
    whole, processor = time.perf_counter() - began, time.process_time() - used
    count = sum(score.kind == FISHER for score in report.scores)
    seconds = sum(spent for kind, spent in report.seconds_of.items() if kind != LOSS)
    parts = ", ".join(f"{kind} {spent:.1f}" for kind, spent in report.seconds_of.items())
    threads = torch.get_num_threads()
    conditions = f"{count} scores on {tuple(bench.ids_SL.shape)} tokens ({parts}), {busy()}"
    bench.row("whole Fisher map", seconds, "s", f"< {MAP_SECONDS:g}", seconds < MAP_SECONDS, conditions)
    spent = f"{processor / threads:.1f} s a core of processor time, {busy()}"
    bench.row("the map and the losses of doubtful layers", whole, "s", "", True, spent)


# Truth -------------------------------------------------------------------------------------------------------------


def single_layers(bench: Bench) -> None:
    """Measure single layers until the time is up, then compare what was measured so far."""
    jobs = [(part, option) for part in bench.loaded.anatomy.linears for option in OPTIONS if option.id in CHECKED]
    random.Random(0).shuffle(jobs)
    done = {(row["layer"], row["option"]) for row in bench.known("truth")}
    left = [(part, option) for part, option in jobs if (part.name, option.id) not in done]
    ends = time.monotonic() + bench.say.seconds
    if left:
        prefixes = truth.Prefixes(bench.loaded.model, bench.loaded.anatomy, bench.ids_SL)
        with prefixes.open():
            prefixes.take()
            prefixes.refer()
            for part, option in left:
                if time.monotonic() > ends:
                    break
                _single_layer(bench, prefixes, part, option)
    _correlation(bench)
    _prefix_rows(bench)


def _single_layer(bench: Bench, prefixes: truth.Prefixes, part: Any, option: Any) -> None:
    module = surgery.get(bench.loaded.model, part.name)
    with truth.changed(module, made_of(bench.stored[part.name].float(), option.scheme)):
        cached, seconds = timed(lambda: prefixes.kl_from(part.block))
        values: Row = {"kind": "truth", "layer": part.name, "option": option.id, "block": part.block, "kl": cached, "seconds": seconds}
        if len(bench.known("truth")) < PAIRS:
            values["plain"], values["plain_seconds"] = timed(prefixes.kl_plain)
    bench.keep(**values)


def timed(act: Callable[[], float]) -> tuple[float, float]:
    """What it gives, and the seconds it took."""
    began = time.perf_counter()
    return act(), time.perf_counter() - began


def _prefix_rows(bench: Bench) -> None:
    pairs = [row for row in bench.known("truth") if "plain" in row]
    if not pairs:
        return
    ratios = [row["seconds"] / row["plain_seconds"] for row in pairs]
    blocks = statistics.fmean(row["block"] for row in pairs)
    slope, start = np.polyfit([row["block"] for row in pairs], ratios, 1)
    middle = float(start + slope * (bench.loaded.anatomy.blocks - 1) / 2)  # what all blocks together would give
    plain = f"of the middle block by a line through them; their own mean is {statistics.fmean(ratios):.2f}"
    conditions = f"{len(pairs)} layers, mean block {blocks:.1f}; {plain}; {busy()}"
    bench.row("time of a truth with prefixes over plain", middle, "times", f"<= {PREFIX_SHARE}", middle <= PREFIX_SHARE, conditions)
    apart = max(abs(row["kl"] - row["plain"]) for row in pairs)
    bench.row("largest difference of the two", apart, "nats", f"<= {IDENTICAL:g}", apart <= IDENTICAL, f"{len(pairs)} layers")


def _correlation(bench: Bench) -> None:
    table = bench.report().table(FISHER)
    pooled: list[tuple[float, float]] = []
    for option in CHECKED:
        pairs = [(table[option][row["layer"]], row["kl"]) for row in bench.known("truth") if row["option"] == option]
        pooled += pairs
        if len(pairs) > 3:
            rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
            bench.row(f"rank correlation with the truth, {option}", rho, "", f">= {RHO}", rho >= RHO, f"{len(pairs)} of 210 layers, the same tokens")
    if len(pooled) > 3:
        rho = float(spearmanr(*zip(*pooled, strict=True)).statistic)
        bench.row("rank correlation with the truth, pooled", rho, "", "", True, f"{len(pooled)} layers and options")


# Budgets -----------------------------------------------------------------------------------------------------------


def solving(bench: Bench) -> None:
    """The slowest of many budgets, one and two at once, and the frontier."""
    choices = bench.choices()
    anatomy = choices.anatomy
    limits: list[Mapping[str, float]] = [{"linear_bits": bits} for bits in np.arange(2.4, 8.0, 0.4)]
    limits += [{"perplexity_ratio": ratio} for ratio in (1.02, 1.1, 1.5)]
    limits += [{"bytes": anatomy.bytes * share, "perplexity_ratio": 2.0} for share in (0.35, 0.45)]
    took = [timed(lambda limit=limit: allocate(choices, limit).predicted["kl"])[1] for limit in limits]  # type: ignore[misc]
    p50, slowest = statistics.median(took), max(took)
    words = f"{len(took)} budgets, slowest {slowest * 1e3:.0f} ms, {len(choices.items)} layers x {len(choices.options)} options, {busy()}"
    bench.row("a budget solved again, p50", p50, "s", f"< {SOLVE_SECONDS}", p50 < SOLVE_SECONDS, words)
    points, seconds = timed(lambda: float(len(frontier(choices).points)))
    bench.row("whole frontier", seconds, "s", f"< {FRONTIER_SECONDS:g}", seconds < FRONTIER_SECONDS, f"{points:.0f} points, {busy()}")


def greedy(choices: Choices, limit: float) -> np.ndarray:
    """All layers at their smallest option, then one step up at a time where it saves most harm a byte, as long as it fits."""
    harm_IJ, cost_IJ = choices.harm_IJ, choices.linear_bytes_IJ
    order = [sorted(np.flatnonzero(np.isfinite(harm_J)), key=lambda option, item=item: cost_IJ[item, option]) for item, harm_J in enumerate(harm_IJ)]
    place = np.zeros(len(order), dtype=int)
    used = sum(cost_IJ[item, options[0]] for item, options in enumerate(order))
    while True:
        best: tuple[float, int, float] | None = None
        for item, options in enumerate(order):
            if place[item] + 1 < len(options):
                now, more = options[place[item]], options[place[item] + 1]
                cost = cost_IJ[item, more] - cost_IJ[item, now]
                if used + cost <= limit and cost > 0:
                    gain = (harm_IJ[item, now] - harm_IJ[item, more]) / cost
                    best = max(best or (-np.inf, 0, 0.0), (gain, item, cost))
        if best is None:
            return np.array([options[at] for options, at in zip(order, place, strict=True)])
        place[best[1]] += 1
        used += best[2]


def recipes(bench: Bench) -> None:
    """Perplexities at one size, paired by window."""
    loaded, bits, base = bench.loaded, bench.say.bits, {"model": MODEL, "stages": [{"method": bench.say.method}], "embedding": {"bits": 8}}
    choices = bench.choices()
    mixed = allocate(choices, {"linear_bits": bits}, Recipe.from_dict(base)).recipe
    plans: dict[str, Recipe] = {"mixed": mixed, **uniform(choices, base, bits)}
    second = bench.choices(FISHER)
    plans["best by second order alone"] = allocate(second, {"linear_bits": bits}, Recipe.from_dict(base)).recipe
    for words, table in (("greedy", choices), ("greedy by second order alone", second)):
        walked = widths(table, greedy(table, bits * loaded.anatomy.linear_params / 8))
        plans[words] = by_layer(base, dict(zip(bench_layers(table), walked, strict=True)))
    if bits == SCHEME_BITS and (bits_of := rival_scheme(bench)):
        plans["AutoScheme"] = by_layer(base, bits_of)
    windows = _windows(bench)
    nll = {name: _losses(bench, recipe, windows) for name, recipe in plans.items()}
    ours = nll["mixed"]
    print({name: round(safe_exp(statistics.fmean(values)), 3) for name, values in nll.items()}, file=sys.stderr)
    for name in list(plans)[1:]:
        gap = t_interval([one - two for one, two in zip(ours, nll[name], strict=True)])
        assert gap is not None
        over = gap.exp()
        kept = over.high < 1 if name.startswith("uniform") else over.mean <= 1 + 1e-9 or over.low <= 1
        size = size_words(plans[name], choices)
        words = f"95% {over.low:.4f} to {over.high:.4f}; perplexity {safe_exp(statistics.fmean(ours)):.3f} at {size_words(mixed, choices)}"
        words += f", theirs {safe_exp(statistics.fmean(nll[name])):.3f} at {size}, {bench.say.method}, {len(windows)} windows of {windows.shape[1]}"
        bench.row(f"perplexity of mixed over {name}", over.mean, "times", "< 1, all of the interval" if name.startswith("uniform") else "<= 1", kept, words)


def uniform(choices: Choices, base: Mapping[str, Any], bits: float) -> dict[str, Recipe]:
    """The widest width everywhere, in the smallest groups that are within the size."""
    for width, group in itertools.product(range(int(bits), 1, -1), range(8, GROUP + 1)):
        made = Recipe.from_dict({**base, "schemes": [{"match": "*", "weights": {"bits": width, "group_size": group}}]})
        if size_of(made, choices.anatomy).bits_per_weight_linears <= bits:
            return {f"uniform {width} bits, group {group}": made}
    return {}


def bench_layers(choices: Choices) -> Iterator[str]:
    """Layer names in the order of the items."""
    return (layers[0] for layers in choices.items)


def widths(choices: Choices, choice: np.ndarray) -> list[dict[str, Any]]:
    """Scheme lines' fields of a choice."""
    return [choices.options[option].scheme.model_dump(exclude_none=True) for option in choice]


def by_layer(base: Mapping[str, Any], fields_of: Mapping[str, dict[str, Any]]) -> Recipe:
    """A recipe with a line a layer."""
    lines = [{"match": name, **fields} for name, fields in fields_of.items() if fields]
    stages = [{"method": "magnitude"}, *base["stages"]] if any("sparsity" in line for line in lines) else base["stages"]
    return Recipe.from_dict({**base, "schemes": lines, "stages": stages})


def size_words(recipe: Recipe, choices: Choices) -> str:
    """Bits a linear weight."""
    return f"{size_of(recipe, choices.anatomy).bits_per_weight_linears:.3f} bits"


def rival_scheme(bench: Bench) -> dict[str, dict[str, Any]]:
    """auto-round's widths as fields of a line; empty where its environment is absent or it fails, which is said."""
    kept = bench.known("autoscheme")
    if not kept:
        python = Path(bench.say.rivals or "") / RIVAL[0] / "bin" / "python"
        if not bench.say.rivals or not python.exists():
            print(f"AutoScheme was not run: no environment {RIVAL[0]} under --rivals.", file=sys.stderr)
            return {}
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            save_file({"ids": bench.ids_SL.contiguous()}, place / "calibration.safetensors")
            command = [str(python), str(Path(__file__).parent / "rivals" / RIVAL[1]), "--model", str(bench.loaded.path), "--calibration"]
            command += [str(place / "calibration.safetensors"), "--average", str(SCHEME_BITS), "--group", str(GROUP), "--out", str(place / "bits.json")]
            environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"AR_ALLOW_W8_ASYM": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=bench.say.patience)
            if done.returncode:
                print(f"AutoScheme was not run: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                return {}
            kept = [bench.keep(kind="autoscheme", bits=json.loads((place / "bits.json").read_text()), **json.loads(done.stdout.strip().splitlines()[-1]))]
    return {name: {"weights": {"bits": bits, "group_size": GROUP}} for name, bits in kept[0]["bits"].items() if bits < 16}


def _windows(bench: Bench) -> torch.Tensor:
    entry = library.find(MODEL)
    text, part = resolve_text(EVALUATION, entry, "evaluation")
    return token_windows(bench.loaded.tokenizer, load_text(text, part), bench.say.window, bench.say.windows, needs_bos=entry.needs_bos)


def _losses(bench: Bench, recipe: Recipe, windows: torch.Tensor) -> list[float]:
    """Each window's loss under a recipe; kept by the recipe's digest and the windows."""
    key = [recipe.digest(), *windows.shape]
    known = next((row["nll"] for row in bench.known("recipe") if row["key"] == key), None)
    if known is None:
        made = compress(bench.loaded, recipe)
        compute_in(load.compute_dtype(), bench.loaded.model, made.model)
        known = bench.keep(kind="recipe", key=key, nll=measure_alone(made.model, windows).nll_dense)["nll"]
    return list(known)


PARTS: dict[str, Callable[[Bench], None]] = {"solve": solving, "map": whole_map, "truth": single_layers, "recipe": recipes}


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    ask.add_argument("--rivals", help="folder with one virtual environment a rival: autoround")
    ask.add_argument("--seconds", type=float, default=1500.0, help="for measuring single layers; 0 compares what is kept")
    ask.add_argument("--method", default="rtn", help="what rounds the recipes")
    ask.add_argument("--bits", type=float, default=SCHEME_BITS, help="a linear weight, of the recipes")
    ask.add_argument("--seed", type=int, default=0, help="of the calibration tokens")
    ask.add_argument("--windows", type=int, default=16)
    ask.add_argument("--window", type=int, default=2048)
    ask.add_argument("--patience", type=float, default=1800.0, help="seconds that a rival may take")
    ask.add_argument("--out", default=str(home() / "bench" / "sensitivity"), help="folder where measurements are kept")
    return ask.parse_args()


def main() -> int:
    """Run the parts; 0 when every promise is kept."""
    say = arguments()
    bench = Bench(say)
    for name in say.parts:
        PARTS[name](bench)
    print(json.dumps(bench.rows, indent=1))
    return 0 if all(row["kept"] for row in bench.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
