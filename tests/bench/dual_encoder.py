"""Which score finds the parts that a vision-language model can do without: module-wise error, Taylor or magnitude, by retrieval recall (METHODS 10.2).

Run it as a program: `python tests/bench/dual_encoder.py`. The model is a small CLIP that is trained here from nothing on drawn pictures and their captions,
so its recall is no figure of any published model. Heads and groups of neighbouring neurons of both towers go for good, by score over cost, with no training
afterwards. Module-wise error is measured anew as parts go, since two that stand in for each other are missed little while either is there, and of the
loss, since most modules alone change no more than one answer of recall; scored once and on recall it is tried as well. Scores see one set of pairs,
recall is of another: which caption belongs to a picture, and which picture to a caption, among as many as asked.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import bootstrap
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.slicing import keep_heads, keep_neurons
from bitpress.engine.model.surgery import get, linear_weight
from bitpress.engine.sublayers import KINDS, Key, last_matrix, masking

SIDE, START, END = 32, 0, 1
COLOURS = ((1, 0.2, 0.2), (0.2, 1, 0.2), (0.3, 0.3, 1), (1, 1, 0.2), (1, 0.3, 1), (0.2, 1, 1))
SHAPES, SIZES, PLACES, SHADES = 4, (5.0, 9.0), ((9, 9), (9, 23), (16, 16), (23, 9), (23, 23)), (0.1, 0.45, 0.8)
CAPTIONS = list(itertools.product(*map(range, (len(COLOURS), SHAPES, len(SIZES), len(PLACES), len(SHADES)))))
GROUPS = 16  # of neurons, in every block
TOWERS = ("text_model", "vision_model")


Scores = list[tuple[float, float]]  # of every module; the second number decides among equals


class Pairs(NamedTuple):
    """Pictures [S, 3, 32, 32] and their captions, token numbers [S, 7]."""

    pictures: Tensor
    ids_SL: Tensor


class Module(NamedTuple):
    """A head, or a group of neighbouring neurons, of one tower, and its multiply-adds a token."""

    tower: str
    key: Key
    units: tuple[int, ...]
    features: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Row:
    """One pruned model: mean of both recalls at 1 with a 95% interval over pairs, share of the block linears' weights left."""

    name: str
    recall: float
    low: float
    high: float
    linears_kept: float


