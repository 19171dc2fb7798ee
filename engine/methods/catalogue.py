"""What methods there are, as a file that a process without torch can read, and whether a recipe's stages fit them.

Knows descriptions; refuses to know algorithms.

`registry.write_catalogue` writes `catalogue.json` under the home folder:
`{v, digest, methods: [{id, title, family, summary, citation, cost, use_when, needs, gradients, acts_on, ability, options}]}` with `options` a JSON
schema, from which a form is drawn, and `digest` a hash of the methods' sources: a file of other sources is out of date.
"""

import hashlib
import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from bitpress.engine.home import home
from bitpress.engine.methods.ability import Ability
from bitpress.engine.methods.options import option_problems
from bitpress.engine.methods.stages import Plan, plan_stages
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Problem, Recipe, Scheme

CATALOGUE_VERSION = 1
PART_WORDS = {"weights": "fewer bits", "sparsity": "zeros", "rank": "low rank"}


def catalogue_path() -> Path:
    """Where the catalogue is kept."""
    return home() / "catalogue.json"


@cache
def sources_digest() -> str:
    """Hash of the source of every method; 16 hex digits."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_catalogue() -> dict[str, Any] | None:
    """The catalogue that belongs to these sources; None when no worker has written it yet."""
    try:
        found = json.loads(catalogue_path().read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("v") != CATALOGUE_VERSION or found.get("digest") != sources_digest():
        return None
    return found


def kinds() -> dict[str, str]:
    """What each known method does in a recipe, by its id: prepare, prune, lowrank, quantize, or the part of a scheme that has no family."""
    words = {"weights": "quantize", "sparsity": "prune", "rank": "lowrank"}
    found = read_catalogue() or {"methods": []}
    return {entry["id"]: words.get(part := entry["ability"]["part"], part) for entry in found["methods"]}


def abilities(catalogue: dict[str, Any]) -> dict[str, Ability]:
    """What each method of a catalogue satisfies, by its id."""
    return {entry["id"]: Ability.model_validate(entry["ability"]) for entry in catalogue["methods"]}


def problems(recipe: Recipe, anatomy: Anatomy, catalogue: dict[str, Any] | None = None) -> list[Problem]:
    """All that keeps a recipe from running on a model: fields, patterns, shapes, structure, and stages.

    Stages are checked against `catalogue`, else against the file that a worker wrote; without either they are not.
    """
    found = recipe.validate_for(anatomy)
    described = catalogue or read_catalogue()
    return found + check_stages(recipe, anatomy, described, fits=not found) if described else found


def check_stages(recipe: Recipe, anatomy: Anatomy, catalogue: dict[str, Any], fits: bool = True) -> list[Problem]:
    """What of the stages cannot work: unknown methods, wrong options, schemes without a stage, stages without work.

    fits: whether the recipe fits the model otherwise; the plan of one that does not would only repeat what is wrong.
    """
    entries = {entry["id"]: entry for entry in catalogue["methods"]}
    found = [*_method_problems(recipe, entries), *_unserved(recipe, entries)]
    if found or not fits:
        return found
    plan = plan_stages(recipe, anatomy, abilities(catalogue))
    return [*_unmet_problems(plan, recipe, anatomy, entries), *_idle_problems(plan, recipe, entries), *_order_problems(plan), *_turned(recipe, entries)]


def _method_problems(recipe: Recipe, entries: dict[str, dict[str, Any]]) -> list[Problem]:
    found = []
    for number, stage in enumerate(recipe.stages):
        if stage.method in entries:
            found += option_problems(f"stages[{number}].options", stage.options, entries[stage.method]["options"])
            continue
        near = get_close_matches(stage.method, entries, 1)
        wrong = f"There is no method '{stage.method}'" + (f"; did you mean '{near[0]}'?" if near else ".")
        found.append(Problem(field=f"stages[{number}].method", wrong=wrong, right=f"Methods are {', '.join(sorted(entries))}."))
    return found


def _unserved(recipe: Recipe, entries: dict[str, dict[str, Any]]) -> list[Problem]:
    """Fields of a recipe that no method, or no stage of this recipe, acts on."""
    found = []
    sharing = [name for name, entry in entries.items() if "sharing" in entry["ability"].get("units", ())]
    if recipe.structure.share_blocks and not any(stage.method in sharing for stage in recipe.stages):
        right = f"Add a stage such as `method: {sharing[0]}`." if sharing else "Remove the field."
        found.append(Problem(field="structure.share_blocks", wrong="Blocks are to share their matrices, but no stage makes them common.", right=right))
    if recipe.structure.stream:
        wrong = "The directions of the hidden states are a stage's to choose."
        found.append(Problem(field="structure.stream", wrong=wrong, right="Remove the field, and add a stage `method: slicegpt`."))
    for kind in ("heads", "neurons"):
        able = [name for name, entry in entries.items() if kind in entry["ability"].get("units", ())]
        if getattr(recipe.structure, kind) and not any(stage.method in able for stage in recipe.stages):
            right = f"Add a stage such as `method: {able[0]}`." if able else "Remove the field."
            found.append(Problem(field=f"structure.{kind}", wrong=f"Asks for fewer {kind}, but no stage chooses them.", right=right))
    return found


def _unmet_problems(plan: Plan, recipe: Recipe, anatomy: Anatomy, entries: dict[str, dict[str, Any]]) -> list[Problem]:
    schemes = recipe.resolve(anatomy)
    found = []
    for part, layers in plan.unmet.items():
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        able = sorted(
            (len(entry["needs"]), len(entry["options"].get("properties", {})), name)  # the plainest is proposed
            for name, entry in entries.items()
            if Ability.model_validate(entry["ability"]).satisfies(_only(part, schemes[layers[0]]))
        )
        right = f"Add a stage such as `method: {able[0][-1]}`, or point one at these layers." if able else f"Remove `{part}` from the scheme."
        right = _without_zeros(schemes[layers[0]], recipe, entries) or right
        found.append(Problem(field=f"schemes ({layers[0]}{others})", wrong=f"Asks for {PART_WORDS[part]}, but no stage does that.", right=right))
    return found


def _without_zeros(scheme: Scheme, recipe: Recipe, entries: dict[str, dict[str, Any]]) -> str:
    """What to say where a stage of the recipe could do it, had the codes no zeros; else nothing."""
    if scheme.weights is None or scheme.weights.symmetric:
        return ""
    plain = Scheme(weights=scheme.weights.model_copy(update={"symmetric": True}))
    able = [stage.method for stage in recipe.stages if Ability.model_validate(entries[stage.method]["ability"]).satisfies(plain)]
    return f"Set `symmetric: true`: {able[0]} makes codes without zeros only." if able else ""


def _only(part: str, scheme: Scheme) -> Scheme:
    return Scheme(**{part: getattr(scheme, part)})


def _idle_problems(plan: Plan, recipe: Recipe, entries: dict[str, dict[str, Any]]) -> list[Problem]:
    found = []
    for number in plan.idle:
        stage = recipe.stages[number]
        part = entries[stage.method]["ability"]["part"]
        if part == "prepare":
            wrong = f"The stage {stage.method} has nothing to prepare for: no other stage does anything."
            found.append(Problem(field=f"stages[{number}]", wrong=wrong, right="Remove the stage, or add one such as `method: rtn` after it."))
            continue
        wrong = f"The stage {stage.method} has nothing to do: no layer it is pointed at still needs {PART_WORDS[part]}."
        found.append(Problem(field=f"stages[{number}]", wrong=wrong, right=f"Remove the stage, or set `{part}` in a scheme."))
    return found


def _order_problems(plan: Plan) -> list[Problem]:
    misplaced = [Problem(field=f"stages[{number}]", wrong="Comes after what it should prepare for.", right="Put it first.") for number in plan.misplaced]
    if not plan.late:
        return misplaced
    wrong = f"Would change {plan.late[0]} after its weights were rounded to codes."
    return [*misplaced, Problem(field="stages", wrong=wrong, right="Put stages that prune or factor before stages that quantise.")]


def _turned(recipe: Recipe, entries: dict[str, dict[str, Any]]) -> list[Problem]:
    """A preparation that turns the whole model mixes its neurons: none of them could be taken out by itself afterwards."""
    turns = [stage.method for stage in recipe.stages if entries[stage.method]["acts_on"] == "model" and entries[stage.method]["ability"]["part"] == "prepare"]
    chosen = any(Ability.model_validate(entries[stage.method]["ability"]).shapes for stage in recipe.stages)
    if not turns or not (chosen or recipe.structure.remove_heads or recipe.structure.remove_neurons):
        return []
    wrong = f"The stage {turns[0]} rotates the model and mixes the neurons that would be removed."
    return [Problem(field="stages", wrong=wrong, right=f"Leave out {turns[0]}, or what removes heads, neurons or blocks.")]
