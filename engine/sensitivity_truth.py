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
from bitpress.engine.measure.logits import Scorer, scorer_of, slices
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.load import compute_dtype
from bitpress.engine.model.surgery import get
from bitpress.kernels.compare import compare, losses


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
        self._scorer: Scorer | None = None

    @contextmanager
    def open(self) -> Iterator["Prefixes"]:
        """Compute in the fast type; the model's own weights are put back at the end."""
        with torch.inference_mode(), computing_in(self.model.parameters(), self.dtype):
            self._scorer = self._scorer or scorer_of(self.model)
            yield self

    @property
    def scorer(self) -> Scorer:
        """Head and backbone apart. Raises RuntimeError before `open`."""
        if self._scorer is None:
            raise RuntimeError("the prefixes were not opened")
        return self._scorer

    def take(self) -> None:
        """Keep the states under the weights of now; `first` [batches] enter block 0."""
        hidden, self.calls = enter(self.model, self.anatomy, self.blocks, self.ids, self.dtype)
        self.states: list[list[Tensor]] = [hidden]
        for index in range(len(self.blocks)):
            self.states.append([self.through(index, x_BLd) for x_BLd in self.states[-1]])

    def refer(self) -> None:
        """Let what the model predicts now be what later predictions are compared with."""
        self.dense = [list(self.logits(ids_BL, x_BLd)) for ids_BL, x_BLd in zip(self.ids, self.states[-1], strict=True)]

    def through(self, index: int, x_BLd: Tensor) -> Tensor:
        """A batch of states through one block."""
        call = self.calls[index][len(x_BLd)]
        output = self.blocks[index](x_BLd, *call.args, **call.kwargs)
        self.rest = () if isinstance(output, Tensor) else output[1:]  # what a block hands on beside the states
        self.in_tuple = not isinstance(output, Tensor)
        return output[0] if self.in_tuple else output

    def kl_from(self, block: int) -> float:
        """Mean KL divergence a token, in nats, of the reference from the model as it is now, if nothing before `block` has changed."""
        total = sum(self._divergence(number, slices_PV) for number, slices_PV in enumerate(self._from(block)))
        return max(0.0, total / sum(ids_BL.numel() for ids_BL in self.ids))

    def loss_from(self, block: int) -> float:
        """Mean loss of a token that is predicted, in nats, of the model as it is now, if nothing before `block` has changed since `take`."""
        total = 0.0
        for ids_BL, slices_PV in zip(self.ids, self._from(block), strict=True):
            wanted = (ids_BL.roll(-1, 1).flatten()[part] for part in slices(ids_BL.numel(), self.scorer.vocab))
            nll_P = torch.cat([losses(logits_PV, wanted_P) for logits_PV, wanted_P in zip(slices_PV, wanted, strict=True)])
            total += float(nll_P.view(ids_BL.shape)[:, :-1].double().sum())  # behind the last one of a sequence there is nothing to predict
        return total / sum(ids_BL[:, 1:].numel() for ids_BL in self.ids)

    def _from(self, block: int) -> Iterator[Iterator[Tensor]]:
        """The logits of each batch in slices, from the states that enter `block`; they are not kept."""
        for ids_BL, x_BLd in zip(self.ids, self.states[block], strict=True):
            for index in range(block, len(self.blocks)):
                x_BLd = self.through(index, x_BLd)
            yield self.logits(ids_BL, x_BLd)

    def _divergence(self, number: int, slices_PV: Iterator[Tensor]) -> float:
        """Sum over the positions of a batch."""
        nothing_P = self.ids[number].flatten()  # only the divergence is read, which knows no targets
        return sum(float(kl_P.double().sum()) for _, _, kl_P, _ in self.compared(number, slices_PV, nothing_P))

    def compared(self, number: int, slices_PV: Iterator[Tensor], targets_P: Tensor, reverse: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`compare` of the reference and a batch's slices of logits, a slice at a time; with `reverse` of the slices and the reference."""
        step = len(self.dense[number][0])
        for dense_PV, other_PV, wanted_P in zip(self.dense[number], slices_PV, targets_P.split(step), strict=True):
            yield compare(other_PV, dense_PV, wanted_P) if reverse else compare(dense_PV, other_PV, wanted_P)

    def kl_plain(self) -> float:
        """The same by plain forwards of the whole model, whatever has changed."""
        total, count = 0.0, 0
        for number, ids_BL in enumerate(self.ids):
            hidden_PD = self.scorer.hidden(ids_BL).flatten(0, 1)
            total += self._divergence(number, (self.scorer.logits(hidden_PD[part]) for part in slices(len(hidden_PD), self.scorer.vocab)))
            count += ids_BL.numel()
        return max(0.0, total / count)

    def enter_again(self, number: int) -> None:
        """Take the states that enter block 0 anew for one batch: the embedding has changed."""
        hidden, _ = enter(self.model, self.anatomy, self.blocks, [self.ids[number]], self.dtype)
        self.states[0][number] = hidden[0]

    def advance(self, number: int, block: int) -> None:
        """Run a batch through one block and keep the states behind it, so that a change above it starts from them."""
        self.states[block + 1][number] = self.through(block, self.states[block][number])

    def score(self, number: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each window of a batch: NLL of the reference and of the model as it is now, KL and same-top-1, a value a predicted token [T - 1]."""
        ids_BL = self.ids[number]
        targets_P = torch.cat([ids_BL[:, 1:], ids_BL[:, :1]], dim=1).flatten()  # the last one of each window is cut below
        parts = self.compared(number, self.logits(ids_BL, self.states[-1][number]), targets_P)
        rows = [torch.cat(column).view(ids_BL.shape)[:, :-1].cpu() for column in zip(*parts, strict=True)]
        return list(zip(*(row.unbind(0) for row in rows), strict=True))

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
