"""What each quantisation method loses at each width, beside the libraries that made it popular. Knows recipes and runners.

Every method, ours or a rival's, gets the same calibration tokens and is measured on the same windows by the same code, so
that differences are of methods. A rival runs in its own environment (`--rivals DIR`, one folder each, made by the user) and
hands back plain weights; a rival without an environment is skipped and says so. Ratios carry 95% intervals, paired by window.
Each finished row is kept in `--out`, and each finished layer of a row under way, so that a long bench can be cut short and gone on
with; seconds are added up over such goes. Exit 1 when a promise is broken.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitpress.engine.accounting import size_of
from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.compress import compress
from bitpress.engine.data.texts import load_text, resolve_text
from bitpress.engine.data.tokens import token_windows
from bitpress.engine.errors import BitpressError
from bitpress.engine.home import home
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.measure.interval import Interval, safe_exp, t_interval
from bitpress.engine.measure.perplexity import measure_alone
from bitpress.engine.model import library, load, surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Calibration, Recipe
from bitpress.engine.runs.resident import compute_in

TEXTS = {"smollm2-135m": "wikitext2-raw/test"}  # other models are measured on their own kind of text
GROUPS = {"stories-15m": 32}  # its rows of 288 inputs are no multiple of 64, which some rivals need; other models: 64
FLOAT_ZERO = {"zero": "float"}
ROWS_W8 = {"group_size": "row", "symmetric": True}
Stage = dict[str, Any]


@dataclass(frozen=True)
class Ours:
    """One method of ours: its stages, the widths it is asked at, and what its scheme has beside width and group."""

    stages: tuple[Stage, ...]
    widths: tuple[int, ...] = (4, 3, 2)
    weights: dict[str, Any] | None = None
    activations: int | None = None


RTN, GPTQ = {"method": "rtn"}, {"method": "gptq"}
METHODS: dict[str, Ours] = {
    "rtn": Ours((RTN,)),
    "rtn, clip search": Ours(({"method": "rtn", "options": {"clip_search": True}},)),
    "hqq": Ours(({"method": "hqq"},), weights=FLOAT_ZERO),
    "gptq": Ours((GPTQ,)),
    "gptq, no clip search": Ours(({"method": "gptq", "options": {"clip_search": False}},)),
    "gptq, mended": Ours(({"method": "gptq", "options": {"rounds": 3}},), weights=FLOAT_ZERO),
    "gptq, mended, whole zeros": Ours(({"method": "gptq", "options": {"rounds": 3}},)),
    "gptq, by loss": Ours(({"method": "gptq", "options": {"by_loss": True}},)),
    "gptq, true sequential": Ours(({"method": "gptq", "options": {"true_sequential": True}},)),
    "flexround from mended codes": Ours(({"method": "flexround", "options": {"steps": 100, "mending": 3}},), weights=FLOAT_ZERO),
    "awq + rtn": Ours(({"method": "awq"}, RTN)),
    "awq + gptq": Ours(({"method": "awq"}, GPTQ)),
    "nf4": Ours(({"method": "nf4"},), (4,), {"format": "nf4"}),
    "nf4, double": Ours(({"method": "nf4"},), (4,), {"format": "nf4", "double_quant": True}),
    "fp4": Ours(({"method": "fp4"},), (4,), {"format": "fp4"}),
    "llm-int8": Ours(({"method": "llm-int8"},), (8,), ROWS_W8, 8),
    "W8A8 rtn": Ours((RTN,), (8,), ROWS_W8, 8),
    "W8A8 smoothquant": Ours(({"method": "smoothquant"}, RTN), (8,), ROWS_W8, 8),
    "W4A8 rtn": Ours((RTN,), (4,), None, 8),
    "W4A8 rotation + gptq": Ours(({"method": "rotation"}, GPTQ), (4,), None, 8),
    "W4A4 rtn": Ours((RTN,), (4,), None, 4),
    "W4A4 rotation + rtn": Ours(({"method": "rotation"}, RTN), (4,), None, 4),
    "W4A4 rotation + gptq": Ours(({"method": "rotation"}, GPTQ), (4,), None, 4),
}


@dataclass(frozen=True)
class Rival:
    """A library: the folder of its environment under `--rivals`, its runner beside this file, widths, and the rows of ours it is held against."""

    folder: str
    runner: str
    widths: tuple[int, ...]
    against: str
    options: tuple[str, ...] = ()


RIVALS: dict[str, Rival] = {
    "llm-compressor GPTQ": Rival("llmcompressor", "llmcompressor_gptq.py", (4, 3, 2), "gptq"),
    "llm-compressor AWQ": Rival("llmcompressor", "llmcompressor_awq.py", (4,), "awq + rtn"),
    "hqq (library)": Rival("hqq", "hqq_weights.py", (4, 3, 2), "hqq"),
    "bitsandbytes NF4": Rival("bnb", "bitsandbytes_nf4.py", (4,), "nf4"),
    "auto-round, 50 iterations": Rival("autoround", "autoround_weights.py", (4, 3, 2), "gptq"),
}
WITHIN = 1.01  # ratio of perplexities to the rival that made the method popular
SPEED = 0.5  # of llm-compressor's wall time for GPTQ
JUDGED = {"llm-compressor GPTQ", "llm-compressor AWQ", "hqq (library)", "bitsandbytes NF4"}


@dataclass(frozen=True)
class Row:
    """One measured model: mean negative log-likelihood of each window, in nats a token, and the seconds its making took."""

    name: str
    bits: int
    nll: list[float]
    seconds: float
    note: str = ""

    @property
    def perplexity(self) -> float:
        """exp of the mean over windows."""
        return safe_exp(fmean(self.nll))

    def over(self, other: "Row") -> Interval:
        """Ratio of perplexities to another row's, with its paired interval."""
        gaps = [one - two for one, two in zip(self.nll, other.nll, strict=True)]
        return (t_interval(gaps) or Interval(gaps[0], gaps[0], gaps[0])).exp()


