"""Perplexity and divergence on windows of tokens, for one model or for two on the same windows. Knows no text and no files.

NLL: mean over windows of the mean negative log-likelihood of each window's T - 1 predicted tokens (METHODS 0.2); the
perplexity is its exponential. KL: sum_v p(v) (log p(v) - log q(v)) with p the dense model, per position, in nats.
Both models go through the same functions; log-softmax is in float32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.measure.interval import Interval, safe_exp, settled, t_interval
from bitpress.engine.measure.logits import Scorer, scorer_of, slices
from bitpress.kernels.compare import compare, losses

FORWARD_TOKENS = 2048  # short windows share a forward up to this many tokens


@dataclass(frozen=True)
class Window:
    """What one window said, and the ratio of perplexities over all windows so far. Of one model alone: `nll_dense` only."""

    index: int
    nll_dense: float
    nll: float | None = None
    ratio: Interval | None = None


@dataclass
class Quality:
    """Per-window NLL in nats per token, of the dense model and of the other; per-position divergence between them."""

    asked: int
    nll_dense: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl_P: list[Tensor] = field(default_factory=list)
    same_P: list[Tensor] = field(default_factory=list)

    @property
    def windows(self) -> int:
        """Windows measured; fewer than `asked` when the run stopped early."""
        return len(self.nll_dense)

    @property
    def log_ratios(self) -> list[float]:
        """Per window: NLL of the other model minus that of the dense one."""
        return [other - dense for dense, other in zip(self.nll_dense, self.nll, strict=True)]

    def ratio(self) -> Interval | None:
        """Perplexity of the other model over that of the dense one, with the paired 95% interval; None under two windows."""
        interval = t_interval(self.log_ratios)
        return interval.exp() if interval else None

    def kl(self) -> tuple[float, float]:
        """Mean and 99th percentile over all positions, in nats."""
        kl_P = torch.cat(self.kl_P).double()
        # torch.quantile takes at most 16 million numbers; a sort takes any.
        rank = math.ceil(0.99 * len(kl_P)) - 1
        return float(kl_P.mean()), float(kl_P.sort().values[rank])

    def same_top1(self) -> float:
        """Share of positions where both models think the same token most likely."""
        return float(torch.cat(self.same_P).double().mean())


def perplexity(nll: list[float]) -> float:
    """exp of the mean over windows; infinite where float64 ends."""
    return safe_exp(fmean(nll))


def measure_pair(
    dense: nn.Module,
    other: nn.Module,
    ids_NT: Tensor,
    on_window: Callable[[Window], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    early_stop: bool = True,
) -> Quality:
    """Both models on the same windows.

    ids_NT: N windows of T tokens. early_stop: stop once the ratio is settled, after 8 windows at the earliest.
    Raises Cancelled when `should_stop` says so between two forwards, InputError for windows that predict nothing.
    """
    score = _pair(scorer_of(dense), scorer_of(other))
    quality = Quality(asked=len(ids_NT))
    for ids_BT in _batches(ids_NT, should_stop):
        nll_dense_BP, nll_BP, kl_BP, same_BP = score(ids_BT)
        for row in range(len(ids_BT)):
            quality.nll_dense.append(float(nll_dense_BP[row].double().mean()))
            quality.nll.append(float(nll_BP[row].double().mean()))
            quality.kl_P.append(kl_BP[row])
            quality.same_P.append(same_BP[row])
            on_window(Window(quality.windows - 1, quality.nll_dense[-1], quality.nll[-1], quality.ratio()))
        if early_stop and settled(quality.log_ratios):
            break
    return quality


def measure_alone(
    model: nn.Module, ids_NT: Tensor, on_window: Callable[[Window], None] = lambda _: None, should_stop: Callable[[], bool] = lambda: False
) -> Quality:
    """One model on N windows of T tokens, through the functions that a pair goes through. Raises as `measure_pair`."""
    scorer = scorer_of(model)
    quality = Quality(asked=len(ids_NT))
    for ids_BT in _batches(ids_NT, should_stop):
        for nll_P in nll_of(scorer, ids_BT):
            quality.nll_dense.append(float(nll_P.double().mean()))
            on_window(Window(quality.windows - 1, quality.nll_dense[-1]))
    return quality


@torch.inference_mode()
def nll_of(scorer: Scorer, ids_BT: Tensor) -> Tensor:
    """NLL of every predicted token, [B, T - 1], on the CPU."""
    hidden_PD, targets_P = _predicting(scorer, ids_BT)
    nll_P = [losses(scorer.logits(hidden_PD[part]), targets_P[part]) for part in slices(len(targets_P), scorer.vocab)]
    return torch.cat(nll_P).view(len(ids_BT), -1).cpu()


def _pair(dense: Scorer, other: Scorer) -> Callable[[Tensor], tuple[Tensor, ...]]:
    @torch.inference_mode()
    def score(ids_BT: Tensor) -> tuple[Tensor, ...]:
        """NLL of dense and other, KL and same-top-1, each [B, T - 1] on the CPU."""
        hidden_PD, targets_P = _predicting(dense, ids_BT)
        other_PD, _ = _predicting(other, ids_BT)
        parts = [compare(dense.logits(hidden_PD[part]), other.logits(other_PD[part]), targets_P[part]) for part in slices(len(targets_P), dense.vocab)]
        return tuple(torch.cat(column).view(len(ids_BT), -1).cpu() for column in zip(*parts, strict=True))

    return score


def _predicting(scorer: Scorer, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the positions that predict, [B * (T - 1), d], and the tokens they should predict."""
    ids_BT = ids_BT.to(scorer.device)
    hidden_BTD = scorer.hidden(ids_BT)
    return hidden_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()


def _batches(ids_NT: Tensor, should_stop: Callable[[], bool]) -> Iterator[Tensor]:
    if ids_NT.ndim != 2 or len(ids_NT) == 0 or ids_NT.shape[1] < 2:
        raise InputError(
            "There is nothing to measure on.",
            f"The windows have the shape {tuple(ids_NT.shape)}; at least one window of 2 tokens is needed.",
            "Give a longer text or a smaller window.",
        )
    for ids_BT in ids_NT.split(max(1, FORWARD_TOKENS // ids_NT.shape[1])):
        if should_stop():
            raise Cancelled()
        yield ids_BT
