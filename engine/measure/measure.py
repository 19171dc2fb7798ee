"""The one entry: measure a model, or a dense model and its compressed twin side by side. Knows the order of things; no formulas.

Quality first (it needs a whole window's activations), then latency (it needs a quiet machine and decoders). Both models go
through the same calls. What is found is told as events while it is found, and returned as {"dense": M, "compressed": M}.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitpress.engine import accounting
from bitpress.engine.data.texts import TextSample, load_text, resolve_text
from bitpress.engine.data.tokens import token_windows, tokenizer_digest
from bitpress.engine.decode import Decoder
from bitpress.engine.measure import report
from bitpress.engine.measure.latency import Latency, Plan, measure_latency
from bitpress.engine.measure.logits import CACHE_PIECE
from bitpress.engine.measure.memory import kernels_of, peak_bytes, weights_of
from bitpress.engine.measure.perplexity import Quality, Window, measure_alone, measure_pair
from bitpress.engine.measure.protocol import Protocol as TextProtocol
from bitpress.engine.measure.protocol import tier_named, window_for
from bitpress.engine.measure.report import Metrics
from bitpress.engine.measure.token_parts import read_rate, token_parts
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Measure, Recipe

Emit = Callable[[str, dict[str, Any]], object]


class ModelFacts(Protocol):
    """What is asked of a model's library entry."""

    @property
    def default_text(self) -> str: ...

    @property
    def needs_bos(self) -> bool: ...


@dataclass(frozen=True)
class Windows:
    """Token windows to measure on, with the protocol they make."""

    ids_NT: Tensor
    protocol: TextProtocol


def measure(
    dense: Loaded,
    entry: ModelFacts,
    asked: Measure,
    compressed: nn.Module | None = None,
    recipe: Recipe | None = None,
    emit: Emit = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
    early_stop: bool = False,
) -> dict[str, Metrics]:
    """Measure what is asked for.

    dense: the model with its original weights, in the type to compute in. compressed: its twin, with the recipe that made
    it. asked: tier, text and whether to time. early_stop: for live runs; a `full` tier never stops early.
    Emits `progress` and one `window` a window, then `metrics`. Returns M a side, as `report` describes. Raises InputError
    for a text that does not suit, Cancelled when told to stop.
    """
    windows = windows_for(dense, entry, asked)
    quality = _quality(dense.model, compressed, windows, emit, should_stop, early_stop and asked.tier != "full")
    latency = _latency(dense, compressed, windows.ids_NT, emit, should_stop) if asked.latency else {}
    sides: dict[str, tuple[nn.Module, Recipe | None]] = {"dense": (dense.model, None)}
    if compressed is not None:
        sides["compressed"] = (compressed, recipe)
    found = {side: _figures(side, model, plan, dense, windows, quality, latency.get(side)) for side, (model, plan) in sides.items()}
    emit("metrics", found)
    return found


def windows_for(dense: Loaded, entry: ModelFacts, asked: Measure) -> Windows:
    """The tier's windows of the text that is asked for, cut to the model's context, and their protocol."""
    text, part = resolve_text(asked.text, entry, "evaluation")
    sample = load_text(text, part)
    window = window_for(asked.tier, dense.anatomy.context)
    ids_NT = token_windows(dense.tokenizer, sample, window, tier_named(asked.tier).windows, needs_bos=entry.needs_bos)
    return Windows(ids_NT, _protocol(dense, entry, sample, ids_NT, tier_named(asked.tier).window))


def _protocol(dense: Loaded, entry: ModelFacts, sample: TextSample, ids_NT: Tensor, asked_window: int) -> TextProtocol:
    weight = next(dense.model.parameters())
    count, window = ids_NT.shape
    return TextProtocol(
        text=sample.id,
        sha256=sample.sha256,
        part=sample.part,
        join=sample.join,
        window=window,
        stride=window,
        windows=count,
        tokenizer=f"{dense.anatomy.model} ({tokenizer_digest(dense.tokenizer)[:8]})",
        bos="at each window" if entry.needs_bos else "as the tokenizer puts it, once",
        dtype=str(weight.dtype).removeprefix("torch."),
        device=weight.device.type,
        threads=torch.get_num_threads(),
        asked_window=asked_window,
    )