class Stopwatch:
    """Seconds spent on one row, over all goes at it."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.perf_counter()
        self.before = float(json.loads(path.read_text(encoding="utf8"))) if path.exists() else 0.0

    def keep(self) -> float:
        """Write the seconds so far down, and give them."""
        seconds = self.before + time.perf_counter() - self.started
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(seconds), encoding="utf8")
        partial.replace(self.path)
        return seconds


class Bench:
    """One model with its calibration tokens and windows, and the rows found so far."""

    def __init__(self, model: str, say: argparse.Namespace) -> None:
        self.say, self.loaded, self.entry = say, load.load(model), library.find(model)
        self.group = say.group or GROUPS.get(model, 64)
        self.tokens = calibration_set(self.loaded, Calibration(sequences=say.sequences, length=say.length), say.seed)
        self.windows = self._windows()
        key = {"model": self.loaded.anatomy.fingerprint, "tokens": self.tokens.sha256, "windows": list(self.windows.shape), "group": self.group}
        self.path = Path(say.out) / f"{model}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf8").splitlines() if self.path.exists() else []
        self.rows = {(row.name, row.bits): row for row in (Row(**json.loads(line)) for line in lines)}

    def _windows(self) -> torch.Tensor:
        """As many windows as are asked for, none longer than the model's context. Raises BitpressError when the text cannot be had."""
        text, part = resolve_text(TEXTS.get(self.entry.id, "auto"), self.entry, "evaluation")
        window = min(self.say.window, self.loaded.anatomy.context)
        return token_windows(self.loaded.tokenizer, load_text(text, part), window, self.say.windows, needs_bos=self.entry.needs_bos)

    def keep(self, row: Row) -> Row:
        """Write a row down and say it."""
        self.rows[row.name, row.bits] = row
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{self.entry.id}: {row.name}, {row.bits} bits: {row.perplexity:.3f} in {row.seconds:.0f} s {row.note}", file=sys.stderr, flush=True)
        return row

    def measure(self, model: nn.Module) -> list[float]:
        """Each window's loss, computed as a run computes it."""
        compute_in(load.compute_dtype(), self.loaded.model, model)
        return measure_alone(model, self.windows).nll_dense

    def dense(self) -> Row:
        """The model as it is."""
        return self.rows.get(("dense", 16)) or self.keep(Row("dense", 16, self.measure(self.loaded.model), 0.0))

    def ours(self, name: str, bits: int) -> None:
        """Compress by one method and measure. The seconds are the compression's own, calibration walk included."""
        if (name, bits) in self.rows:
            return
        recipe = self._recipe(METHODS[name], bits)
        under_way = self.path.with_suffix("") / recipe.digest()[:16]
        watch = Stopwatch(under_way / "seconds.json")
        made = compress(self.loaded, recipe, lambda kind, data: watch.keep(), LayerStore(under_way), calibration=self.tokens)
        seconds = watch.keep()
        self.keep(Row(name, bits, self.measure(made.model), seconds))
        shutil.rmtree(under_way)

    def _recipe(self, method: Ours, bits: int) -> Recipe:
        weights = {"bits": bits, "group_size": self.group, "symmetric": False, **(method.weights or {})}
        outliers = {"outliers": 6.0} if method.stages[-1]["method"] == "llm-int8" else {}
        activations = {"activations": {"bits": method.activations, **outliers}} if method.activations else {}
        line = {"match": "*", "weights": weights, **activations}
        return Recipe.from_dict({"model": self.entry.id, "seed": self.say.seed, "schemes": [line], "stages": list(method.stages)})

    def stored_bits(self, row: Row) -> str:
        """Bits a weight of the block linears as stored, scales and zeros counted; a rival's are its own to say."""
        method = METHODS.get(row.name)
        return f"{size_of(self._recipe(method, row.bits), self.loaded.anatomy).bits_per_weight_linears:.2f}" if method else ""

    def rival(self, name: str, bits: int) -> str | None:
        """Let a rival make the weights, and measure them; why it was skipped, or None."""
        rival = RIVALS[name]
        if (name, bits) in self.rows:
            return None
        python = Path(self.say.rivals or "") / rival.folder / "bin" / "python"
        if not self.say.rivals or not python.exists():
            return f"no environment {rival.folder} under --rivals"
        with tempfile.TemporaryDirectory() as folder:
            try:
                told, weights = self._run(python, rival, bits, Path(folder))
            except subprocess.CalledProcessError as error:
                return f"it failed: {(error.stderr or '').strip().splitlines()[-1:]}"
            except subprocess.TimeoutExpired:
                return f"it took more than {self.say.patience:.0f} s"
        self.keep(Row(name, bits, self.measure(with_weights(self.loaded, weights)), told["seconds"], told["version"]))
        return None

    def _run(self, python: Path, rival: Rival, bits: int, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        save_file({"ids": self.tokens.ids_SL.contiguous()}, folder / "calibration.safetensors")
        script = Path(__file__).parent / "rivals" / rival.runner
        command = [str(python), str(script), "--model", str(self.loaded.path), "--calibration", str(folder / "calibration.safetensors")]
        command += ["--bits", str(bits), "--group", str(self.group), "--out", str(folder / "weights.safetensors"), *rival.options]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder, timeout=self.say.patience)
        return json.loads(done.stdout.strip().splitlines()[-1]), load_file(folder / "weights.safetensors")


