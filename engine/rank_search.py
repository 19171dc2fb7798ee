"""Which ranks to give which roles: Bayesian optimisation of a few keep ratios on a short text (METHODS 9.1, 9.3). Knows models; writes recipe lines.

One ratio for q and k, one each for o, gate, up and down, over all blocks (5x1) or over each quarter of them (5x4). Values are
left whole. Every proposal is scaled to the wanted share of parameters, so that all allocations tried are of one size. The
objective is log perplexity plus the divergence of the compressed model from the dense one, log q under q (reverse KL), in nats
a token. What a proposal shares with one tried before, from the first block up to a quarter, is not computed again. One that is
far worse than the best on the same first part of the text is given up there; what it is told as is the best one's objective
and the gap so far, which is nearer to the truth than its own mean over that part.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import optuna
import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import walk
from bitpress.engine.calibration_set import calibration_set
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.methods.lowrank.pipeline import output_moment
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe
from bitpress.engine.sensitivity_truth import Prefixes

GROUPS = {"qk": ("q", "k"), "o": ("o",), "gate": ("gate",), "up": ("up",), "down": ("down",)}
START = {"qk": 0.5, "o": 0.5, "gate": 0.8, "up": 0.8, "down": 0.8}
LOWEST, STEP = 0.2, 8  # least share of a matrix's parameters; ranks are multiples of this
QUARTERS = 4
SPANS = {"5x1": 1, "5x4": QUARTERS}
PREFIXES = 24  # of each batch, the latest ones
HOPELESS, FIRST_LOOK = 0.5, 0.25  # nats above the best on the same text, from this share of it on: the rest is not read
CEILING = 1.0  # nats above the start: worse is told to the sampler as this, or a few huge values hide what sets the good ones apart
HELD_OUT, OBJECTIVE_LENGTH = 16, 256  # sequences, and tokens of each, that only the objective sees
Ratios = dict[str, float]
Emit = Callable[[str, dict[str, Any]], object]


@dataclass(frozen=True)
class Trial:
    """One allocation tried. objective: nats a token; keep: share of the block linears' parameters; read: share of the text."""

    ratios: Ratios
    objective: float
    perplexity: float
    keep: float
    read: float = 1.0


class Space:
    """The ratios of a model, and what they mean in ranks."""

    def __init__(self, anatomy: Anatomy, spans: int) -> None:
        """spans: 1 for one ratio a role over all blocks, 4 for one a quarter."""
        self.anatomy, self.spans = anatomy, spans
        self.parts: dict[str, list[Part]] = {}
        for part in anatomy.linears:
            if group := next((name for name, roles in GROUPS.items() if part.role in roles), None):
                self.parts.setdefault(f"{group}-{self.span_of(part.block or 0)}", []).append(part)
        if not self.parts:
            raise InputError("There is nothing to search for.", "The model has none of the roles q, k, o, gate, up and down.", "Set ranks by hand.")

    def span_of(self, block: int) -> int:
        """Which span of blocks a block is in."""
        return block * self.spans // self.anatomy.blocks

    def rank(self, part: Part, ratio: float) -> int:
        """The rank of a matrix that keeps this share of its parameters, a multiple of 8; 0 where it stays whole."""
        breaks = part.numel / (part.out_features + part.in_features)
        rank = max(STEP, round(ratio * breaks / STEP) * STEP)
        return 0 if rank >= breaks else min(rank, part.out_features, part.in_features)

    def keep(self, ratios: Ratios) -> float:
        """Share of the block linears' parameters that an allocation keeps."""
        lost = 0
        for name, parts in self.parts.items():
            for part in parts:
                rank = self.rank(part, ratios[name])
                lost += part.numel - rank * (part.out_features + part.in_features) if rank else 0
        return 1 - lost / self.anatomy.linear_params

    def scaled(self, ratios: Ratios, target: float) -> Ratios:
        """The same proportions at the wanted share. Raises InputError for a share that no ratios of at least 0.2 meet."""
        least = self.keep(dict.fromkeys(ratios, LOWEST))
        if not least <= target <= 1:
            why = f"These roles can be cut to {least:.0%}, values being left whole."
            raise InputError(f"No ranks keep {target:.0%} of the parameters.", why, f"Ask for {least:.0%} to 100%.")
        low, high = 0.0, 1 / min(ratios.values())
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.keep(_clipped(ratios, middle)) <= target else (low, middle)
        return _clipped(ratios, low)

    def lines(self, ratios: Ratios) -> list[dict[str, Any]]:
        """An allocation as lines of a recipe's `schemes`, for `method: bolaco`."""
        found = []
        for name, parts in self.parts.items():
            for role in dict.fromkeys(part.role for part in parts):
                first, *_, last = blocks = [part.block for part in parts if part.role == role] * 2
                rank = self.rank(next(part for part in parts if part.role == role), ratios[name])
                match = f"role:{role}" if len(blocks) == 2 * self.anatomy.blocks else f"role:{role} & blocks:{first}-{last}"
                found += [{"match": match, "rank": {"rank": rank, "bias": True}}] if rank else []
        return found


