"""Stages that prepare: AWQ, SmoothQuant, rotation. Knows the order of things and what must be kept to repeat them; the mathematics is the methods'.

The dense model stays whole and untouched: a twin is changed, and the stages that follow take their weights from it. What
a scaling stage found is a vector for each link, kept in the run's folder as `prepared-<stage>.safetensors` under the
fingerprint that its layers have; a rotation follows from the recipe's seed. So a model is loaded again by folding the
kept vectors into the dense model once more, and no dense matrix is stored for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import computing_in, walk
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.layer_store import LAYER_VERSION, MadeFrom, mismatch, read_tensors, write_tensors
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import MethodOptions, PreparationMethod, ScalingMethod, Statistics, TurningMethod, finite
from bitpress.engine.methods.quantize.pipeline import from_groups, to_groups
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.model.links import Link, fold, links_of, tie_heads
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.engine.targets import matches

Found = dict[str, Tensor]  # "scale:<first reader>" [K] and "limit:<linear>" [N, G]
Emit = Callable[[str, dict[str, Any]], None]
PROBE_TOKENS = 32
SAME = 0.1  # relative change of the logits that rounding alone may cause, a bfloat16 model's included


def preparations(recipe: Recipe) -> Iterator[tuple[int, PreparationMethod, MethodOptions]]:
    """The stages of a recipe that prepare: number, method, options."""
    for number, stage in enumerate(recipe.stages):
        method = registry.get(stage.method)
        if isinstance(method, PreparationMethod):
            yield number, method, method.parse(stage.options)


def needs_text(recipe: Recipe) -> bool:
    """Whether a stage that prepares looks at calibration text."""
    return any(method.needs for _, method, _ in preparations(recipe))


def prepare(
    loaded: Loaded, recipe: Recipe, ids_SL: Tensor | None, made_from: MadeFrom, folder: Path | None, emit: Emit, should_stop: Callable[[], bool]
) -> Loaded:
    """The dense model as the recipe's preparing stages leave it; `loaded` itself when there are none.

    ids_SL: calibration tokens, None when no stage needs any. folder: of the run; what was found is kept there, and found
    again. Raises InputError when a stage changes what the model computes, Cancelled when told to stop.
    """
    model = loaded.model
    for number, method, options in preparations(recipe):
        before, model = model, surgery.twin(model)
        emit("stage_started", {"stage": f"preparing: {method.title}", "total": loaded.anatomy.blocks})
        if isinstance(method, TurningMethod):
            for note in method.turn(model, loaded.anatomy, recipe.seed, options):
                emit("note", {"level": "info", "text": f"{note}."})
            _check_same(method, before, model, loaded.anatomy)
        elif isinstance(method, ScalingMethod):
            found = _load(folder, number, made_from) if folder else None
            if found is None:
                assert ids_SL is not None
                found = _Search(model, loaded.anatomy, recipe, number, method, options).run(ids_SL, emit, should_stop)
                if folder:
                    _save(folder, number, found, made_from)
            _apply(model, loaded.anatomy, found, method, before, recipe)
    return replace(loaded, model=model)


def prepare_again(loaded: Loaded, recipe: Recipe, folder: Path, made_from: MadeFrom) -> Loaded:
    """The prepared model of a finished run. Raises BitpressError when what its stages found is missing, damaged or of another run."""
    for number, method, _ in preparations(recipe):
        if isinstance(method, ScalingMethod) and _load(folder, number, made_from) is None:
            raise BitpressError(f"The run {folder.name} is not finished.", f"{_path(folder, number).name} is missing.", "Resume the run.")
    return prepare(loaded, recipe, None, made_from, folder, lambda kind, data: None, lambda: False)


# Scaling ---------------------------------------------------------------------------------------------------------


class _Search:
    """One scaling stage on one model: what each link's scale and each matrix's limits should be. The model is not changed."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, recipe: Recipe, number: int, method: ScalingMethod, options: MethodOptions) -> None:
        self.model, self.anatomy, self.method, self.options = model, anatomy, method, options
        self.schemes = recipe.resolve(anatomy)
        targets = recipe.stages[number].targets
        kinds = method.kinds(options)
        self.links: dict[int, list[Link]] = {}
        for link in links_of(model, anatomy):
            if link.kind in kinds and all(matches(targets, anatomy.by_name[name], anatomy.blocks) for name in link.readers):
                self.links.setdefault(link.block, []).append(link)

    def run(self, ids_SL: Tensor, emit: Emit, should_stop: Callable[[], bool]) -> Found:
        """Walk the model once, as it is: scales leave every block's output as it was."""
        requests = {link.key: set(self.method.needs) for links in self.links.values() for link in links}
        found: Found = {}

        def on_block(block: int, stats: Mapping[str, Statistics]) -> None:
            found.update(self.block(self.links.get(block, []), stats))
            emit("progress", {"done": block + 1, "total": self.anatomy.blocks})

        walk(self.model, self.anatomy, ids_SL, requests, on_block, sequential=False, should_stop=should_stop)
        return found

    def block(self, links: list[Link], stats: Mapping[str, Statistics]) -> Found:
        """The scales of one block, then the limits of its matrices as the scales leave them."""
        trial, found = surgery.twin(self.model), {}
        for link in links:
            if seen := stats[link.key]:
                scale_K = self.scale(trial, link, seen)
                found[f"scale:{link.key}"] = scale_K
                fold(trial, self.anatomy, link, scale_K)
        for link in links:
            if seen := stats[link.key]:
                found |= self.limits(trial, link, seen, found[f"scale:{link.key}"])
        return found

    def scale(self, trial: nn.Module, link: Link, stats: Statistics) -> Tensor:
        if link.kind == "v":
            stats = {name: tie_heads(value, self.anatomy) if value.ndim == 1 else value for name, value in stats.items()}
        weights = [finite(surgery.linear_weight(surgery.get(trial, name)).detach().float(), name) for name in link.readers]
        scale_K = self.method.scale(weights, [self.schemes.get(name, Scheme()) for name in link.readers], stats, self.options)
        return (tie_heads(scale_K, self.anatomy) if link.kind == "v" else scale_K).float()

    def limits(self, trial: nn.Module, link: Link, stats: Statistics, scale_K: Tensor) -> Found:
        if "gram" not in stats:
            return {}
        gram_KK, found = stats["gram"] / scale_K[:, None] / scale_K, {}
        for name in link.readers:
            weight_NK = surgery.linear_weight(surgery.get(trial, name)).detach().float()
            limit_NG = self.method.limits(weight_NK, self.schemes.get(name, Scheme()), gram_KK, self.anatomy.by_name[name].role, self.options)
            if limit_NG is not None:
                found[f"limit:{name}"] = limit_NG
        return found


