"""A home folder written by hand: a small story model on record, and runs in every state. No torch, no worker, no network."""

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import Recipe
from bitpress.engine.recipe_presets import find_preset, for_model
from bitpress.engine.runs.jobs import compress_digest
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Run, Store

ROOT = Path(__file__).resolve().parents[2]
MLP = ("gate", "up", "down")


def llama_anatomy(model: str = "tiny-stories", blocks: int = 6, width: int = 192, ffn: int = 512, vocab: int = 2048, kv: int | None = None) -> Anatomy:
    """A Llama's anatomy with heads of 64; `kv` is the width of keys and values."""
    inner = kv or width
    shapes = {
        "q": (width, width),
        "k": (inner, width),
        "v": (inner, width),
        "o": (width, width),
        "gate": (ffn, width),
        "up": (ffn, width),
        "down": (width, ffn),
    }
    linears = tuple(
        Part(name=f"model.layers.{block}.{'mlp' if role in MLP else 'self_attn'}.{role}_proj", role=role, block=block, out_features=rows, in_features=columns)
        for block in range(blocks)
        for role, (rows, columns) in shapes.items()
    )
    embedding = Part(name="model.embed_tokens", role="embedding", out_features=vocab, in_features=width)
    params = sum(part.numel for part in linears) + embedding.numel + width * (2 * blocks + 1)
    return Anatomy(
        model=model, architecture="LlamaForCausalLM", fingerprint="f" * 64, blocks=blocks, hidden=width, ffn=ffn, heads=width // 64,
        kv_heads=inner // 64, head_dim=64,
        vocab=vocab, context=256, tied=True, params=params, bytes=2 * params, block_rest_params=2 * width, linears=linears, embedding=embedding,
    )  # fmt: skip


def stats_record(part: Part) -> dict[str, Any]:
    """What an inspection writes of one layer, of a normal distribution."""
    edges = [-0.3 + 0.6 * i / 65 for i in range(66)]
    counts = [round(1000 * math.exp(-((low + 0.6 / 130) ** 2) / (2 * 0.06**2))) for low in edges[:-1]]
    spectrum = {"index": [1, 64, 128, 192], "value": [1.0, 0.5, 0.25, 0.05], "energy": [0.1, 0.7, 0.95, 1.0]}
    errors = {str(bits): 0.6 / 2**bits for bits in (2, 3, 4, 5, 6, 8)}
    place = {"v": 1, "layer": part.name, "role": part.role, "block": part.block, "shape": [part.out_features, part.in_features]}
    return {**place, "min": -0.3, "max": 0.28, "mean": 0.0, "std": 0.06, "kurtosis": 3.1, "outlier_share": 0.0, "histogram": {"edges": edges, "counts": counts},
            "spectrum": spectrum, "error_by_bits": errors}  # fmt: skip


def tokens(words: str, start: float, shift: float = 0.0) -> list[dict[str, Any]]:
    """Token records of a sentence."""
    return [
        {
            "id": index,
            "text": (" " if index else "") + word,
            "logprob": -start - shift * index,
            "rank": index % 3,
            "top": [[" " + word, 0.6], [" it", 0.2]],
            "kl": shift * index,
        }
        for index, word in enumerate(words.split())
    ]


def metrics(anatomy: Anatomy, perplexity: float, stored: int, speed: float, protocol: str = "tinystories") -> dict[str, Any]:
    """A metrics record of one side."""
    shared = {"text": protocol, "part": "evaluation", "window": 256, "windows": 8, "dtype": "float32", "device": "cpu", "threads": 2}
    return {
        "perplexity": perplexity, "perplexity_low": perplexity * 0.9, "perplexity_high": perplexity * 1.1, "nll_mean": math.log(perplexity),
        "kl_mean": 0.021, "kl_p99": 0.31,
        "same_top1": 0.93, "bytes": stored, "bits_per_weight_linears": 4.3, "bits_per_weight_model": 8 * stored / anatomy.params,
        "decode_tokens_per_s": speed, "ttft_s": 0.012,
        "tpot_p50_s": 1 / speed, "kernels": {"int4": 42}, "protocol": shared,
    }  # fmt: skip


