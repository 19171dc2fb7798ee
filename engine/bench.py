"""`make bench`: what Bitpress promises, measured on SmolLM2-135M beside the bound it must keep. Knows the promises; no page of the app.

Each part runs in a process of its own, so that the peak memory of one is not that of another. The perplexities are held
against a loop that shares no code with Bitpress: plain transformers, whole logits, cross entropy. A table goes to stderr,
JSON to stdout.
"""

import argparse
import contextlib
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitpress.engine.accounting import size_of
from bitpress.engine.compress import Compressed, compress
from bitpress.engine.data.texts import DEFAULT_TEXT, fetch_text
from bitpress.engine.decode_bench import DENSE, TRANSFORMERS, decode_table
from bitpress.engine.errors import BitpressError
from bitpress.engine.home import PACKAGE_ROOT
from bitpress.engine.layer_store import LayerStore
from bitpress.engine.measure.measure import measure, windows_for
from bitpress.engine.measure.memory import reset_peak
from bitpress.engine.model import install, library, load, surgery
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import machine
from bitpress.engine.runs.resident import compute_in
from bitpress.kernels import reference
from bitpress.kernels.packed import PackedLinear

MODEL = "smollm2-135m"
DENSE_PERPLEXITY = 20.74  # 16 windows of 2,048 of wikitext2-raw/test
AGREEMENT = 0.003
COMPRESS_SECONDS = 15.0
PEAK_OVERHEAD = 1.5e9
DECODE_OVER_TRANSFORMERS, DECODE_OVER_DENSE = 2.5, 1.8
APP_SCRIPT = PACKAGE_ROOT / "tests" / "bench" / "app_speed.py"


@dataclass(frozen=True)
class Row:
    """One promise: what was found, the bound in words, whether it is kept, and the conditions."""

    name: str
    value: float
    unit: str
    bound: str
    kept: bool
    conditions: str


def quality(quick: bool) -> list[Row]:
    """Compression time, perplexity against a plain loop, peak memory, and bytes on disk against the accounting."""
    reset_peak()
    _ready()
    recipe = _recipe("quick" if quick else "standard")
    loaded, entry = load.load(MODEL), library.find(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        made = compress(loaded, recipe, store=LayerStore(Path(folder)))
        payload = sum(map(_payload_bytes, Path(folder).glob("layers/*.safetensors")))
    compute_in(load.compute_dtype(), loaded.model, made.model)
    found = measure(loaded, entry, recipe.measure, made.model, recipe)
    ids_NT = windows_for(loaded, entry, recipe.measure).ids_NT
    return [_compression_row(made, loaded), *_perplexity_rows(found, loaded, made.model, ids_NT, quick),
            _peak_row(found["compressed"]["peak_bytes"], loaded), *_byte_rows(payload, made, recipe, loaded)]  # fmt: skip


def _ready() -> None:
    """Model and text on this machine. Where WikiText-2 cannot be had, `auto` falls back on another text, and the known figure is not judged."""
    if not library.find(MODEL).ready:
        install.install(MODEL, lambda done, total: None, lambda: False)
    with contextlib.suppress(BitpressError):
        fetch_text(DEFAULT_TEXT)


def _recipe(tier: str) -> Recipe:
    weights = {"bits": 4, "group_size": 64, "symmetric": False}
    measured = {"tier": tier, "text": "auto", "latency": False}
    return Recipe.from_dict({"model": MODEL, "schemes": [{"match": "*", "weights": weights}], "stages": [{"method": "rtn"}], "measure": measured})


def _compression_row(made: Compressed, loaded: Loaded) -> Row:
    conditions = f"{len(made.layers)} linears, RTN 4 bits group 64, files written, {_machine()}"
    kept = made.seconds < COMPRESS_SECONDS and len(made.layers) == len(loaded.anatomy.linears)
    return Row("compression", made.seconds, "s", f"< {COMPRESS_SECONDS:g}", kept, conditions)


def _perplexity_rows(found: dict[str, Any], loaded: Loaded, packed: nn.Module, ids_NT: Tensor, quick: bool) -> list[Row]:
    plain = _plain_model(loaded)
    line, rows = found["dense"]["protocol"]["one_line"], []
    for side in ("dense", "compressed"):
        if side == "compressed":
            _take_weights(plain, packed)
        ours, theirs = found[side]["perplexity"], plain_perplexity(plain, ids_NT)
        rows.append(Row(f"perplexity, {side}", ours, "", f"{theirs:.3f} of a plain loop, within 0.3%", abs(ours / theirs - 1) < AGREEMENT, line))
    if not quick and found["dense"]["protocol"]["text"] == DEFAULT_TEXT:
        dense = found["dense"]["perplexity"]
        rows.append(Row("perplexity, dense, known", dense, "", f"{DENSE_PERPLEXITY} within 0.3%", abs(dense / DENSE_PERPLEXITY - 1) < AGREEMENT, line))
    return rows


def _plain_model(loaded: Loaded) -> nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32).eval()


