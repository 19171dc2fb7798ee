"""Which stages a recipe needs: one for every family that its schemes ask for, none that has nothing to do. Knows families of methods; torch-free."""

from collections.abc import Mapping

from bitpress.engine.accounting import settled
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.recipe import Recipe, Stage

DEFAULT_METHODS = {"structure": "magnitude-structured", "prune": "magnitude", "lowrank": "svd-llm", "quantize": "rtn"}  # in the order in which they run


def fit_stages(recipe: Recipe, anatomy: Anatomy, family_of: Mapping[str, str] | None = None) -> Recipe:
    """A stage for every family that the schemes ask for, pruning and factoring before quantising, and none that has nothing to do."""
    families = {name: family for family, name in DEFAULT_METHODS.items()} | dict(family_of or {})
    own = {name for name, family in families.items() if family == "structure"} - {DEFAULT_METHODS["structure"]}
    schemes = [settled(scheme, anatomy.by_name[name], anatomy.itemsize) for name, scheme in recipe.resolve(anatomy).items()]
    asked = {
        "quantize": any(scheme.weights for scheme in schemes),
        "lowrank": any(scheme.rank for scheme in schemes),
        "prune": any(scheme.sparsity and scheme.sparsity.ratio for scheme in schemes),
        "structure": recipe.structure.shares,
    }
    own |= {stage.method for stage in recipe.stages if stage.method == DEFAULT_METHODS["structure"] and stage.options}  # its options say how much goes
    stages = [stage for stage in recipe.stages if stage.method in own or asked.get(families.get(stage.method, ""), True)]
    for family, method in DEFAULT_METHODS.items():
        if asked[family] and not any(families.get(stage.method) == family for stage in stages):
            stage = Stage(method=method)
            stages = [*stages, stage] if family == "quantize" else _before(stages, stage, families)
    return recipe.model_copy(update={"stages": stages})


def _before(stages: list[Stage], stage: Stage, families: Mapping[str, str]) -> list[Stage]:
    """The stage put before the first one of a later family: what changes shapes, then what prunes, then what rounds."""
    order = list(DEFAULT_METHODS)
    mine = order.index(families[stage.method])
    later = [index for index, other in enumerate(stages) if families.get(other.method) in order[mine + 1 :]]
    at = later[0] if later else len(stages)
    return [*stages[:at], stage, *stages[at:]]
