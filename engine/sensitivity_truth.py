"""What one change really does: KL divergence of the whole model's predictions with one layer changed. Knows blocks and weights; no options.

The hidden states that enter every block are kept, so a change in block b runs blocks b to the end only (half of them on the
mean) and the head. Everything is the arithmetic of a plain forward in the same type, so the result is that of a plain forward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitpress.engine.calibrate import computing_in, enter
from bitpress.engine.measure.logits import scorer_of, slices
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import compute_dtype
from bitpress.engine.model.surgery import get


class Prefixes:
    """A model on one text: the states that enter each block under the weights it has now, and what it predicts.

    ids_SL: int64 [S, L]. Weights are cast to the type to compute in while `open` lasts; memory: states of all blocks, and the
    logits of the reference in that type.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, ids_SL: Tensor, batch: int = 8) -> None:
        self.model, self.anatomy = model, anatomy
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(self.device.type)
        self.ids = [part.to(self.device) for part in ids_SL.split(batch)]
        self.blocks = list(get(model, anatomy.block_prefix).children())

    @contextmanager
    def open(self) -> Iterator["Prefixes"]:
        """Compute in the fast type; the model's own weights are put back at the end."""
        with torch.inference_mode(), computing_in(self.model.parameters(), self.dtype):
            self.scorer = scorer_of(self.model)
            yield self

    def take(self) -> None:
        """Keep the states under the weights of now; `first` [batches] enter block 0."""
        hidden, self.calls = enter(self.model, self.anatomy, self.blocks, self.ids, self.dtype)
        self.states: list[list[Tensor]] = [hidden]
        for index in range(len(self.blocks)):
            self.states.append([self.through(index, x_BLd) for x_BLd in self.states[-1]])

    def refer(self) -> None:
        """Let what the model predicts now be what later predictions are compared with."""
        self.dense: list[list[Tensor]] = []
        self.log_sums: list[list[Tensor]] = []
        for ids_BL, x_BLd in zip(self.ids, self.states[-1], strict=True):
            logits = [part.to(self.dtype) for part in self.logits(ids_BL, x_BLd)]
            self.dense.append(logits)
            self.log_sums.append([part.float().logsumexp(-1) for part in logits])

    def through(self, index: int, x_BLd: Tensor) -> Tensor:
        """A batch of states through one block."""
        call = self.calls[index][len(x_BLd)]
        output = self.blocks[index](x_BLd, *call.args, **call.kwargs)
        self.rest = () if isinstance(output, Tensor) else output[1:]  # what a block hands on beside the states
        self.in_tuple = not isinstance(output, Tensor)
        return output[0] if self.in_tuple else output

    def kl_from(self, block: int) -> float:
        """Mean KL divergence a token, in nats, of the reference from the model as it is now, if nothing before `block` has changed."""
        total, count = 0.0, 0
        for number, ids_BL in enumerate(self.ids):
            x_BLd = self.states[block][number]
            for index in range(block, len(self.blocks)):
                x_BLd = self.through(index, x_BLd)
            total += self._divergence(number, self.logits(ids_BL, x_BLd))
            count += ids_BL.numel()
        return max(0.0, total / count)

    def _divergence(self, number: int, slices_PV: Iterator[Tensor]) -> float:
        """Sum over the positions of a batch."""
        known = zip(self.dense[number], self.log_sums[number], slices_PV, strict=True)
        return sum(_kl_sum(dense_PV, log_sum_P, other_PV.to(self.dtype)) for dense_PV, log_sum_P, other_PV in known)

    def kl_plain(self) -> float:
        """The same by plain forwards of the whole model, whatever has changed."""
        total, count = 0.0, 0
        for number, ids_BL in enumerate(self.ids):
            hidden_PD = self.scorer.hidden(ids_BL).flatten(0, 1)
            total += self._divergence(number, (self.scorer.logits(hidden_PD[part]) for part in slices(len(hidden_PD), self.scorer.vocab)))
            count += ids_BL.numel()
        return max(0.0, total / count)

    def kl_without_block(self, block: int) -> float:
        """The same with a block left out: its input is its output."""
        kept, self.states[block + 1] = self.states[block + 1], self.states[block]
        try:
            return self.kl_from(block + 1)
        finally:
            self.states[block + 1] = kept

    def logits(self, ids_BL: Tensor, x_BLd: Tensor) -> Iterator[Tensor]:
        """Logits of all positions, a slice at a time: the model's own forward with every block stood in for, the last one by these states."""
        with self._standing_in((x_BLd, *self.rest) if self.in_tuple else x_BLd):
            hidden_PD = self.scorer.hidden(ids_BL).flatten(0, 1)
        return (self.scorer.logits(hidden_PD[part]) for part in slices(len(hidden_PD), self.scorer.vocab))

    @contextmanager
    def _standing_in(self, output: Any) -> Iterator[None]:
        """Every block gives this output, whatever enters it."""
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for block in self.blocks:
                block.forward = lambda *_, **__: output
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


def _kl_sum(dense_PV: Tensor, log_sum_P: Tensor, other_PV: Tensor) -> float:
    """sum_P sum_V p (log p - log q), p = softmax(dense); float32 inside, float64 over positions."""
    other_PV = other_PV.float()
    shift_P = other_PV.logsumexp(-1) - log_sum_P
    dense_PV = dense_PV.float()
    gap_P = (dense_PV - log_sum_P[:, None]).exp_().mul_(dense_PV - other_PV).sum(-1)
    return float((gap_P + shift_P).double().sum())


@contextmanager
def changed(module: nn.Module, weight_NK: Tensor) -> Iterator[None]:
    """Another weight in a linear or embedding for a while, and in whatever is tied to it."""
    with all_changed({module: weight_NK}):
        yield


@contextmanager
def all_changed(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Other weights [N, K] in many modules for a while, each in the type and orientation in which its module stores it."""
    parameters: list[nn.Parameter] = [module.weight for module in weights]  # type: ignore[misc]
    kept = [(parameter, parameter.data) for parameter in parameters]
    try:
        for (module, weight_NK), (parameter, old) in zip(weights.items(), kept, strict=True):
            stored = weight_NK.t() if isinstance(module, Conv1D) else weight_NK
            parameter.data = stored.to(device=old.device, dtype=old.dtype).contiguous()
        yield
    finally:
        for parameter, old in kept:
            parameter.data = old
