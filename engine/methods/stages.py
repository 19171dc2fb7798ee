"""Which stage of a recipe does what to which layer. Knows recipes and what methods can do; no torch.

Each part of a layer's scheme is done once, by the first stage that is pointed at the layer and satisfies it.
"""

from dataclasses import dataclass, field

from bitpress.engine.accounting import settled
from bitpress.engine.methods.ability import Ability, wanted_parts
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, Scheme
from bitpress.engine.targets import matches


@dataclass
class Plan:
    """Stage numbers of each layer in the order in which they act, and what is left over."""

    steps: dict[str, list[int]] = field(default_factory=dict)
    unmet: dict[str, list[str]] = field(default_factory=dict)  # part of the scheme -> layers that no stage gives it
    joint: set[str] = field(default_factory=set)  # layers whose last stage also gives a second part in the same pass
    idle: list[int] = field(default_factory=list)  # stages without a layer, preparations for no later stage
    misplaced: list[int] = field(default_factory=list)  # preparations behind what they should prepare for
    late: list[str] = field(default_factory=list)  # layers whose codes would be changed after they were rounded


def plan_stages(recipe: Recipe, anatomy: Anatomy, known: dict[str, Ability]) -> Plan:
    """Match stages to layers. The recipe's patterns must fit the model; a stage of an unknown method does nothing."""
    plan = Plan()
    for name, asked in recipe.resolve(anatomy).items():
        scheme = settled(asked, anatomy.by_name[name], anatomy.itemsize)
        done: list[str] = []
        steps = plan.steps.setdefault(name, [])
        for number, stage in enumerate(recipe.stages):
            ability = known.get(stage.method)
            if ability is None or ability.shapes or not matches(stage.targets, anatomy.by_name[name], anatomy.blocks):
                continue
            if ability.part not in done and ability.satisfies(scheme):
                steps.append(number)
                done.append(ability.part)
        last = known[recipe.stages[steps[-1]].method] if steps else None
        if last and last.also and last.also not in done and last.also_satisfies(scheme):
            plan.joint.add(name)
            done.append(last.also)
        _leftovers(plan, name, scheme, done)
    used = {number for steps in plan.steps.values() for number in steps}
    preparing = {number for number, stage in enumerate(recipe.stages) if (ability := known.get(stage.method)) and ability.part == "prepare"}
    shaping = {number for number, stage in enumerate(recipe.stages) if (ability := known.get(stage.method)) and ability.shapes}
    plan.idle = [number for number in range(len(recipe.stages)) if number not in used | shaping and (number not in preparing or not used)]
    plan.misplaced = sorted(number for number in preparing if used and number > min(used))
    return plan


def _leftovers(plan: Plan, name: str, scheme: Scheme, done: list[str]) -> None:
    for part in wanted_parts(scheme):
        if part not in done:
            plan.unmet.setdefault(part, []).append(name)
    if "weights" in done[:-1]:
        plan.late.append(name)