def _take_weights(plain: nn.Module, packed: nn.Module) -> None:
    """Give the plain model the values that the packed codes stand for, by the oracle."""
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            surgery.set_linear_weight(surgery.get(plain, name), reference.dequantize(module.packed, torch.float32))


@torch.inference_mode()
def plain_perplexity(model: nn.Module, ids_NT: Tensor) -> float:
    """exp of the mean over windows of the mean cross entropy: the loop of the papers, written without any of Bitpress."""
    means = [float(functional.cross_entropy(model(ids_T[None]).logits[0, :-1].float(), ids_T[1:])) for ids_T in ids_NT]
    return math.exp(sum(means) / len(means))


def _peak_row(peak: int, loaded: Loaded) -> Row:
    block = 4 * sum(part.numel for part in loaded.anatomy.of_block(0))  # worked on in float32
    limit = loaded.anatomy.bytes + block + PEAK_OVERHEAD
    return Row("peak memory of compressing and measuring", peak / 1e9, "GB", f"<= {limit / 1e9:.2f}: dense, a block and 1.5 GB", peak <= limit,
               f"whole process, {_machine()}")  # fmt: skip


def _byte_rows(payload: int, made: Compressed, recipe: Recipe, loaded: Loaded) -> list[Row]:
    said = size_of(recipe, loaded.anatomy)
    return [Row("packed bytes on disk", payload, "B", f"= {said.linear_bytes:,} of the accounting", payload == said.linear_bytes, "tensors of all layer files"),
            Row("bytes of the whole model", made.bytes, "B", f"= {said.bytes:,} of the accounting", made.bytes == said.bytes, "embedding dense")]  # fmt: skip


def _payload_bytes(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def decode(quick: bool) -> list[Row]:
    """Tokens a second of 4-bit linears with an int8 head against dense bfloat16 in the same loop, and against `transformers.generate`."""
    _ready()
    rows = {row["side"]: row for row in decode_table(MODEL, quick, widths=(4,))["rows"]}
    rates = {side: row["decode_tokens_per_s"] for side, row in rows.items()}
    conditions = rows["4-bit"]["conditions"]
    noisy = f"; others used {conditions['other_cores']} cores" + "".join(f"; noisy: {reason}" for reason in conditions["noisy"])
    told = f"{', '.join(f'{side} {rate:.1f}' for side, rate in rates.items())} tokens/s, prompt {conditions['prompt']}, new {conditions['new']}, {_machine()}"
    bounds = {TRANSFORMERS: DECODE_OVER_TRANSFORMERS, DENSE: DECODE_OVER_DENSE}
    ratios = {side: rates["4-bit"] / rates[side] for side in bounds}
    return [Row(f"4-bit decode over {side} bfloat16", ratios[side], "x", f">= {bounds[side]:g}", ratios[side] >= bounds[side], told + noisy) for side in bounds]


def app(quick: bool) -> list[Row]:
    """Seconds from starting the app to its first usable page, and the page's rerun after a slider is let go."""
    if not APP_SCRIPT.exists():
        return []
    shown = subprocess.run([sys.executable, str(APP_SCRIPT), *(["--quick"] if quick else [])], capture_output=True, text=True, timeout=600)
    if shown.returncode:
        raise RuntimeError(f"{APP_SCRIPT.name} failed: {shown.stderr[-2000:]}")
    return [Row(**row) for row in json.loads(shown.stdout)]


def _machine() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


PARTS: dict[str, Callable[[bool], list[Row]]] = {"quality": quality, "decode": decode, "app": app}


def _in_own_process(part: str, quick: bool) -> list[Row]:
    command = [sys.executable, "-m", "bitpress.engine.bench", "--part", part, *(["--quick"] if quick else [])]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [Row(**row) for row in json.loads(shown)["rows"]]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("", "found", "bound", "conditions")]
    lines += [("kept" if row.kept else "MISSED", f"{row.name}: {row.value:,.4g} {row.unit}".rstrip(), row.bound, row.conditions) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in lines)


def main() -> int:
    """Run the parts asked for; 1 when a promise is missed."""
    parser = argparse.ArgumentParser(prog="python -m bitpress.engine.bench", description="Measure what Bitpress promises on SmolLM2-135M.")
    parser.add_argument("--quick", action="store_true", help="8 windows of 256 instead of 16 of 2,048")
    parser.add_argument("--part", choices=PARTS, help="one part, in this process")
    asked = parser.parse_args()
    rows = PARTS[asked.part](asked.quick) if asked.part else [row for part in PARTS for row in _in_own_process(part, asked.quick)]
    if not asked.part:
        print(table(rows), file=sys.stderr)
    print(json.dumps({"machine": {**machine.describe(), "threads": torch.get_num_threads(), "torch": torch.__version__},
                      "rows": [asdict(row) for row in rows]}, indent=1))  # fmt: skip
    return 0 if asked.part or all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
