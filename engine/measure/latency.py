"""Time to first token, time per output token, and the two rates. Knows decoders by three calls; not what is inside them.

Definitions: TTFT is a prefill of the whole prompt up to its greedy next token; TPOT is one decode step including the
choice of the token, first token excluded; rates are tokens over those times. All sides are timed in turn in one process
(A B A B ...), so that a drift of the clock hits all. Greedy, no stop token, and a static KV cache where the loop is ours:
a side with a loop of its own, such as `transformers.generate`, is a `Teller`.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bitpress.engine.errors import Cancelled
from bitpress.engine.measure.quiet import Noise, quiet_machine

WARM_UP_STEPS = 8
MIN_ROUNDS = 3
SPREAD = 1.5  # p50 over p10 of a step above this: something else had the cores


class Decoder(Protocol):
    """What is timed: `prefill` starts anew on a prompt, `step` adds one token; both return the next token's logits [V]."""

    def prefill(self, ids: Tensor, /) -> Tensor: ...

    def step(self, token_id: int, /) -> Tensor: ...


@runtime_checkable
class Teller(Protocol):
    """What is timed where the loop is not ours: `tell` writes `new` tokens after a prompt and calls `on_token` as each is there."""

    def tell(self, prompt_T: Tensor, new: int, on_token: Callable[[], object], /) -> None: ...


@dataclass(frozen=True)
class Plan:
    """Batch 1 always. Rounds end after `rounds`, or after `seconds` a side when at least 3 are done."""

    prompt: int = 128
    new: int = 64
    warm_up: int = 3
    rounds: int = 10
    seconds: float = 5.0

    def fitted(self, context: int) -> "Plan":
        """This plan, shortened where prompt and new tokens would not fit a model's context."""
        prompt = min(self.prompt, context // 2)
        return Plan(prompt, min(self.new, context - prompt), self.warm_up, self.rounds, self.seconds)


@dataclass(frozen=True)
class Latency:
    """Medians of one side, in seconds and tokens a second, the conditions they were taken under, and where a token's time goes where that is known."""

    ttft_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    conditions: dict[str, Any]
    parts: dict[str, Any] | None = None


def measure_latency(sides: Mapping[str, Decoder | Teller], prompt_T: Tensor, plan: Plan, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Latency]:
    """Time every side on the same prompt.

    prompt_T: `plan.prompt` token ids. Returns one Latency a side. Raises Cancelled between two rounds.
    """
    ttfts: dict[str, list[float]] = {side: [] for side in sides}
    steps: dict[str, list[list[float]]] = {side: [] for side in sides}
    with torch.inference_mode(), quiet_machine(torch.get_num_threads()) as noise:
        for _ in range(plan.warm_up):
            for decoder in sides.values():
                _once(decoder, prompt_T, min(plan.new, WARM_UP_STEPS))
        began = time.perf_counter()
        while not _enough(len(ttfts[next(iter(sides))]), time.perf_counter() - began, plan, len(sides)):
            if should_stop():
                raise Cancelled()
            for side, decoder in sides.items():
                ttft, tpots = _once(decoder, prompt_T, plan.new)
                ttfts[side].append(ttft)
                steps[side].append(tpots)
    return {side: _summary(ttfts[side], steps[side], plan, noise) for side in sides}


def _enough(rounds: int, seconds: float, plan: Plan, sides: int) -> bool:
    return rounds >= plan.rounds or (rounds >= MIN_ROUNDS and seconds >= plan.seconds * sides)


def _once(side: Decoder | Teller, prompt_T: Tensor, new: int) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each of the new - 1 steps after it."""
    ends: list[float] = []
    began = time.perf_counter()
    write = side.tell if isinstance(side, Teller) else functools.partial(_write, side)
    write(prompt_T, new, lambda: ends.append(time.perf_counter()))
    return ends[0] - began, [after - before for before, after in itertools.pairwise(ends)]


def _write(decoder: Decoder, prompt_T: Tensor, new: int, on_token: Callable[[], object]) -> None:
    """The greedy loop. Reading the token waits for a GPU to finish."""
    token = int(decoder.prefill(prompt_T).argmax())
    on_token()
    for _ in range(new - 1):
        token = int(decoder.step(token).argmax())
        on_token()


def _summary(ttfts: list[float], steps: list[list[float]], plan: Plan, noise: Noise) -> Latency:
    """The decode rate is the median over rounds of a whole round's rate: unlike 1 / p50 it includes the slow steps."""
    pooled = sorted(step for tpots in steps for step in tpots)
    p10, p50, p95 = (_quantile(pooled, q) for q in (0.10, 0.50, 0.95))
    reasons = [*noise.reasons, *([f"half of the steps took over {p50 / p10:.1f} times the fastest tenth"] if p50 > SPREAD * p10 else [])]
    conditions = {
        "batch": 1,
        "prompt": plan.prompt,
        "new": plan.new,
        "warm_up": plan.warm_up,
        "rounds": len(ttfts),
        "threads": torch.get_num_threads(),
        "load_average": round(noise.load_average, 2),
        "other_cores": round(noise.other_cores, 2),
        "noisy": reasons,
    }
    ttft = statistics.median(ttfts)
    rate = statistics.median(len(tpots) / sum(tpots) for tpots in steps)
    return Latency(ttft, p50, p95, plan.prompt / ttft, rate, conditions)


def _quantile(ordered: list[float], q: float) -> float:
    """The value that a share q of the ordered values does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
