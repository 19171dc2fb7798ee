"""Which matrices a recipe changes, into what layout, and by which methods in order. Knows recipes and methods; makes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitpress.engine.accounting import embedding_layout, layout_of, settled
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import BlockMethod, BlockOptions, LinearMethod, Method, MethodOptions, ModelMethod, TrainingOptions
from bitpress.engine.methods.stages import plan_stages
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.recipe import EmbeddingScheme, Recipe, Scheme, WeightScheme
from bitpress.kernels.layout import Layout

Step = tuple[LinearMethod | BlockMethod | ModelMethod, MethodOptions]


@dataclass(frozen=True)
class LayerJob:
    """One matrix to make: its name in the dense model, its place in the compressed one, the layout and the methods in order."""

    part: Part
    place: str
    scheme: Scheme
    layout: Layout
    methods: tuple[Step, ...]  # steps of one stage are one object
    joint: bool = False  # the last method also gives its second part

    @property
    def method(self) -> str:
        """Names of the methods, such as `magnitude + rtn`."""
        return " + ".join(method.name for method, _ in self.methods)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of its inputs that the methods ask for."""
        asked = frozenset[str]().union(*(method.needs_for(options) for method, options in self.methods))
        return asked | {"gram"} if self.scheme.rank and any(method.needs_for(options) for method, options in self.methods[1:]) else asked

    def asked_of(self, method: Method) -> Scheme:
        """The scheme as a method is to see it: without the second part that a later method gives."""
        also = method.ability.also
        return self.scheme.model_copy(update={also: None}) if also and not self.joint else self.scheme

    @property
    def within_block(self) -> bool:
        """Whether a method asks to see what finished layers of the same block put out."""
        return any(method.within_block(options) for method, options in self.methods)

    @property
    def precise(self) -> bool:
        """Whether a method asks for statistics of a float32 walk."""
        return any(method.precise for method, _ in self.methods)

    @property
    def trained(self) -> tuple[BlockMethod, BlockOptions] | None:
        """The method that optimises it with the rest of its block, if one does; it is always the last."""
        method, options = self.methods[-1]
        return (method, options) if isinstance(method, BlockMethod) and isinstance(options, BlockOptions) else None

    @property
    def taught(self) -> tuple[ModelMethod, TrainingOptions] | None:
        """The method that trains it with the rest of the model, if one does; it is always the last."""
        method, options = self.methods[-1]
        return (method, options) if isinstance(method, ModelMethod) and isinstance(options, TrainingOptions) else None


def plan_jobs(recipe: Recipe, anatomy: Anatomy, places: dict[str, str]) -> list[LayerJob]:
    """Every matrix that the recipe changes, block by block in the order in which they run, embedding and head last."""
    methods = [registry.get(stage.method) for stage in recipe.stages]
    known = {number: method for number, method in enumerate(methods) if isinstance(method, LinearMethod | BlockMethod | ModelMethod)}
    staged = {number: (method, method.parse(recipe.stages[number].options)) for number, method in known.items()}
    plan = plan_stages(recipe, anatomy, {method.name: method.ability for method in methods})
    parts = recipe.reduced(anatomy).by_name
    schemes = {name: settled(scheme, parts[name], anatomy.itemsize) for name, scheme in recipe.resolve(anatomy).items()}
    jobs = []
    for name, numbers in plan.steps.items():
        if numbers:
            layout, chosen = layout_of(schemes[name], anatomy.itemsize), tuple(staged[number] for number in numbers)
            jobs.append(LayerJob(parts[name], places[name], schemes[name], layout, chosen, name in plan.joint))
    ends: list[tuple[Part | None, EmbeddingScheme | None]] = [(anatomy.embedding, recipe.embedding), (anatomy.head, recipe.head)]
    return jobs + [_end_job(part, scheme, list(staged.values())) for part, scheme in ends if part and scheme]


def _end_job(part: Part, scheme: EmbeddingScheme, staged: Sequence[Step]) -> LayerJob:
    """Embedding and head have one symmetric scale a row. A stage that trains the model trains them too; without one they are rounded to nearest."""
    rtn, rows = registry.linear("rtn"), Scheme(weights=WeightScheme(bits=scheme.bits, group_size=0, symmetric=True))
    trains = [step for step in staged if isinstance(step[0], ModelMethod) and step[0].satisfies(rows)]
    return LayerJob(part, part.name, rows, embedding_layout(scheme), (trains[0] if trains else (rtn, rtn.parse({})),))
