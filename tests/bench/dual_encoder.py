"""Which score finds the parts that a vision-language model can do without: module-wise error, Taylor or magnitude, by retrieval recall (METHODS 10.2).

Run it as a program: `python tests/bench/dual_encoder.py`. The model is a small CLIP that is trained here from nothing on drawn pictures and their captions,
so its recall is no figure of any published model. Heads and groups of neighbouring neurons of both towers go for good, by score over cost, with no training
afterwards. Scores see one set of pairs, recall is of another: which caption belongs to a picture, and which picture to a caption, among as many as asked.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
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
    logits_SS = model(input_ids=pairs.ids_SL, pixel_values=pairs.pictures).logits_per_image
    right_S = torch.arange(len(logits_SS))
    return (torch.nn.functional.cross_entropy(logits_SS, right_S) + torch.nn.functional.cross_entropy(logits_SS.t(), right_S)) / 2


@torch.no_grad()
def recalled(model: CLIPModel, pairs: Pairs) -> Tensor:
    """For every pair the mean of both recalls at 1: 0, a half or 1; [S]."""
    logits_SS, right_S = model(input_ids=pairs.ids_SL, pixel_values=pairs.pictures).logits_per_image, torch.arange(len(pairs.ids_SL))
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


def by_error(model: CLIPModel, anatomies: dict[str, Anatomy], modules: list[Module], pairs: Pairs) -> Scores:
    """MoPE: the recall lost without each module; among equals the contrastive loss decides. Both over cost."""
    whole, loss = float(recalled(model, pairs).mean()), float(contrastive(model, pairs))
    found = []
    for module in modules:
        mask_F = torch.ones(last_matrix(anatomies[module.tower], module.key).in_features)
        mask_F[list(module.features)] = 0
        with masking(getattr(model, module.tower), anatomies[module.tower], {module.key: mask_F}):
            found.append(((whole - float(recalled(model, pairs).mean())) / module.cost, (float(contrastive(model, pairs)) - loss) / module.cost))
    return found


def by_taylor(model: CLIPModel, anatomies: dict[str, Anatomy], modules: list[Module], pairs: Pairs) -> Scores:
    """First order: what the loss would change by, |gradient in the module's mask|, summed over batches of 32, over cost."""
    total = [0.0] * len(modules)
    with torch.enable_grad():
        for first in range(0, len(pairs.ids_SL), 32):
            masks = {tower: {key: torch.ones(last_matrix(a, key).in_features, requires_grad=True) for key in _keys(a)} for tower, a in anatomies.items()}
            text, vision = TOWERS
            with masking(model.text_model, anatomies[text], masks[text]), masking(model.vision_model, anatomies[vision], masks[vision]):
                contrastive(model, Pairs(*(every[first : first + 32] for every in pairs))).backward()
            for number, module in enumerate(modules):
                total[number] += abs(float(masks[module.tower][module.key].grad[list(module.features)].sum())) / module.cost
    return [(value, 0.0) for value in total]


def by_magnitude(model: CLIPModel, anatomies: dict[str, Anatomy], modules: list[Module], pairs: Pairs) -> Scores:
    """Mean square of the columns of the last matrix that read the module."""
    found = []
    for module in modules:
        weight_NF = linear_weight(get(getattr(model, module.tower), last_matrix(anatomies[module.tower], module.key).name))
        found.append((float(weight_NF[:, list(module.features)].square().mean()), 0.0))
    return found


SCORES: dict[str, Callable[..., Scores]] = {"mope": by_error, "taylor": by_taylor, "magnitude": by_magnitude}


def _keys(anatomy: Anatomy) -> list[Key]:
    return [Key(block, kind) for block in range(anatomy.blocks) for kind in KINDS]


# Removal --------------------------------------------------------------------------------------------------------------


def without(model: CLIPModel, anatomies: dict[str, Anatomy], modules: list[Module], scores: Scores, remove: float) -> tuple[CLIPModel, float]:
    """The model with its least important modules gone for good, at least a share of the weights, and the share left.

    A head and a group of neurons stay everywhere.
    """
    total = sum(anatomy.linear_params for anatomy in anatomies.values())
    stay, left = list(modules), total
    for number in sorted(range(len(modules)), key=scores.__getitem__):
        alike = [module for module in stay if module[:2] == modules[number][:2]]
        if left > (1 - remove) * total and len(alike) > 1:
            stay.remove(modules[number])
            left -= modules[number].cost
    made = deepcopy(model)
    for tower, anatomy in anatomies.items():
        for key in _keys(anatomy):
            units = sorted(unit for module in stay if module[:2] == (tower, key) for unit in module.units)
            (keep_heads if key.kind == "heads" else keep_neurons)(getattr(made, tower), anatomy, key.block, units)
    return made, left / total


def row(name: str, model: CLIPModel, pairs: Pairs, kept: float) -> Row:
    """Percentiles of the mean over 2,000 draws of pairs."""
    right_S = recalled(model, pairs)
    spread = bootstrap((right_S.numpy(),), lambda x, axis: x.mean(axis=axis), n_resamples=2000, method="percentile", random_state=0).confidence_interval
    made = Row(name, float(right_S.mean()), float(spread.low), float(spread.high), kept)
    print(f"{name:24} recall at 1 {made.recall:.1%} [{made.low:.1%}, {made.high:.1%}]  linears {kept:.1%}", file=sys.stderr)
    return made


def main(asked: argparse.Namespace) -> list[Row]:
    """Train, score once, prune by every score, and measure."""
    model, luck = trained(asked.steps), torch.Generator().manual_seed(1)
    order = torch.randperm(len(CAPTIONS), generator=luck).tolist()
    seen, judged = (drawn([CAPTIONS[n] for n in part], luck) for part in (order[: asked.pairs], order[-asked.pairs :]))
    anatomies: dict[str, Any] = {tower: anatomy_of(getattr(model, tower), tower) for tower in TOWERS}
    modules = modules_of(anatomies)
    rows = [row("dense", model, judged, 1.0)]
    for name, score in SCORES.items():
        scores = score(model, anatomies, modules, seen)
        for remove in asked.remove:
            made, kept = without(model, anatomies, modules, scores, remove)
            rows.append(row(f"{name} -{remove:.0%}", made, judged, kept))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prune a small dual encoder.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    print(json.dumps([asdict(one) for one in main(parser.parse_args())], indent=1))
