"""Block reconstruction: train the matrices of one block until its output is near the dense block's (METHODS 1.4). Knows blocks; the methods' own
mathematics is theirs.

Two streams of hidden states run side by side. The dense one gives each block's target; the compressed one has passed
through what was made so far. In training each number that enters the block comes from one of the two by chance.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import Stream, computing_in
from bitpress.engine.calibration_set import left_to_train
from bitpress.engine.errors import Cancelled
from bitpress.engine.methods.base import BlockOptions, LearnedWeight
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy

EVALUATIONS = 8  # of the held-out sequences, spread over the steps, beside the one of the start
TOKENS = 2048  # that run through a block at once where no gradient is needed
Emit = Callable[[str, dict[str, Any]], None]


class LearnedLinear(nn.Module):
    """A linear whose weight is being learned."""

    def __init__(self, weight: LearnedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] times the present weight: [..., N]."""
        return nn.functional.linear(x, self.weight(), self.bias)


@dataclass
class Trial:
    """What training one block came to: the error of its output on the held-out sequences."""

    start: float
    best: float
    step: int = 0  # at which the kept state was reached; 0 is the start
    seconds: float = 0.0


@dataclass
class Reconstruction:
    """Both streams of one run, and the block they stand before."""

    dense: nn.Module
    anatomy: Anatomy
    ids_SL: Tensor
    seed: int
    emit: Emit
    should_stop: Callable[[], bool]
    block: int = 0
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = Stream(self.dense, self.anatomy, self.ids_SL)
        self.inputs_SLd = self.targets_SLd = self.stream.hidden_SLd
        self.sizes_SL = self.inputs_SLd[..., 0]

    def enter(self, block: int, hidden: list[Tensor]) -> None:
        """Stand before a block: `hidden` has passed through the compressed blocks before it."""
        if block:
            self.stream.hidden_SLd = self.targets_SLd.to(self.stream.dtype)
        self.block, self.inputs_SLd = block, torch.cat(hidden)
        self.targets_SLd = self.outputs(self.stream.blocks[block], self.stream.hidden_SLd)
        self.sizes_SL = self.targets_SLd.square().mean(dim=2).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def outputs(self, block: nn.Module, x_SLd: Tensor) -> Tensor:
        """What a block puts out for all sequences, float32."""
        size = max(1, TOKENS // x_SLd.shape[1])
        parts = []
        with computing_in(block.parameters(), torch.float32):
            for x_BLd in x_SLd.split(size):
                if self.should_stop():
                    raise Cancelled
                parts.append(self.stream.run(self.block, block, x_BLd.float()))
        return torch.cat(parts)

    def train(self, compressed: nn.Module, weights: Mapping[str, LearnedWeight], options: BlockOptions) -> Trial:
        """Train the named matrices of the block, the rest of it as it stands in `compressed`; they are left at their best.

        weights: by place in the model. Best is least error on the held-out sequences, on compressed inputs, the start
        included. Says `block_loss` as the error falls. Raises InputError when too few sequences would be left to train on.
        """
        trained = self._trained_block(compressed, weights)
        return _Training(self, trained, list(weights.values()), options).run()

    def _trained_block(self, compressed: nn.Module, weights: Mapping[str, LearnedWeight]) -> nn.Module:
        """The block as an ordinary float32 module: learned linears, and dense stand-ins for packed ones."""
        prefix = f"{self.anatomy.block_prefix}.{self.block}"
        block, learned = surgery.twin(surgery.get(compressed, prefix)), {}
        for name, module in list(block.named_modules()):
            if weight := weights.get(f"{prefix}.{name}"):
                learned[name] = LearnedLinear(weight, _bias_of(module))
                surgery.replace(block, name, nn.Identity())
        surgery.unpack(block)
        block = copy.deepcopy(block).float().requires_grad_(False)  # a copy: what is stored keeps its type
        for name, linear in learned.items():
            surgery.replace(block, name, linear)
        return block


def _bias_of(module: nn.Module) -> Tensor | None:
    return module.bias.detach().float() if isinstance(module.bias, Tensor) else None


class _Training:
    """The steps of one block."""

    def __init__(self, run: Reconstruction, block: nn.Module, weights: list[LearnedWeight], options: BlockOptions) -> None:
        self.run_, self.block, self.weights, self.options = run, block, weights, options
        self.kept = left_to_train(len(run.ids_SL), options.held_out)
        self.draw = torch.Generator().manual_seed(run.seed * 100_003 + run.block)
        groups = [{**group, "peak": group["lr"]} for weight in weights for group in weight.rates()]
        self.optimiser = torch.optim.Adam(groups, fused=True)

    def run(self) -> Trial:
        """Train; the weights are left in their best state, in `eval` mode."""
        started = time.perf_counter()
        first = self.error()
        trial, best = Trial(first, first), self.state()
        self.tell(trial, 0, first)
        pause = max(1, -(-self.options.steps // EVALUATIONS))
        for step in range(1, self.options.steps + 1):
            loss = self.step(step)
            if step % pause == 0 or step == self.options.steps:
                error = self.error()
                if error < trial.best:
                    trial.best, trial.step, best = error, step, self.state()
                self.tell(trial, step, error, loss)
        for weight, state in zip(self.weights, best, strict=True):
            weight.load_state_dict(state)
            weight.eval()
        trial.seconds = time.perf_counter() - started
        return trial

    def step(self, number: int) -> float:
        """One step on a few sequences; returns their error."""
        if self.run_.should_stop():
            raise Cancelled
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + cos(pi * (number - 1) / self.options.steps))
        chosen = torch.randperm(self.kept, generator=self.draw)[: self.options.sequences]
        for weight in self.weights:
            weight.train()
        with torch.enable_grad():
            output = self.run_.stream.run(self.run_.block, self.block, self.mixed(chosen))
            loss = self.loss(output, chosen)
            self.optimiser.zero_grad()
            loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def mixed(self, chosen: Tensor) -> Tensor:
        """Inputs of these sequences, each number from the dense or the compressed stream by chance (METHODS 1.4)."""
        dense, made = self.run_.stream.hidden_SLd[chosen], self.run_.inputs_SLd[chosen]
        from_dense = torch.rand(dense.shape, generator=self.draw) < self.options.mixing
        return torch.where(from_dense, dense, made).float()

    @torch.no_grad()
    def error(self) -> float:
        """The error on the held-out sequences, on compressed inputs alone."""
        for weight in self.weights:
            weight.eval()
        return float(self.loss(self.run_.outputs(self.block, self.run_.inputs_SLd[self.kept :]), slice(self.kept, None)))

    def loss(self, made_BLd: Tensor, chosen: Tensor | slice) -> Tensor:
        """Mean squared error against these sequences' targets, by default each token's over its target's mean square.

        Plain, a few tokens decide: in SmolLM2 the first one's mean square is some ten thousand times the others'.
        """
        errors_BL = (made_BLd - self.run_.targets_SLd[chosen]).square().mean(dim=2)
        return (errors_BL if self.options.loss == "plain" else errors_BL / self.run_.sizes_SL[chosen]).mean()

    def state(self) -> list[dict[str, Any]]:
        """A copy of every parameter."""
        return [copy.deepcopy(weight.state_dict()) for weight in self.weights]

    def tell(self, trial: Trial, step: int, error: float, loss: float | None = None) -> None:
        """Say how far the block is."""
        told: dict[str, float] = {"block": self.run_.block, "matrices": len(self.weights), "step": step, "steps": self.options.steps}
        told |= {"held_out": error, "start": trial.start, "best": trial.best}
        self.run_.emit("block_loss", told if loss is None else {**told, "loss": loss})