def _apply(model: nn.Module, anatomy: Anatomy, found: Found, method: PreparationMethod, before: nn.Module, recipe: Recipe) -> None:
    """Fold what was found into a model, and clip. Raises InputError when the scales alone change what it computes."""
    for link in links_of(model, anatomy):
        if (scale_K := found.get(f"scale:{link.key}")) is not None:
            fold(model, anatomy, link, scale_K)
    _check_same(method, before, model, anatomy)
    for name, scheme in recipe.resolve(anatomy).items():
        if scheme.weights and (limit_NG := found.get(f"limit:{name}")) is not None:
            module = surgery.get(model, name)
            surgery.set_linear_weight(module, clipped(surgery.linear_weight(module), limit_NG, scheme.weights.group_size))


def clipped(weight_NK: Tensor, limit_NG: Tensor, group_size: int) -> Tensor:
    """Weights no larger than their group's limit, [N, K]. limit_NG: [N, G]."""
    groups, limit_NG1 = to_groups(weight_NK.float(), group_size), limit_NG.unsqueeze(-1)
    return from_groups(torch.minimum(torch.maximum(groups, -limit_NG1), limit_NG1), weight_NK.shape)


@torch.inference_mode()
def _logits(model: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> Tensor:
    length = min(PROBE_TOKENS, anatomy.context)
    ids = torch.arange(1, length + 1, device=next(model.parameters()).device)[None] % anatomy.vocab
    with computing_in(model.parameters(), dtype):
        return model(input_ids=ids, use_cache=False).logits.float()


def _change(before: nn.Module, after: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> float:
    """How far the logits of a few tokens are apart, relatively."""
    was, now = (_logits(model, anatomy, dtype) for model in (before, after))
    return float((now - was).norm() / was.norm().clamp(min=1e-6))


def _check_same(method: PreparationMethod, before: nn.Module, after: nn.Module, anatomy: Anatomy) -> None:
    """Raises InputError for a change that rounding does not explain. Where bfloat16 itself moves the logits as far, float32 decides."""
    stored = next(before.parameters()).dtype
    if _change(before, after, anatomy, stored) < SAME:
        return
    change = _change(before, after, anatomy, torch.float32)
    if not change < SAME:
        why = f"Its logits would change by {change:.0%}, although {method.title} should leave them alone."
        raise InputError(f"{method.title} does not fit this model.", why, f"Leave the stage `{method.name}` out.")


# Kept in the run's folder ----------------------------------------------------------------------------------------


def _path(folder: Path, number: int) -> Path:
    return folder / f"prepared-{number}.safetensors"


def _save(folder: Path, number: int, found: Found, made_from: MadeFrom) -> None:
    record = {"v": LAYER_VERSION, "made_from": asdict(made_from), "sha256": _digest(found)}
    write_tensors(_path(folder, number), found, json.dumps(record, sort_keys=True))


def _load(folder: Path, number: int, made_from: MadeFrom) -> Found | None:
    path = _path(folder, number)
    if not path.exists():
        return None
    record, found = read_tensors(path, _digest)
    if changed := made_from.first_change(record["made_from"]):
        raise mismatch(path.name, changed)
    return found


def _digest(found: Found) -> str:
    """Of names and bytes, as these files have had it from the first."""
    digest = hashlib.sha256()
    for name, tensor in sorted(found.items()):
        digest.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