def _quality(dense: nn.Module, other: nn.Module | None, windows: Windows, emit: Emit, should_stop: Callable[[], bool], early_stop: bool) -> Quality:
    total, began = len(windows.ids_NT), time.monotonic()

    def told(window: Window) -> None:
        done = window.index + 1
        emit("window", _window_event(window))
        emit("progress", {"done": done, "total": total, "eta_s": (time.monotonic() - began) / done * (total - done), "phase": "perplexity"})

    if other is None:
        return measure_alone(dense, windows.ids_NT, told, should_stop)
    return measure_pair(dense, other, windows.ids_NT, told, should_stop, early_stop)


def _window_event(window: Window) -> dict[str, Any]:
    ratio = window.ratio
    bounds = {"ratio": ratio and ratio.mean, "low": ratio and ratio.low, "high": ratio and ratio.high}
    return report.finite_only({"index": window.index, "nll_dense": window.nll_dense, "nll": window.nll, **bounds})


def _latency(dense: Loaded, compressed: nn.Module | None, ids_NT: Tensor, emit: Emit, should_stop: Callable[[], bool]) -> dict[str, Latency]:
    """Both sides in turn, and then where the time of a token goes."""
    emit("stage_started", {"stage": "latency"})
    prompt_T = ids_NT.flatten()
    plan = Plan().fitted(min(dense.anatomy.context, 2 * len(prompt_T)))
    models = {"dense": dense.model} | ({"compressed": compressed} if compressed is not None else {})
    decoders = {side: Decoder(model, dense.tokenizer, plan.prompt + plan.new) for side, model in models.items()}
    found = measure_latency(decoders, prompt_T[: plan.prompt], plan, should_stop)
    rate = read_rate(decoders["dense"].device)
    kv_bytes = dense.anatomy.kv_bytes_per_token * (plan.prompt + plan.new // 2)
    parts = {side: token_parts(decoder, found[side].tpot_p50_s, rate, kv_bytes) for side, decoder in decoders.items()}
    return {side: replace(latency, parts=parts[side], conditions={**latency.conditions, **decoders[side].conditions}) for side, latency in found.items()}


def _figures(side: str, model: nn.Module, recipe: Recipe | None, dense: Loaded, windows: Windows, quality: Quality, latency: Latency | None) -> Metrics:
    """M of one side."""
    anatomy, protocol = dense.anatomy, replace(windows.protocol, windows=quality.windows)
    weights = weights_of(model, anatomy.block_prefix, anatomy.itemsize)
    values: Metrics = {
        **report.text_figures(quality.nll if side == "compressed" else quality.nll_dense),
        **(report.comparison_figures(quality) if side == "compressed" else {}),
        **report.size_figures(weights),
        **(report.latency_figures(latency) if latency else {}),
        "kv_bytes_per_token": round(accounting.cache_bytes(recipe, anatomy, protocol.window) / protocol.window),
        "peak_bytes": peak_bytes(next(model.parameters()).device),
        "flops_per_token": accounting.flops_per_token(recipe, anatomy, context=protocol.window // 2),
        "kernels": kernels_of(model, anatomy.block_prefix),
    }
    return {**report.finite_only(values), "protocol": _conditions(protocol, quality, latency, getattr(model, "kv_scheme", None) is not None)}


def _conditions(protocol: TextProtocol, quality: Quality, latency: Latency | None, cached: bool = False) -> dict[str, Any]:
    """Everything a figure of M holds under; `windows_asked` above `windows` says that the run stopped early, `cached` that text went through a KV cache."""
    rest = {"one_line": protocol.one_line(), "windows_asked": quality.asked, "peak": "the whole process: weights, activations, Python and torch"}
    rest |= {"cache": f"read through the compressed cache in pieces of {CACHE_PIECE} tokens"} if cached else {}
    return {**protocol.to_dict(), **rest, **({"latency": latency.conditions} if latency else {})}
