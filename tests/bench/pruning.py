"""What pruning costs on SmolLM2-135M: zeros, structure and depth, each beside the dense model on the same windows, with 95% intervals.

Run it as a program: `python tests/bench/pruning.py unstructured|structured|modules|depth`. A table goes to stderr, rows as JSON to stdout.
`--rows FILE` keeps every row as it comes, and leaves out what the file already holds, so that a long table is made in several goes.
`--llmcompressor PYTHON` names the interpreter of an environment that holds llm-compressor; without it its rows are left out and said to be.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpress.engine.accounting import flops_per_token, ideal_speedup
from bitpress.engine.calibration_set import CalibrationSet, calibration_set
from bitpress.engine.compress import Compressed, compress
from bitpress.engine.decode import Decoder
from bitpress.engine.measure.latency import Plan, measure_latency
from bitpress.engine.measure.perplexity import measure_pair, perplexity
from bitpress.engine.model.load import Loaded, compute_dtype, load
from bitpress.engine.recipe import Calibration, Recipe
from bitpress.engine.runs.resident import compute_in

RIVAL = Path(__file__).parent / "rivals" / "prune_llmcompressor.py"
SCORES = ("magnitude-structured", "wanda-structured", "flap", "llm-pruner", "kwon", "k-prune")


@dataclass(frozen=True)
class Row:
    """One model: perplexity over dense on the same windows with its paired 95% interval, what is left of the linears and of the model."""

    name: str
    ratio: float
    low: float
    high: float
    perplexity: float
    linears_kept: float
    flops_kept: float
    seconds: float


class Bench:
    """The dense model, the windows and the calibration text that all rows share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.loaded: Loaded = load(asked.model)
        self.ids_NT = windows(self.loaded, asked.windows, asked.length)
        self.text: CalibrationSet = calibration_set(self.loaded, Calibration(sequences=asked.sequences, length=asked.calibration_length))
        self.kept: Path | None = asked.rows
        lines = self.kept.read_text().splitlines() if self.kept and self.kept.exists() else []
        self.rows = [Row(**json.loads(line)) for line in lines]

    def has(self, name: str) -> bool:
        """Whether a row is there from an earlier go."""
        return any(row.name == name for row in self.rows)

    def add(self, name: str, fields: dict[str, Any]) -> Compressed | None:
        """Make a recipe's model and measure it; None when that was done in an earlier go."""
        if self.has(name):
            return None
        plan = Recipe.from_dict({"model": self.loaded.model_id, **fields})
        made = compress(self.loaded, plan, calibration=self.text)
        self.judge(name, made.model, made.recipe, made.seconds)
        return made

    def judge(self, name: str, model: nn.Module, recipe: Recipe, seconds: float) -> None:
        """Measure a model beside the dense one."""
        dtype, anatomy = compute_dtype(), self.loaded.anatomy
        stored = next(self.loaded.model.parameters()).dtype
        compute_in(dtype, self.loaded.model, model)
        quality = measure_pair(self.loaded.model, model, self.ids_NT, early_stop=False)
        compute_in(stored, self.loaded.model)
        ratio = quality.ratio()
        assert ratio is not None
        linears = recipe.reduced(anatomy).linear_params / anatomy.linear_params
        flops = flops_per_token(recipe, anatomy) / flops_per_token(None, anatomy)
        self.rows.append(Row(name, ratio.mean, ratio.low, ratio.high, perplexity(quality.nll), linears, flops, round(seconds, 1)))
        if self.kept:
            with self.kept.open("a") as file:
                file.write(json.dumps(asdict(self.rows[-1])) + "\n")
        print(f"{name:44} x{ratio.mean:8.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  linears {linears:.1%}  FLOPs {flops:.1%}  {seconds:.0f} s", file=sys.stderr)


