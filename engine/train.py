"""Train a whole compressed model beside the dense one until they agree. Knows students, teachers, steps and checkpoints; the losses and the
rounding are the methods'.

The student is a float32 copy of the compressed model in which the matrices under training are made anew at every step, as they would be
stored. Everything that decides a step follows from its number, the seed and the checkpoint, so a training that was killed ends in the very
same weights as one that was not.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.pytorch_utils import Conv1D

from bitpress.engine.calibration_set import left_to_train
from bitpress.engine.checkpoint import Checkpoint
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.measure.logits import SLICE_NUMBERS, WholeScorer, scorer_of, slices
from bitpress.engine.methods.base import LearnedWeight, Lesson, Objective, TrainingOptions
from bitpress.engine.methods.distill.losses import divergence
from bitpress.engine.model import surgery
from bitpress.engine.model.load import compute_dtype
from bitpress.engine.recipe import ActivationScheme
from bitpress.kernels.activations import quantize_rows

CHECKPOINT_SECONDS = 30.0
EVALUATIONS = 8  # of the held-out sequences, spread over the steps, beside the one of the start
TOLD_LOSSES = 100  # losses said over the whole training
WARM_UP = 0.05  # of the steps
Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Learner:
    """A matrix under training, and how the activations are rounded that it is to be multiplied with."""

    weight: LearnedWeight
    activations: ActivationScheme | None = None


class Student:
    """A trainable twin of the compressed model."""

    def __init__(self, compressed: nn.Module, learners: Mapping[str, Learner]) -> None:
        """learners: by place in the model; a head that is tied to a learned embedding learns with it."""
        self.weights = {place: learner.weight for place, learner in learners.items()}
        self.model, self.slots = _trainable(compressed, list(learners))
        for place, learner in learners.items():
            if learner.activations:
                surgery.get(self.model, place).register_forward_pre_hook(_rounding(learner.activations))
        self.refresh()

    def refresh(self) -> None:
        """Make every matrix under training anew; gradients flow into its parameters."""
        for place, weight in self.weights.items():
            made_NK = weight()
            for module in self.slots[place]:
                module.weight = made_NK.t() if isinstance(module, Conv1D) else made_NK


def _trainable(compressed: nn.Module, places: list[str]) -> tuple[nn.Module, dict[str, list[nn.Module]]]:
    """A float32 copy, without gradients of its own and without the weights at `places`, and the modules that use each of those."""
    twin = surgery.twin(compressed)
    surgery.unpack(twin)
    empty = {id(surgery.get(twin, place).weight): nn.Parameter(torch.empty(0), requires_grad=False) for place in places}
    by_place = {place: empty[id(surgery.get(twin, place).weight)] for place in places}
    model = copy.deepcopy(twin, memo=dict(empty)).float().requires_grad_(False)
    slots = {place: [module for module in model.modules() if module._parameters.get("weight") is gap] for place, gap in by_place.items()}
    for modules in slots.values():
        for module in modules:
            del module._parameters["weight"]  # a plain tensor with a history takes its place
    return model, slots


def _rounding(scheme: ActivationScheme) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that rounds a layer's inputs as its packed form will, with the gradient of the identity."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_MK = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        large_K = (x_MK.abs() >= (scheme.outliers or torch.inf)).any(dim=0)
        levels_MK, scale_M1 = quantize_rows(x_MK.masked_fill(large_K, 0.0), scheme.bits)
        seen_MK = torch.where(large_K, x_MK, levels_MK * scale_M1)
        return (args[0] + (seen_MK - x_MK).view_as(args[0]).to(args[0].dtype), *args[1:])

    return hook


@dataclass
class Training:
    """One training: its sides, its text and how far it is."""

    dense: nn.Module
    student: Student
    objective: Objective
    options: TrainingOptions
    ids_SL: Tensor
    seed: int
    emit: Emit
    should_stop: Callable[[], bool]
    checkpoint: Checkpoint | None = None
    done: int = 0
    best: float = math.inf  # least held-out divergence so far, and the matrices that gave it
    best_state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = left_to_train(len(self.ids_SL), self.options.held_out)
        self.dtype = compute_dtype(next(self.dense.parameters()).device.type)
        self.teacher_side, self.student_side = scorer_of(_computing(self.dense, self.dtype)), scorer_of(self.student.model)
        if isinstance(self.student_side, WholeScorer) and self.objective.reads_states:
            why = "It cannot be split into a part that makes hidden states and a head."
            raise InputError("The tokens of this model cannot be contrasted.", why, "Set the weight of the contrast to 0.")
        groups = [{**group, "peak": group["lr"]} for weight in self.student.weights.values() for group in weight.rates()]
        self.optimiser = torch.optim.Adam(groups, fused=True)
        self.order = _Order(kept, self.options.sequences, self.seed)
        self.saved = time.perf_counter()

    def run(self) -> None:
        """Train to the last step, from the checkpoint on if there is one; the matrices are left at their best, the start included.

        Best is least divergence on the held-out sequences. Says `progress` and `train_loss`. Raises Cancelled when told to stop.
        """
        self.resume()
        self.emit("stage_started", {"stage": "training", "total": self.options.steps})
        if self.done == 0:
            self.tell(held_out=self.judged())
        pause, told = max(1, -(-self.options.steps // EVALUATIONS)), max(1, self.options.steps // TOLD_LOSSES)
        while self.done < self.options.steps:
            self.pause_here()
            losses = self.step()
            self.done += 1
            last = self.done == self.options.steps
            if self.done % pause == 0 or last:
                self.tell(**losses, held_out=self.judged())
            elif self.done % told == 0:
                self.tell(**losses)
            self.emit("progress", {"done": self.done, "total": self.options.steps})
        self.save()
        for place, weight in self.student.weights.items():
            weight.load_state_dict(_under(f"{place}/", self.best_state))

    def judged(self) -> float:
        """The held-out divergence now; the matrices are kept where it is the least so far."""
        found = self.held_out()
        if found < self.best:
            self.best, self.best_state = found, {name: value.detach().clone() for name, value in self.matrices().items()}
        return found

    def matrices(self) -> dict[str, Tensor]:
        """Every learned number, by place and name."""
        return {f"{place}/{name}": value for place, weight in self.student.weights.items() for name, value in weight.state_dict().items()}

    def step(self) -> dict[str, float]:
        """One step; returns its losses."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * _share_of_rate(self.done, self.options.steps)
        chosen_B = self.order.chosen(self.done)
        with torch.enable_grad():
            self.student.refresh()
            terms = self.objective.terms(self.lesson(chosen_B))
            self.optimiser.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
        self.optimiser.step()
        return {name: float(term.detach()) for name, term in terms.items()}

    def lesson(self, chosen_B: Tensor) -> Lesson:
        """Both sides on these sequences."""
        ids_BT = self.ids_SL[chosen_B]
        with torch.autocast(ids_BT.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            student_BTd = self.student_side.hidden(ids_BT)
        with torch.no_grad():
            teacher_BTd = self.teacher_side.hidden(ids_BT)
        return Lesson(chosen_B, len(self.ids_SL), student_BTd.float(), teacher_BTd.float(), self.over(student_BTd, teacher_BTd))

    def over(self, student_BTd: Tensor, teacher_BTd: Tensor) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]:
        """`Lesson.over_logits` for these states. Where the logits of all positions would be large they are made again in the backward pass."""
        student_Pd, teacher_Pd = student_BTd.flatten(0, 1), teacher_BTd.flatten(0, 1)
        large = len(student_Pd) * self.student_side.vocab > SLICE_NUMBERS

        def over_logits(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            def of_slice(part_Pd: Tensor, other_Pd: Tensor) -> Tensor:
                with torch.no_grad():
                    target_PV = self.teacher_side.logits(other_Pd)
                with torch.autocast(part_Pd.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    return function(self.student_side.logits(part_Pd), target_PV)

            parts = [(student_Pd[part], teacher_Pd[part]) for part in slices(len(student_Pd), self.student_side.vocab)]
            sums = [recomputed(of_slice, *part, use_reentrant=False, preserve_rng_state=False) if large else of_slice(*part) for part in parts]
            return torch.stack(sums).sum()

        return over_logits

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean divergence from the teacher a token, in nats, on the sequences that are not trained on."""
        self.student.refresh()
        held = torch.arange(self.order.sequences, len(self.ids_SL))
        total = 0.0
        for chosen_B in held.split(self.options.sequences):
            total += float(self.lesson(chosen_B).over_logits(divergence))
        return total / (len(held) * self.ids_SL.shape[1])

    def tell(self, **figures: float) -> None:
        """Say how far the training is and what it has come to."""
        self.emit("train_loss", {"step": self.done, "steps": self.options.steps, **figures})

    def pause_here(self) -> None:
        """Between two steps: keep the state now and then, and stop when told to."""
        stop = self.should_stop()
        if stop or time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
            self.save()
        if stop:
            raise Cancelled

    def save(self) -> None:
        """Write the checkpoint."""
        if self.checkpoint:
            self.checkpoint.save(self.done, self.state())
            self.saved = time.perf_counter()

    def resume(self) -> None:
        """Take up the checkpoint, if there is one."""
        if self.checkpoint and (found := self.checkpoint.load()):
            self.done, tensors = found
            self.take(tensors)
            self.emit("note", {"level": "info", "text": f"Training goes on at step {self.done:,} of {self.options.steps:,}."})

    def state(self) -> dict[str, Tensor]:
        """Everything that later steps depend on: matrices, optimiser, what the objective remembers."""
        found = {f"weight/{name}": value for name, value in self.matrices().items()} | {f"best/{name}": value for name, value in self.best_state.items()}
        found["least"] = torch.tensor(self.best, dtype=torch.float64)
        for number, values in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser/{number}/{name}": value for name, value in values.items()}
        return found | {f"objective/{name}": value for name, value in self.objective.state().items()}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Become what `state` described."""
        for place, weight in self.student.weights.items():
            weight.load_state_dict(_under(f"weight/{place}/", tensors))
        self.best, self.best_state = float(tensors["least"]), _under("best/", tensors)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimiser/", tensors).items():
            number, _, kind = name.partition("/")
            moments.setdefault(int(number), {})[kind] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.objective.load(_under("objective/", tensors))


class _Order:
    """Which sequences a step looks at: each once an epoch, in an order drawn for the epoch; what fills no step is left out."""

    def __init__(self, sequences: int, a_step: int, seed: int) -> None:
        self.sequences, self.a_step, self.seed = sequences, min(a_step, sequences), seed
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def chosen(self, step: int) -> Tensor:
        """Numbers of the sequences of a step."""
        epoch, place = divmod(step, self.sequences // self.a_step)
        if epoch != self.epoch:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.sequences, generator=draw)
        return self.order[place * self.a_step : (place + 1) * self.a_step]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _share_of_rate(step: int, steps: int) -> float:
    """Of the peak rate at a step: a rise, then a straight fall to 0."""
    rise = max(1, round(WARM_UP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)


def _computing(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in the type that forwards are fastest in: itself, or a copy."""
    if all(weight.dtype == dtype for weight in model.parameters()):
        return model
    model = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