def _clipped(ratios: Ratios, scale: float) -> Ratios:
    return {name: min(1.0, max(LOWEST, scale * ratio)) for name, ratio in ratios.items()}


@dataclass
class Projected:
    """A matrix with all principal directions of its outputs at hand: any rank is a product away."""

    module: nn.Linear
    basis_NN: Tensor  # float32, the first column varies most
    turned_NK: Tensor  # the weights in these directions
    mean_N: Tensor  # of the outputs

    def at(self, rank: int) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the matrix on its first directions."""
        basis_NR = self.basis_NN[:, :rank]
        return basis_NR @ self.turned_NK[:rank], self.mean_N - basis_NR @ (basis_NR.t() @ self.mean_N)


def projected(loaded: Loaded, ids_SL: Tensor, names: list[str], should_stop: Callable[[], bool]) -> dict[str, Projected]:
    """Directions of these layers' outputs on the dense model (METHODS 9.1)."""
    found: dict[str, Projected] = {}

    def keep(_: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, known in stats.items():
            module = surgery.get(loaded.model, name)
            weight_NK = surgery.linear_weight(module).detach().float()
            _, vectors_NN = torch.linalg.eigh(output_moment(weight_NK, known["pooled_covariance"]))
            basis_NN, mean_N = vectors_NN.flip(1).float(), (weight_NK.double() @ known["mean"]).float()
            found[name] = Projected(module, basis_NN, basis_NN.t() @ weight_NK, mean_N)  # type: ignore[arg-type]

    requests = {name: {"mean", "pooled_covariance"} for name in names}
    walk(loaded.model, loaded.anatomy, ids_SL, requests, keep, sequential=False, should_stop=should_stop)
    return found


@dataclass
class Objective:
    """Allocations judged on one text, prefixes of earlier ones kept. best: sums of the best one so far up to each batch."""

    space: Space
    layers: dict[str, Projected]
    text: Prefixes
    kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    best: list[float] = field(default_factory=list)

    def judge(self, ratios: Ratios) -> Trial:
        """The objective of an allocation; on the first part of the text only where that is far above the best one's."""
        ranks = {part.name: self.space.rank(part, ratios[name]) for name, parts in self.space.parts.items() for part in parts}
        with changed(self.layers, ranks):
            return self._read(ratios, ranks)

    def _read(self, ratios: Ratios, ranks: dict[str, int]) -> Trial:
        nll, count, batches = 0.0, 0, self.text.ids
        sums: list[float] = []
        for number, ids_BL in enumerate(batches):
            losses = _losses(self.text, number, ids_BL, self._through(number, ids_BL, ranks))
            nll, count = nll + losses[0], count + ids_BL[:, 1:].numel()
            sums.append(sum(losses) + (sums[-1] if sums else 0.0))
            if self.best and number + 1 >= FIRST_LOOK * len(batches) and sums[-1] - self.best[number] > HOPELESS * count:
                break
        read = len(sums) / len(batches)
        behind = (sums[-1] - self.best[len(sums) - 1]) / count if read < 1 else 0.0
        objective = self._mean(self.best) + behind if read < 1 else self._mean(sums)
        if read == 1 and (not self.best or sums[-1] < self.best[-1]):
            self.best = sums
        return Trial(ratios, objective, float(torch.tensor(nll / count).exp()), self.space.keep(ratios), read)

    def _mean(self, sums: list[float]) -> float:
        """A token's share of what the whole text sums to."""
        return sums[-1] / sum(ids_BL[:, 1:].numel() for ids_BL in self.text.ids)

    def _through(self, number: int, ids_BL: Tensor, ranks: dict[str, int]) -> Tensor:
        blocks = self.space.anatomy.blocks
        starts = [span * blocks // QUARTERS for span in range(1, QUARTERS)]
        keys = {start: (number, *(ranks[name] for name in ranks if (self.space.anatomy.by_name[name].block or 0) < start)) for start in starts}
        known = max((start for start in starts if keys[start] in self.kept), default=0)
        x_BLd = self.kept[keys[known]] if known else self.text.states[0][number]
        for index in range(known, blocks):
            if index in keys and index > known:
                self.kept[keys[index]] = x_BLd
                while len(self.kept) > PREFIXES * len(self.text.ids):
                    del self.kept[next(iter(self.kept))]
            x_BLd = self.text.through(index, x_BLd)
        return x_BLd


def _losses(text: Prefixes, number: int, ids_BL: Tensor, x_BLd: Tensor) -> tuple[float, float]:
    """Sums over the predicted positions of a batch: negative log-likelihood, and reverse KL to the dense model. A slice of the logits at a time."""
    wanted_P = ids_BL.roll(-1, 1).flatten()  # the last one of each sequence is cut below
    found = [compared[::2] for compared in text.compared(number, text.logits(ids_BL, x_BLd), wanted_P, reverse=True)]
    nll, divergence = (float(torch.cat(column).view(ids_BL.shape)[:, :-1].sum()) for column in zip(*found, strict=True))
    return nll, divergence


@contextmanager
def changed(layers: dict[str, Projected], ranks: dict[str, int]) -> Iterator[None]:
    """These layers at these ranks, with their biases, for a while; 0 leaves a layer whole."""
    before = [(layer.module, layer.module.weight.data, layer.module.bias) for name, layer in layers.items() if ranks[name]]
    try:
        for name, layer in layers.items():
            if ranks[name]:
                weight_NK, bias_N = layer.at(ranks[name])
                own, dtype = layer.module.bias, layer.module.weight.dtype
                layer.module.weight.data = weight_NK.to(dtype)
                layer.module.bias = nn.Parameter((bias_N if own is None else bias_N + own.float()).to(dtype), requires_grad=False)
        yield
    finally:
        for module, weight, bias in before:
            module.weight.data, module.bias = weight, bias


@contextmanager
def objective_on(loaded: Loaded, space: Space, ids_SL: Tensor, text_SL: Tensor, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Objective]:
    """What allocations are judged by, for as many searches as are wanted. ids_SL: sequences for the directions. text_SL: others, for the objective."""
    layers = projected(loaded, ids_SL, [part.name for parts in space.parts.values() for part in parts], should_stop)
    with Prefixes(loaded.model, loaded.anatomy, text_SL, batch=2).open() as text:
        text.take()
        text.refer()
        yield Objective(space, layers, text)


def search(
    objective: Objective,
    keep: float,
    evaluations: int = 50,
    seed: int = 0,
    random: bool = False,
    on_trial: Callable[[Trial], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Trial]:
    """Try `evaluations` allocations of this share of the block linears' parameters; the paper's start and an even one are the first two.

    random: draw ratios evenly instead, to compare with. Raises InputError for a share that cannot be met, Cancelled when told to stop.
    """
    space, study, objective.best = objective.space, _study(seed, random), []
    start = space.scaled({name: START[name.split("-")[0]] for name in space.parts}, keep)
    study.enqueue_trial(start)
    study.enqueue_trial(dict.fromkeys(start, keep))
    trials: list[Trial] = []
    for _ in range(evaluations):
        if should_stop():
            raise Cancelled()
        with torch.inference_mode(False), torch.enable_grad():  # the sampler fits its own model by gradients
            asked = study.ask()
            ratios = space.scaled({name: asked.suggest_float(name, LOWEST, 1.0) for name in space.parts}, keep)
        trials.append(objective.judge(ratios))
        study.tell(asked, min(trials[-1].objective, trials[0].objective + CEILING))
        on_trial(trials[-1])
    return trials


def search_ranks(
    loaded: Loaded,
    ids_SL: Tensor,
    text_SL: Tensor,
    keep: float,
    kind: Literal["5x1", "5x4"] = "5x1",
    evaluations: int = 50,
    seed: int = 0,
    on_trial: Callable[[Trial], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[Trial], list[dict[str, Any]]]:
    """One search from the model on; returns its trials in order, and the best one as recipe lines. Arguments as `objective_on` and `search`."""
    space = Space(loaded.anatomy, SPANS[kind])
    space.scaled(dict.fromkeys(space.parts, keep), keep)  # a share that cannot be met is refused before the long work
    with objective_on(loaded, space, ids_SL, text_SL, should_stop) as objective:
        trials = search(objective, keep, evaluations, seed, False, on_trial, should_stop)
    return trials, space.lines(min(trials, key=lambda trial: trial.objective).ratios)


def search_recipe(
    loaded: Loaded, plan: Recipe, removed: float, kind: Literal["5x1", "5x4"], evaluations: int, emit: Emit, should_stop: Callable[[], bool] = lambda: False
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The plan with the best ranks found in place of its lines, and all trials as plain values. Says `trial` and `progress` after each.

    The plan's calibration names the text: 16 sequences of it are kept for the objective, the directions see the others only.
    """
    drawn = calibration_set(loaded, plan.calibration.model_copy(update={"sequences": plan.calibration.sequences + HELD_OUT}), plan.seed).ids_SL
    emit("stage_started", {"stage": "searching ranks", "total": evaluations})
    told: list[dict[str, Any]] = []

    def tell(trial: Trial) -> None:
        told.append(asdict(trial))
        emit("trial", told[-1])
        emit("progress", {"done": len(told), "total": evaluations})

    text_SL = drawn[-HELD_OUT:, :OBJECTIVE_LENGTH]
    _, lines = search_ranks(loaded, drawn[:-HELD_OUT], text_SL, 1 - removed, kind, evaluations, plan.seed, on_trial=tell, should_stop=should_stop)
    return Recipe.from_dict({**plan.to_dict(), "schemes": lines, "stages": [{"method": "bolaco"}]}), told


def _study(seed: int, random: bool) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler(seed) if random else optuna.samplers.GPSampler(seed=seed, n_startup_trials=6)
    return optuna.create_study(sampler=sampler)