def drawn(which: list[tuple[int, ...]], luck: torch.Generator) -> Pairs:
    """A noisy picture of each caption: a shape of a colour and a size, at a place, on a shade."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pictures = []
    for colour, shape, size, place, shade in which:
        across, down, radius = columns - PLACES[place][1], rows - PLACES[place][0], SIZES[size]
        inside = (
            across**2 + down**2 <= radius**2,
            torch.maximum(across.abs(), down.abs()) <= 0.85 * radius,
            (down.abs() <= radius) & (across.abs() * 2 <= down + radius),
            torch.minimum(across.abs(), down.abs()) * 3 <= radius,
        )[shape] & (torch.maximum(across.abs(), down.abs()) <= radius)
        pictures.append(torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], torch.full((3, 1, 1), SHADES[shade])))
    offsets = torch.tensor([2, 8, 12, 14, 19])
    ids_SL = torch.cat((torch.full((len(which), 1), START), torch.tensor(which) + offsets, torch.full((len(which), 1), END)), dim=1)
    clean = torch.stack(pictures)
    return Pairs(clean + 0.15 * torch.randn(clean.shape, generator=luck), ids_SL)


def trained(steps: int) -> CLIPModel:
    """A small CLIP that has learnt which caption belongs to which picture."""
    torch.manual_seed(0)
    luck = torch.Generator().manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 24, "max_position_embeddings": 8, "bos_token_id": START, "eos_token_id": END, "pad_token_id": 23}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": SIDE, "patch_size": 8}, projection_dim=64))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        pairs = drawn([CAPTIONS[n] for n in torch.randperm(len(CAPTIONS), generator=luck)[:128]], luck)
        loss = contrastive(model, pairs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", file=sys.stderr)
    return model.eval().requires_grad_(False)


def contrastive(model: CLIPModel, pairs: Pairs) -> Tensor:
    """Mean over both directions of the cross entropy of the right partner."""
    return loss_of(model(input_ids=pairs.ids_SL, pixel_values=pairs.pictures).logits_per_image)


def loss_of(logits_SS: Tensor) -> Tensor:
    """The same of likenesses that are there."""
    right_S = torch.arange(len(logits_SS))
    return (torch.nn.functional.cross_entropy(logits_SS, right_S) + torch.nn.functional.cross_entropy(logits_SS.t(), right_S)) / 2


def recall_of(logits_SS: Tensor) -> Tensor:
    """For every pair the mean of both recalls at 1: 0, a half or 1; [S]."""
    right_S = torch.arange(len(logits_SS))
    return ((logits_SS.argmax(1) == right_S).double() + (logits_SS.argmax(0) == right_S).double()) / 2


# Scores: the higher, the more important -----------------------------------------------------------------------------


def modules_of(anatomies: dict[str, Anatomy]) -> list[Module]:
    """Every head and every group of neurons of both towers."""
    found = []
    for tower, anatomy in anatomies.items():
        for block, kind in itertools.product(range(anatomy.blocks), KINDS):
            count, size = (anatomy.heads, anatomy.head_dim) if kind == "heads" else (anatomy.ffn, 1)
            numel = sum(part.numel for part in anatomy.of_block(block) if (part.role in ("q", "k", "v", "o")) == (kind == "heads"))
            for units in torch.arange(count).tensor_split(count if kind == "heads" else GROUPS):
                features = [unit * size + channel for unit in units.tolist() for channel in range(size)]
                found.append(Module(tower, Key(block, kind), tuple(units.tolist()), tuple(features), numel * len(units) // count))
    return found


class Trial:
    """The model with some modules at zero, on some pairs. A tower in which nothing changes is not run again."""

    def __init__(self, model: CLIPModel, anatomies: dict[str, Anatomy], pairs: Pairs, gone: list[Module]) -> None:
        self.model, self.anatomies, self.pairs, self.gone = model, anatomies, pairs, gone
        self.whole = {tower: self.features(tower, gone) for tower in TOWERS}

    @torch.no_grad()
    def features(self, tower: str, gone: list[Module]) -> Tensor:
        """What a tower makes of its side of the pairs, of length 1, [S, d]."""
        with masking(getattr(self.model, tower), self.anatomies[tower], masks_of(self.anatomies[tower], tower, gone)):
            if tower == "text_model":
                made_Sd = self.model.text_projection(self.model.text_model(input_ids=self.pairs.ids_SL).pooler_output)
            else:
                made_Sd = self.model.visual_projection(self.model.vision_model(pixel_values=self.pairs.pictures).pooler_output)
        return made_Sd / made_Sd.norm(dim=-1, keepdim=True)

    def logits(self, module: Module | None = None) -> Tensor:
        """Likeness of every picture and caption, [S, S], also without one module more."""
        changed = {module.tower: self.features(module.tower, [*self.gone, module])} if module else {}
        text_Sd, vision_Sd = ({**self.whole, **changed}[tower] for tower in TOWERS)
        return self.model.logit_scale.exp() * vision_Sd @ text_Sd.t()


def masks_of(anatomy: Anatomy, tower: str, gone: list[Module]) -> dict[Key, Tensor]:
    """A mask for every sublayer of a tower, 0 where a module is gone."""
    masks = {key: torch.ones(last_matrix(anatomy, key).in_features) for key in _keys(anatomy)}
    for module in gone:
        if module.tower == tower:
            masks[module.key][list(module.features)] = 0
    return masks


def by_loss(trial: Trial, modules: list[Module]) -> Scores:
    """MoPE on the contrastive loss: what it rises by without each module, over cost."""
    whole = float(loss_of(trial.logits()))
    return [((float(loss_of(trial.logits(module))) - whole) / module.cost, 0.0) for module in modules]


def by_recall(trial: Trial, modules: list[Module]) -> Scores:
    """MoPE on recall, which most modules hardly change; among equals the loss decides. Both over cost."""
    whole_SS = trial.logits()
    recall, loss, found = float(recall_of(whole_SS).mean()), float(loss_of(whole_SS)), []
    for module in modules:
        less_SS = trial.logits(module)
        found.append(((recall - float(recall_of(less_SS).mean())) / module.cost, (float(loss_of(less_SS)) - loss) / module.cost))
    return found


def by_taylor(trial: Trial, modules: list[Module]) -> Scores:
    """First order: what the loss would change by, |gradient in the module's mask|, summed over batches of 32, over cost."""
    total, model, pairs = [0.0] * len(modules), trial.model, trial.pairs
    with torch.enable_grad():
        for first in range(0, len(pairs.ids_SL), 32):
            masks = {tower: masks_of(anatomy, tower, trial.gone) for tower, anatomy in trial.anatomies.items()}
            for mask_F in (mask_F for of_tower in masks.values() for mask_F in of_tower.values()):
                mask_F.requires_grad_(True)
            with ExitStack() as stack:
                for tower in TOWERS:
                    stack.enter_context(masking(getattr(model, tower), trial.anatomies[tower], masks[tower]))
                contrastive(model, Pairs(*(every[first : first + 32] for every in pairs))).backward()
            for number, module in enumerate(modules):
                total[number] += abs(float(masks[module.tower][module.key].grad[list(module.features)].sum())) / module.cost
    return [(value, 0.0) for value in total]