def windows(loaded: Loaded, count: int, length: int) -> torch.Tensor:
    """The first windows of WikiText-2 raw test, from BITPRESS_TEST_DATA."""
    path = Path(os.environ["BITPRESS_TEST_DATA"]) / "text" / "wikitext2-raw-test.txt"
    ids = loaded.tokenizer(path.read_text(encoding="utf8")[: 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def unstructured(bench: Bench, asked: argparse.Namespace) -> None:
    """Half of all weights at zero, anywhere and in patterns; beside llm-compressor's own on the same tokens."""
    refitted = {"wanda-refitted": {"method": "wanda", "options": {"repair": "least_squares"}}}
    for pattern in asked.patterns:
        for stage in (refitted.get(name, {"method": name}) for name in asked.methods):
            fields = {"schemes": [{"match": "*", "sparsity": {"ratio": 0.5, "pattern": pattern}}], "stages": [stage]}
            bench.add(f"{stage['method']} {pattern} {''.join(stage.get('options', {}).values())}", fields)  # type: ignore[attr-defined]
        for method in sorted({"wanda", "sparsegpt"} & set(asked.methods)):
            if asked.llmcompressor:
                rival(bench, asked.llmcompressor, method, pattern)
            else:
                print(f"llm-compressor {method} {pattern}: left out, no --llmcompressor", file=sys.stderr)


def rival(bench: Bench, python: str, method: str, pattern: str) -> None:
    """llm-compressor's result on the same calibration tokens, measured by the same code."""
    name = f"llm-compressor {method} {pattern}"
    if bench.has(name):
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        ids.write_text(json.dumps(bench.text.ids_SL.tolist()))
        shape = "0:0" if pattern == "unstructured" else pattern
        began = time.perf_counter()
        command = [python, str(RIVAL), str(bench.loaded.path), f"{folder}/made", method, shape, str(ids)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        model = load(f"{folder}/made").model
        bench.judge(name, model, Recipe(model=bench.loaded.model_id), time.perf_counter() - began)


def structured(bench: Bench, asked: argparse.Namespace) -> None:
    """Heads and neurons removed by each score, with its own repair, and K-pruning without its repair, or as the paper has it, and others with it."""
    for remove in asked.remove or (0.2, 0.4, 0.6):
        for name in asked.scores:
            bench.add(f"{name} -{remove:.0%}", staged(name, {"remove": remove, **({"measured": asked.measured} if name == "k-prune" else {})}))
        if "k-prune" in asked.scores:
            for repair in asked.ablations:
                bench.add(f"k-prune, repair {repair} -{remove:.0%}", staged("k-prune", {"remove": remove, "measured": asked.measured, "repair": repair}))
        for name in asked.refitted:
            bench.add(f"{name} refitted -{remove:.0%}", staged(name, {"remove": remove, "repair": "least_squares"}))


def modules(bench: Bench, asked: argparse.Namespace) -> None:
    """Module-wise error beside Taylor and magnitude, none of them repaired."""
    own = {"mope": {"sequences": asked.tried_on, "rescore": asked.rescore}}
    for remove in asked.remove or (0.1, 0.2, 0.3, 0.4):
        for name in ("magnitude-structured", "llm-pruner", "mope"):
            bench.add(f"{name} -{remove:.0%}", staged(name, {"remove": remove, **own.get(name, {})}))


def staged(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one stage."""
    return {"stages": [{"method": method, "options": options}]}


def depth(bench: Bench, asked: argparse.Namespace) -> None:
    """Half of the blocks gone: perplexity without training, and for LayerChop the speed against what its bytes and FLOPs allow."""
    for choice in ("max-gap", "input", "output", "middle", "both"):
        bench.add(f"layerchop {choice}", staged("layerchop", {"remove": 0.5, "choice": choice}))
    bench.add("shortgpt", staged("shortgpt", {"remove": 0.5}))
    for bits in (16, 8):
        fields = staged("layerchop", {"remove": 0.5}) | ({"embedding": {"bits": bits}} if bits < 16 else {})
        if made := bench.add(f"layerchop, {bits}-bit head", fields):
            speed(bench, made, bits)


def speed(bench: Bench, made: Compressed, bits: int) -> None:
    """Decode and prefill of the smaller model over dense, each beside its bound."""
    compute_in(compute_dtype(), bench.loaded.model, made.model)
    plan = Plan().fitted(bench.loaded.anatomy.context)
    decoders = {side: Decoder(model, None, plan.prompt + plan.new) for side, model in (("dense", bench.loaded.model), ("made", made.model))}
    found = measure_latency(decoders, bench.ids_NT.flatten()[: plan.prompt], plan)
    decode = found["made"].decode_tokens_per_s / found["dense"].decode_tokens_per_s
    prefill = found["made"].prefill_tokens_per_s / found["dense"].prefill_tokens_per_s
    anatomy, most = bench.loaded.anatomy, ideal_speedup(made.recipe, bench.loaded.anatomy)
    head = anatomy.vocab * anatomy.hidden  # runs for the last position of a prompt only
    work = [plan.prompt * linears + head for linears in (anatomy.linear_params, made.recipe.reduced(anatomy).linear_params)]
    print(f"  {bits}-bit head: decode x{decode:.2f} of at most x{most:.2f}, prefill x{prefill:.2f} of at most x{work[0] / work[1]:.2f}", file=sys.stderr)


PARTS = {"unstructured": unstructured, "structured": structured, "modules": modules, "depth": depth}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what pruning costs.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--rows", type=Path, help="file that keeps the rows, one JSON object a line")
    parser.add_argument("--llmcompressor", help="interpreter of an environment that holds llm-compressor")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "wanda-refitted"])
    parser.add_argument("--remove", type=float, nargs="+", help="shares removed; each part has its own without")
    parser.add_argument("--tried-on", type=int, default=4, help="sequences that MoPE tries every module on")
    parser.add_argument("--rescore", type=float, default=0.1, help="share that goes before MoPE tries what is left anew")
    parser.add_argument("--scores", nargs="+", default=SCORES)
    parser.add_argument("--ablations", nargs="*", default=["none", "catch_up"], help="repairs that K-pruning is also tried with")
    parser.add_argument("--refitted", nargs="*", default=["wanda-structured", "kwon"], help="scores that are also tried with K-pruning's repair")
    parser.add_argument("--measured", default="sublayer", choices=("sublayer", "block", "once"))
    given = parser.parse_args()
    bench = Bench(given)
    PARTS[given.part](bench, given)
    print(json.dumps([asdict(row) for row in bench.rows], indent=1))