def write_run(home: Path, recipe: Recipe, anatomy: Anatomy, state: str = "finished", layers: int | None = None, windows: int = 8) -> Run:
    """A compress run in any state: `layers` finished layers, `windows` scored windows, metrics and samples where it is finished."""
    run = Store(home).create("compress", {"model": recipe.model}, recipe, digest=compress_digest(recipe))
    rng = random.Random(7)
    with run.writer() as events:
        events.write("started", {"model": recipe.model})
        events.write("stage_started", {"stage": "compress", "total": len(anatomy.linears)})
        for count, part in enumerate(anatomy.linears[:layers], start=1):
            events.write("layer_done", {"layer": part.name, "method": "rtn", "error": 0.05 + 0.05 * rng.random(), "bytes": part.numel // 2, "seconds": 0.01})
            events.write("progress", {"done": count, "total": len(anatomy.linears), "eta_s": 0.05 * (len(anatomy.linears) - count), "phase": "compress"})
        if layers is None:
            events.write("stage_started", {"stage": "perplexity", "total": 8})
            for index in range(windows):
                nll = 1.6 + 0.2 * rng.random()
                events.write(
                    "window",
                    {"index": index, "nll_dense": nll, "nll": nll + 0.1, "ratio": 1.1, "low": 1.1 - 0.3 / (index + 2), "high": 1.1 + 0.3 / (index + 2)},
                )
                events.write("progress", {"done": index + 1, "total": 8, "phase": "perplexity"})
        events.write("resources", {"rss": 780 << 20, "cpu": 190.0})
        if state == "finished":
            finish(run, anatomy)
        events.write(state if state in ("finished", "failed", "cancelled", "interrupted") else "note", {"level": "info", "text": "at work"})
    set_state(run, state)
    return run


def finish(run: Run, anatomy: Anatomy) -> None:
    """Metrics and samples of a finished run."""
    sides = {"dense": metrics(anatomy, 5.4, anatomy.bytes, 310.0), "compressed": metrics(anatomy, 5.9, anatomy.bytes // 3, 520.0)}
    (run.path / "metrics.json").write_text(json.dumps({"run": run.id, "digest": run.status().digest, "metrics": sides}))
    dense = "there was a little bear who lived in a small house near the river and he liked to play"
    other = "there was a little bear who lived in a big tree near the river and she liked to sing"
    lines = [
        {"prompt": "Once upon a time", "side": side, "tokens": tokens(text, 0.4, 0.03 * (side == "compressed")), "tokens_per_s": 300.0}
        for side, text in (("dense", dense), ("compressed", other))
    ]
    (run.path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_state(run: Run, state: str) -> None:
    """Put a run into a state, as its worker or the pump would; one at work is given to a host that is not here, so that no pump ends it."""
    now = time.time()
    error = {"what": "The disk is full.", "why": "Writing layer 12 failed.", "remedy": "Free 40 MB and resume."} if state == "failed" else None
    fields = {
        "state": state,
        "started": now - 20,
        "heartbeat": now,
        "host": "elsewhere",
        "error": error,
        "ended": None if state in ("running", "cancelling", "queued") else now,
    }
    change_status(run.path, lambda _: fields)


def write_model(home: Path, anatomy: Anatomy) -> None:
    """What an inspection of the model leaves in the home folder."""
    folder = home / "models" / anatomy.model
    (folder / "stats").mkdir(parents=True)
    anatomy.save(folder / "anatomy.json")
    for part in anatomy.linears:
        (folder / "stats" / f"{part.name}.json").write_text(json.dumps(stats_record(part)))


@pytest.fixture
def anatomy() -> Anatomy:
    """The story model's anatomy: 6 blocks, 42 linears."""
    return llama_anatomy()


@pytest.fixture
def smol_anatomy() -> Anatomy:
    """The shapes of SmolLM2-135M: 30 blocks, 210 linears."""
    return llama_anatomy("smollm2-135m", 30, 576, 1536, 49152, 192)


@pytest.fixture
def app_home(bitpress_home: Path, anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home in which the tiny model is ready and inspected, and nothing was run. Nothing is fetched."""
    assets = tmp_path / "assets"
    (assets / "tiny").mkdir(parents=True)
    (assets / "tiny" / "config.json").write_text("{}")
    (assets / "tiny" / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(library, "assets_dir", lambda: assets)
    monkeypatch.setenv("BITPRESS_FETCH", "0")
    write_model(bitpress_home, anatomy)
    return bitpress_home


@pytest.fixture
def make_run(app_home: Path, anatomy: Anatomy) -> Callable[..., Run]:
    """`make_run(recipe, state="finished", layers=None)` -> a run in the home folder."""
    return lambda recipe, **more: write_run(app_home, recipe, anatomy, **more)


@pytest.fixture
def preset_recipe() -> Callable[[str], Recipe]:
    """A preset made out to the tiny model."""
    return lambda preset: for_model(find_preset(preset), "tiny-stories")


@pytest.fixture
def app_root() -> Path:
    """The folder of the screens."""
    return ROOT / "app"