def by_magnitude(trial: Trial, modules: list[Module]) -> Scores:
    """Mean square of the columns of the last matrix that read the module."""
    found = []
    for module in modules:
        weight_NF = linear_weight(get(getattr(trial.model, module.tower), last_matrix(trial.anatomies[module.tower], module.key).name))
        found.append((float(weight_NF[:, list(module.features)].square().mean()), 0.0))
    return found


Score = Callable[[Trial, list[Module]], Scores]
# Share of the weights that goes between two scorings; 1 scores once, on the whole model.
SCORES: dict[str, tuple[Score, float]] = {
    "mope": (by_loss, 0.05),
    "mope, scored once": (by_loss, 1.0),
    "mope on recall": (by_recall, 0.05),
    "mope on recall, scored once": (by_recall, 1.0),
    "taylor": (by_taylor, 1.0),
    "taylor, scored as often": (by_taylor, 0.05),
    "magnitude": (by_magnitude, 1.0),
}


def _keys(anatomy: Anatomy) -> list[Key]:
    return [Key(block, kind) for block in range(anatomy.blocks) for kind in KINDS]


# Removal --------------------------------------------------------------------------------------------------------------


def staying(whole: Trial, modules: list[Module], start: list[Module], score: Score, remove: float, step: float) -> list[Module]:
    """Of the modules in `start` those that stay when at least a share of all weights goes, in rounds of `step`.

    A head and a group of neurons stay everywhere.
    """
    total, left = (sum(module.cost for module in some) for some in (modules, start))
    stay, least = list(start), (1 - remove) * total
    while left > least:
        gone = [module for module in modules if module not in stay]
        scored = dict(zip(stay, score(Trial(whole.model, whole.anatomies, whole.pairs, gone), stay), strict=True))
        until = max(left - step * total, least)
        for module in sorted(stay, key=scored.__getitem__):
            if left > until and sum(other[:2] == module[:2] for other in stay) > 1:
                stay.remove(module)
                left -= module.cost
    return stay


def cut(model: CLIPModel, anatomies: dict[str, Anatomy], stay: list[Module]) -> CLIPModel:
    """A copy that has only these modules, the rest gone for good."""
    made = deepcopy(model)
    for tower, anatomy in anatomies.items():
        for key in _keys(anatomy):
            units = sorted(unit for module in stay if module[:2] == (tower, key) for unit in module.units)
            (keep_heads if key.kind == "heads" else keep_neurons)(getattr(made, tower), anatomy, key.block, units)
    return made


def row(name: str, model: CLIPModel, pairs: Pairs, kept: float) -> Row:
    """Percentiles of the mean over 2,000 draws of pairs."""
    with torch.no_grad():
        right_S = recall_of(model(input_ids=pairs.ids_SL, pixel_values=pairs.pictures).logits_per_image)
    spread = bootstrap((right_S.numpy(),), lambda x, axis: x.mean(axis=axis), n_resamples=2000, method="percentile", random_state=0).confidence_interval
    made = Row(name, float(right_S.mean()), float(spread.low), float(spread.high), kept)
    print(f"{name:36} recall at 1 {made.recall:.1%} [{made.low:.1%}, {made.high:.1%}]  linears {kept:.1%}", file=sys.stderr)
    return made


def main(asked: argparse.Namespace) -> list[Row]:
    """Train, prune by every score, and measure."""
    model, luck = trained(asked.steps), torch.Generator().manual_seed(1)
    order = torch.randperm(len(CAPTIONS), generator=luck).tolist()
    seen, judged = (drawn([CAPTIONS[n] for n in part], luck) for part in (order[: asked.pairs], order[-asked.pairs :]))
    anatomies: dict[str, Any] = {tower: anatomy_of(getattr(model, tower), tower) for tower in TOWERS}
    modules, whole = modules_of(anatomies), Trial(model, anatomies, seen, [])
    total = sum(module.cost for module in modules)
    rows = [row("dense", model, judged, 1.0)]
    for name in asked.scores:
        (score, step), stay = SCORES[name], modules
        for remove in sorted(asked.remove):
            stay = staying(whole, modules, stay if step < 1 else modules, score, remove, step)
            rows.append(row(f"{name} -{remove:.0%}", cut(model, anatomies, stay), judged, sum(module.cost for module in stay) / total))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prune a small dual encoder.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--remove", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    print(json.dumps([asdict(one) for one in main(parser.parse_args())], indent=1))
