"""Cache forms side by side: the time of a decode step behind contexts of some lengths, and perplexity through each cache. Knows models; names no method.

Behind a long context the cache is filled with noise: what a step costs does not depend on what is in it. In every round each form takes one
step, so that the moods of the machine are shared out.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitpress.engine.accounting import cache_bytes
from bitpress.engine.compress import compress
from bitpress.engine.decode import Decoder
from bitpress.engine.errors import Cancelled
from bitpress.engine.measure.perplexity import measure_pair, perplexity
from bitpress.engine.measure.quiet import quiet_machine
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe

STEPS = 16
FILLED_AT_ONCE = 512
Emit = Callable[[str, dict[str, Any]], object]


def fill(decoder: Decoder, context: int) -> None:
    """Put noise in the place of so many tokens."""
    loop: Any = decoder._loop
    decoder.reset()
    decoder.extend([1, 2, 3])
    if not hasattr(loop, "sides"):
        loop.cache.normal_()
    for side in (side for pair in getattr(loop, "sides", ()) for side in pair):
        noise_TD = torch.randn(FILLED_AT_ONCE, side.width).to(loop.cache_dtype)
        for start in range(loop.position, context, FILLED_AT_ONCE):
            side.rows.append(noise_TD[: context - start])
    loop.position = context


def step_times(decoders: Mapping[str, Decoder], context: int, steps: int = STEPS) -> dict[str, list[float]]:
    """Milliseconds of each step of each decoder behind `context` tokens, round after round; the first round warms up and is not told."""
    for decoder in decoders.values():
        fill(decoder, context)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(steps + 1):
        for name, decoder in decoders.items():
            began = time.perf_counter()
            decoder.step(5)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: taken[1:] for name, taken in times.items()}


def measure_caches(
    loaded: Loaded, plans: Mapping[str, Recipe], ids_NT: Tensor, contexts: list[int], emit: Emit, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """{forms: {name: {ratio, low, high, perplexity, steps: {context: {ms, p10_ms, bytes}}}}, noise}. Says `progress`. Raises Cancelled when told to stop.

    plans: recipes of nothing but a cache; one without is the dense model. contexts: tokens, room for the steps included.
    """
    made = {name: compress(loaded, plan).model if plan.kv_cache else loaded.model for name, plan in plans.items()}
    found: dict[str, Any] = {name: {"steps": {}} for name in plans}
    total = len(plans) + len(contexts)
    emit("stage_started", {"stage": "measuring caches", "total": total})
    for done, (name, plan) in enumerate(plans.items()):
        _told(should_stop, emit, done, total)
        found[name] |= _quality(loaded, made[name], ids_NT) if plan.kv_cache else {"ratio": 1.0}
    with quiet_machine(torch.get_num_threads()) as noise:
        for done, context in enumerate(contexts, start=len(plans)):
            _told(should_stop, emit, done, total)
            decoders = {name: Decoder(model, None, context) for name, model in made.items()}
            for name, taken in step_times(decoders, context - STEPS - 2).items():
                size = cache_bytes(plans[name], loaded.anatomy, context)
                found[name]["steps"][str(context)] = {"ms": statistics.median(taken), "p10_ms": sorted(taken)[len(taken) // 10], "bytes": size}
    return {"forms": found, "noise": noise.reasons, "windows": list(ids_NT.shape)}


def _quality(loaded: Loaded, model: Any, ids_NT: Tensor) -> dict[str, float]:
    pair = measure_pair(loaded.model, model, ids_NT, early_stop=False)
    ratio = pair.ratio()
    spread = {"ratio": ratio.mean, "low": ratio.low, "high": ratio.high} if ratio else {}
    return {"perplexity": perplexity(pair.nll), "dense": perplexity(pair.nll_dense), **spread}


def _told(should_stop: Callable[[], bool], emit: Emit, done: int, total: int) -> None:
    if should_stop():
        raise Cancelled()
    emit("progress", {"done": done, "total": total})