def with_weights(loaded: Loaded, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A twin of the dense model with these matrices. Raises BitpressError unless every block linear is there."""
    missing = [part.name for part in loaded.anatomy.linears if part.name not in weights]
    if missing:
        raise BitpressError("The rival's weights are incomplete.", f"{len(missing)} matrices are missing, such as {missing[0]}.", "Mend its runner.")
    model = surgery.twin(loaded.model)
    for part in loaded.anatomy.linears:
        surgery.set_linear_weight(surgery.get(model, part.name), weights[part.name])
    return model


def table(bench: Bench, skipped: dict[str, str]) -> str:
    """All rows as Markdown, by width and then by perplexity, with ratios to the dense model."""
    dense = bench.dense()
    count, length = bench.windows.shape
    lines = [
        f"### {bench.entry.id}: {TEXTS.get(bench.entry.id, 'its own text')}, {count} windows of {length:,}, group {bench.group}, "
        f"calibrated on {tuple(bench.tokens.ids_SL.shape)} tokens of {bench.tokens.text}, dense {dense.perplexity:.3f}", "",
        "| bits | method | bits a weight | perplexity | over dense, 95% | seconds | |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(bench.rows.values(), key=lambda row: (-row.bits, row.perplexity)):
        over = row.over(dense)
        mark = f"rival, {row.note}" if row.name in RIVALS else ""
        named = f"| {row.bits} | {row.name} | {bench.stored_bits(row)} | {row.perplexity:.3f}"
        lines.append(f"{named} | {over.mean:.3f} [{over.low:.3f}, {over.high:.3f}] | {row.seconds:.1f} | {mark} |")
    lines += ["", *(f"Not run: {name}, {why}." for name, why in skipped.items())]
    return "\n".join(lines)


def promises(bench: Bench) -> list[tuple[str, bool]]:
    """What must hold against the rivals that ran: each sentence with whether it does."""
    found = []
    for (name, bits), theirs in bench.rows.items():
        rival = RIVALS.get(name)
        ours = bench.rows.get((rival.against, bits)) if rival else None
        if rival is None or ours is None:
            continue
        over = ours.over(theirs)
        words = f"{bench.entry.id}: {rival.against} at {bits} bits over {name}: {over.mean:.4f} [{over.low:.4f}, {over.high:.4f}]"
        found.append((f"{words}, at most {WITHIN}", over.mean <= WITHIN) if name in JUDGED else (f"{words}, for information", True))
        if name == "llm-compressor GPTQ":
            speed = ours.seconds / theirs.seconds
            found.append((f"{bench.entry.id}: its time over {name}'s: {speed:.2f}, at most {SPEED}", speed <= SPEED))
    return found + [promise for bits in sorted({bits for name, bits in bench.rows if name in RIVALS}, reverse=True) for promise in best_of(bench, bits)]


def best_of(bench: Bench, bits: int) -> list[tuple[str, bool]]:
    """That the best of ours at a width is no worse than the best rival there, where both ran."""
    sides = [[row for (name, width), row in bench.rows.items() if width == bits and name in known] for known in (METHODS, RIVALS)]
    if not all(sides):
        return []
    ours, theirs = (min(rows, key=lambda row: row.perplexity) for rows in sides)
    over = ours.over(theirs)
    words = f"{bench.entry.id}: the best at {bits} bits, {ours.name}, over the best rival, {theirs.name}"
    return [(f"{words}: {over.mean:.4f} [{over.low:.4f}, {over.high:.4f}], at most 1", over.mean <= 1.0)]


def run(model: str, say: argparse.Namespace) -> tuple[str, list[tuple[str, bool]]]:
    """Every row that is asked for, of one model."""
    bench, skipped = Bench(model, say), {}
    bench.dense()
    for name in say.methods:
        for bits in METHODS[name].widths:
            if bits in say.bits or METHODS[name].widths == (8,):
                bench.ours(name, bits)
    for name in say.against:
        for bits in (bits for bits in RIVALS[name].widths if bits in say.bits):
            if why := bench.rival(name, bits):
                skipped[f"{name} at {bits} bits"] = why
    return table(bench, skipped), promises(bench)


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--models", nargs="+", default=["smollm2-135m", "stories-15m"])
    ask.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD", help="; ".join(METHODS))
    ask.add_argument("--against", nargs="*", default=list(RIVALS), choices=list(RIVALS), metavar="RIVAL", help="; ".join(RIVALS))
    ask.add_argument("--rivals", help="folder with one virtual environment a rival: llmcompressor, hqq, bnb, autoround")
    ask.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    ask.add_argument("--group", type=int, help="64, and 32 for stories-15m, unless told")
    ask.add_argument("--sequences", type=int, default=64)
    ask.add_argument("--length", type=int, default=512)
    ask.add_argument("--windows", type=int, default=16)
    ask.add_argument("--window", type=int, default=2048)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--patience", type=float, default=3600.0, help="seconds that a rival may take")
    ask.add_argument("--out", default=str(home() / "bench" / "quality"), help="folder where finished rows are kept")
    return ask.parse_args()


def main() -> int:
    """Print a table a model, then the promises; 0 when all are kept."""
    say, started, kept = arguments(), time.perf_counter(), True
    for model in say.models:
        try:
            words, found = run(model, say)
        except BitpressError as error:
            print(f"### {model}: not run. {error}", flush=True)
            continue
        kept &= all(held for _, held in found)
        print(words, *(f"- {'kept' if held else 'BROKEN'}: {sentence}" for sentence, held in found), "", sep="\n", flush=True)
    print(f"{time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads; seconds of single rows are only comparable within one quiet run.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
