"""Run a recipe on a model: block by block, every finished layer durable. Knows the order of things; the mathematics is the methods'.

The dense model stays whole and untouched: the compressed one is a twin that shares its weights, and only what a scheme
changes is replaced in it, by packed codes or by new dense weights. Memory grows by the packed model and one layer's work.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine.accounting import embedding_layout, kept_whole, layout_of, settled
from bitpress.engine.blockwise import Reconstruction
from bitpress.engine.calibrate import walk
from bitpress.engine.calibration_set import CalibrationSet, calibration_set
from bitpress.engine.checkpoint import Checkpoint
from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.layer_store import LayerStore, MadeFrom, StoredLayer
from bitpress.engine.mask_stats import write_mask
from bitpress.engine.measure.memory import weights_of
from bitpress.engine.methods import registry
from bitpress.engine.methods.base import (
    BlockMethod,
    BlockOptions,
    LinearMethod,
    Method,
    MethodOptions,
    ModelMethod,
    Outcome,
    Statistics,
    TrainingOptions,
    TurningMethod,
    finite,
)
from bitpress.engine.methods.catalogue import problems
from bitpress.engine.methods.lowrank.pipeline import act
from bitpress.engine.methods.stages import plan_stages
from bitpress.engine.model import surgery
from bitpress.engine.model.anatomy import Anatomy, Part
from bitpress.engine.model.load import Loaded
from bitpress.engine.prepare import needs_text, preparations, prepare, prepare_again
from bitpress.engine.recipe import EmbeddingScheme, Recipe, Scheme, WeightScheme
from bitpress.engine.shape import Shaped, chosen_for, reads_text, restore, shape_stages, shape_twin
from bitpress.engine.train import Learner, Student, Training
from bitpress.kernels.formats import PackedTensor, pack
from bitpress.kernels.layout import BitmapLayout, DenseLayout, FactorLayout, Layout, PairLayout, TwoFourLayout, UniformLayout
from bitpress.kernels.packed import PackedEmbedding, PackedLinear
from bitpress.kernels.pairs import dense as pack_dense
from bitpress.kernels.pairs import pack_pair
from bitpress.kernels.reference import dequantize
from bitpress.kernels.sparse import pack_bitmap, pack_two_four, pack_two_four_codes

__all__ = ["Compressed", "LayerResult", "LayerStore", "compress", "load_compressed"]
Emit = Callable[[str, dict[str, Any]], None]
ShouldStop = Callable[[], bool]
Step = tuple[LinearMethod | BlockMethod | ModelMethod, MethodOptions]
Tell = Callable[[str], None]
DENSE_REASON = "stored dense, 0% smaller: no format here stores a matrix of so few zeros smaller"


@dataclass(frozen=True)
class LayerResult:
    """One finished matrix.

    error: ||W - W'|| / ||W||, Frobenius norms. bytes: stored. seconds: spent on it now. kernel, reason: what multiplies it
    in decoding and why nothing faster does. reused: it was taken from an earlier start of the same run.
    """

    layer: str
    method: str
    error: float
    bytes: int
    seconds: float
    kernel: str
    reason: str
    reused: bool = False


@dataclass
class Compressed:
    """The compressed model beside its dense twin, its matrices in the order in which they were made, and its stored bytes.

    recipe: the one given, with what its stages chose to remove.
    """

    model: nn.Module
    layers: list[LayerResult]
    bytes: int
    seconds: float
    recipe: Recipe


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
    def trained(self) -> tuple[BlockMethod, BlockOptions] | None:
        """The method that optimises it with the rest of its block, if one does; it is always the last."""
        method, options = self.methods[-1]
        return (method, options) if isinstance(method, BlockMethod) and isinstance(options, BlockOptions) else None

    @property
    def taught(self) -> tuple[ModelMethod, TrainingOptions] | None:
        """The method that trains it with the rest of the model, if one does; it is always the last."""
        method, options = self.methods[-1]
        return (method, options) if isinstance(method, ModelMethod) and isinstance(options, TrainingOptions) else None


def quiet(kind: str, data: dict[str, Any]) -> None:
    """An `emit` that says nothing."""


def never() -> bool:
    """A `should_stop` that never stops."""
    return False


def compress(
    loaded: Loaded,
    recipe: Recipe,
    emit: Emit = quiet,
    store: LayerStore | None = None,
    should_stop: ShouldStop = never,
    calibration: CalibrationSet | None = None,
) -> Compressed:
    """Make the model that a recipe describes.

    Says `stage_started`, and for every matrix `layer_done` and `progress`. With a store every finished layer is written,
    and found again by a later call. calibration: None draws the recipe's own text, if a method needs any. Raises
    InputError when the recipe does not fit the model, Cancelled when told to stop, BitpressError when a layer cannot be
    kept or belongs to another run.
    """
    _check(recipe, loaded.anatomy)
    _check_turns(recipe)
    started = time.perf_counter()
    texts = _Texts(loaded, recipe, calibration)
    folder = store.folder.parent if store else None
    if any(preparations(recipe)):
        text = texts.get(needs_text(recipe))
        loaded = prepare(loaded, recipe, text.ids_SL if text else None, texts.made_from(text), folder, emit, should_stop)
    text = texts.get(reads_text(recipe))
    chosen = chosen_for(loaded, recipe, text.ids_SL if text else None, texts.made_from(text), emit, folder, should_stop)
    shaped = shape_twin(loaded, chosen)
    jobs = plan_jobs(chosen.recipe, loaded.anatomy, shaped.places)
    calibration = texts.get(any(job.needs or job.trained or job.taught for job in jobs))
    made_from = texts.made_from(calibration)
    if store:
        store.check(job.part.name for job in jobs)
    tell_whole(chosen.recipe, loaded.anatomy, emit)
    making = _Making(loaded.model, shaped, jobs, made_from, recipe.seed, emit, store, should_stop)
    making.run(calibration)
    size = weights_of(shaped.model, loaded.anatomy.block_prefix, loaded.anatomy.itemsize).stored_bytes
    return Compressed(shaped.model, making.results, size, time.perf_counter() - started, chosen.recipe)


class _Texts:
    """The text that a run may look at, drawn once and only when something asks for it."""

    def __init__(self, loaded: Loaded, recipe: Recipe, given: CalibrationSet | None) -> None:
        self.loaded, self.recipe, self.drawn = loaded, recipe, given

    def get(self, needed: bool) -> CalibrationSet | None:
        """The text; None when it is not needed."""
        if not needed:
            return None
        self.drawn = self.drawn or calibration_set(self.loaded, self.recipe.calibration, self.recipe.seed)
        return self.drawn

    def made_from(self, text: CalibrationSet | None) -> MadeFrom:
        """What a result depends on that has looked at this text."""
        return MadeFrom(self.loaded.anatomy.fingerprint, self.recipe.digest(), text.sha256 if text else "")


def tell_whole(recipe: Recipe, anatomy: Anatomy, emit: Emit) -> None:
    """Say which layers stay whole because their factors would be no smaller."""
    if layers := kept_whole(recipe, anatomy):
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        emit("note", {"level": "info", "text": f"{layers[0]}{others} stay whole: at or past the break-even rank two factors are no smaller than the matrix."})


def load_compressed(run_folder: Path, loaded: Loaded) -> nn.Module:
    """The compressed model of a finished run, rebuilt from its layers on the dense model it was made from.

    Raises BitpressError when a layer is missing, damaged or was made from something else.
    """
    folder = Path(run_folder)
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store, made_from = LayerStore(folder), MadeFrom(loaded.anatomy.fingerprint, recipe.digest(), calibration=None)
    if any(preparations(recipe)):
        loaded = prepare_again(loaded, recipe, folder, made_from)
    chosen = restore(recipe, folder, made_from)
    shaped = shape_twin(loaded, chosen)
    for job in plan_jobs(chosen.recipe, loaded.anatomy, shaped.places):
        stored = store.load(job.part.name, made_from)
        if stored is None:
            raise BitpressError(f"The run {folder.name} is not finished.", f"The layer {job.part.name} is missing.", "Resume the run.")
        install(shaped.model, job, stored)
    return shaped.model


def _check(recipe: Recipe, anatomy: Anatomy) -> None:
    if found := problems(recipe, anatomy, registry.catalogue()):
        raise InputError("This recipe does not fit the model.", " ".join(map(str, found)), "Correct the named fields and try again.")


def _check_turns(recipe: Recipe) -> None:
    """A turning preparation mixes neurons, so that none of them could be taken out of a model by itself afterwards."""
    structure = recipe.structure
    cuts = shape_stages(recipe) or structure.remove_heads or structure.remove_neurons
    if cuts and any(isinstance(method, TurningMethod) for _, method, _ in preparations(recipe)):
        why = "A rotation mixes the neurons that would be removed."
        raise InputError("This recipe rotates the model and removes parts of it.", why, "Leave out the rotation, or what removes heads, neurons or blocks.")


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


def make_layer(module: nn.Module, job: LayerJob, stats: Statistics, tell: Tell = lambda note: None) -> StoredLayer:
    """Run the job's methods on one matrix; `tell` hears what a method has to say of it. Raises InputError as `dense_weight` and `prepared`."""
    dense_NK = dense_weight(module, job)
    return finished(module, job, dense_NK, prepared(dense_NK, job, stats, tell))


def dense_weight(module: nn.Module, job: LayerJob) -> Tensor:
    """A matrix of the dense model, float32 [N, K]. Raises InputError that names the layer when its weights are not finite."""
    dense = module.weight if isinstance(module, nn.Embedding) else surgery.linear_weight(module)
    return finite(dense.detach().float(), job.part.name)


def prepared(weight_NK: Tensor, job: LayerJob, stats: Statistics, tell: Tell) -> Outcome:
    """What those of the job's methods make of a matrix that act on one matrix alone. Raises InputError when no calibration token reached it."""
    if job.needs - stats.keys():
        remedy = "Calibrate on more text, or point a method at it that looks at no text."
        raise InputError(f"The layer {job.part.name} cannot be compressed.", "No token of the calibration text reached it.", remedy)
    outcome = Outcome(weight_NK)
    for method, options in job.methods:
        if isinstance(method, LinearMethod):
            outcome = act(method, outcome, job.asked_of(method), stats, options)
            for note in outcome.notes:
                tell(f"{job.part.name}: {note}.")
    return outcome


def finished(module: nn.Module, job: LayerJob, dense_NK: Tensor, outcome: Outcome) -> StoredLayer:
    """An outcome in its stored form, and how far it is from the dense matrix of the module."""
    dtype = next(module.parameters()).dtype
    content = stored_form(outcome, job.layout, dtype)
    plain = outcome.codes is None and outcome.packed is None
    made_NK = outcome.weight_NK.to(dtype).float() if plain else outcome.weight_NK
    if outcome.factors:
        assert isinstance(content, PackedTensor)
        made_NK = dequantize(content)
    return StoredLayer(job.part.name, content, job.method, relative_error(dense_NK, made_NK), _with_bias(module, outcome.bias_N, dtype))


def _with_bias(module: nn.Module, added_N: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The layer's bias with what a method adds to it; None where nothing is added."""
    if added_N is None:
        return None
    own_N = _bias(module)
    return (added_N if own_N is None else own_N.detach().float() + added_N).to(dtype)


def stored_form(outcome: Outcome, layout: Layout, dtype: torch.dtype) -> PackedTensor | Tensor:
    """What is kept of an outcome: its codes or its zeros packed as the layout says, else its weights in `dtype`.

    Raises ValueError when a method hands over a packed matrix of another layout, or weights that break the pattern of the layout.
    """
    match layout, outcome.codes:
        case _, _ if outcome.packed is not None:
            if outcome.packed.layout != layout:
                raise ValueError(f"a matrix of {outcome.packed.layout} was handed over where the scheme asks for {layout}")
            return outcome.packed
        case PairLayout(), _ if outcome.factors:
            left, right = (_factor(made, side, dtype) for made, side in zip(outcome.factors, (layout.left, layout.right), strict=True))
            return pack_pair(left, right, layout)
        case UniformLayout(), codes if codes is not None:
            return pack(*codes, layout)
        case TwoFourLayout(), codes if codes is not None:
            return pack_two_four_codes(*codes, layout)
        case TwoFourLayout(values=DenseLayout(itemsize)), _:
            return pack_two_four(outcome.weight_NK.to(_sized(dtype, itemsize)), layout)
        case BitmapLayout(itemsize=itemsize), _:
            return pack_bitmap(outcome.weight_NK.to(_sized(dtype, itemsize)), layout)
    return outcome.weight_NK.to(dtype)


def _factor(outcome: Outcome, layout: FactorLayout, dtype: torch.dtype) -> PackedTensor:
    kind = _sized(dtype, layout.itemsize) if isinstance(layout, DenseLayout) else dtype
    content = stored_form(outcome, layout, kind)
    return content if isinstance(content, PackedTensor) else pack_dense(content)


def _sized(dtype: torch.dtype, itemsize: int) -> torch.dtype:
    """The type itself where its numbers have that many bytes; a model may lie in memory in another type than its file."""
    return dtype if dtype.itemsize == itemsize else torch.bfloat16 if itemsize == 2 else torch.float32


def relative_error(weight_NK: Tensor, made_NK: Tensor) -> float:
    """||W - W'|| / ||W||, 0 for a matrix of zeros."""
    norm = torch.linalg.vector_norm(weight_NK)
    return float(torch.linalg.vector_norm(weight_NK - made_NK) / norm) if norm > 0 else 0.0


def install(model: nn.Module, job: LayerJob, stored: StoredLayer) -> tuple[str, str]:
    """Put a finished matrix in its place; returns the kernel that multiplies it in decoding, and why."""
    module = surgery.get(model, job.place)
    if not isinstance(stored.content, PackedTensor):
        surgery.set_linear_weight(module, stored.content)
        return "dense", DENSE_REASON
    if isinstance(module, nn.Embedding):
        return _install_embedding(model, job.place, module, stored.content)
    bias_N = _bias(module) if stored.bias_N is None else stored.bias_N
    rounding = job.scheme.activations
    packed = PackedLinear(stored.content, bias_N, *((rounding.bits, rounding.outliers) if rounding else ()))
    surgery.replace(model, job.place, packed)
    return packed.kernel, packed.reason


def _bias(module: nn.Module) -> Tensor | None:
    return module.bias if isinstance(module.bias, Tensor) else None


def _install_embedding(model: nn.Module, place: str, module: nn.Embedding, content: PackedTensor) -> tuple[str, str]:
    """Replace the embedding, and the head that is tied to it by a layer on the same storage."""
    packed = PackedEmbedding(content, module.weight.dtype)
    scale = getattr(module, "embed_scale", None)
    if scale is not None:  # Gemma 3 multiplies inside its embedding module
        packed.register_forward_hook(lambda _, __, rows: rows * torch.as_tensor(scale).to(rows.dtype))
    head = next((name for name, other in model.named_modules() if isinstance(other, nn.Linear) and other.weight is module.weight), None)
    surgery.replace(model, place, packed)
    if head is None:
        return "lookup", "rows are looked up and dequantised"
    tied = packed.head(_bias(surgery.get(model, head)))
    surgery.replace(model, head, tied)
    return tied.kernel, tied.reason


@dataclass
class _Making:
    """One pass over the jobs; holds what has been made so far."""

    dense: nn.Module  # what a training learns from
    shaped: Shaped
    jobs: list[LayerJob]
    made_from: MadeFrom
    seed: int
    emit: Emit
    store: LayerStore | None
    should_stop: ShouldStop
    side: Reconstruction | None = None  # the dense stream, where a method compares with it
    results: list[LayerResult] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def run(self, calibration: CalibrationSet | None) -> None:
        """Make everything: through the calibration walk where a method needs statistics, else straight on."""
        self.emit("stage_started", {"stage": "compressing", "total": len(self.jobs)})
        alone = [job for job in self.jobs if not job.taught]
        inside = [job for job in alone if job.part.block is not None]
        if calibration and any(job.needs or job.trained for job in inside):
            self.walk(inside, calibration)
        else:
            self.make(inside, {})
        if calibration:
            self.by_stage([job for job in self.jobs if job.taught], lambda jobs: self.taught(jobs, calibration))
            self.drop_checkpoint()
        self.make([job for job in alone if job.part.block is None], {})

    def walk(self, inside: list[LayerJob], calibration: CalibrationSet) -> None:
        """Block by block: each block's inputs have passed through the compressed blocks before it."""
        requests = {job.place: set(job.needs) for job in inside if job.needs}
        blocks: dict[int, list[LayerJob]] = {}
        for job in inside:
            blocks.setdefault(self.shaped.anatomy.by_name[job.place].block or 0, []).append(job)
        if any(job.trained for job in inside):
            self.side = Reconstruction(surgery.twin(self.shaped.model), self.shaped.anatomy, calibration.ids_SL, self.seed, self.emit, self.should_stop)
        seen: dict[str, Statistics] = {}

        def on_block(block: int, stats: Mapping[str, Statistics]) -> None:
            seen.update(stats)
            ready = [job for job in blocks.get(block, []) if not job.needs or job.place in seen]
            alone = [job for job in ready if not job.trained]
            self.make(alone, stats)
            blocks[block] = [job for job in blocks.get(block, []) if job not in alone]
            if len(blocks[block]) == len(ready) - len(alone):  # what is left is trained, with the rest of the block in place
                self.by_stage(blocks.pop(block), lambda jobs: self.trained(jobs, seen))

        walk(
            self.shaped.model,
            self.shaped.anatomy,
            calibration.ids_SL,
            requests,
            on_block,
            within_block=any(job.within_block for job in inside),
            should_stop=self.should_stop,
            on_inputs=self.side.enter if self.side else None,
        )

    def by_stage(self, jobs: list[LayerJob], together: Callable[[list[LayerJob]], list[StoredLayer]]) -> None:
        """Make matrices together, those of one stage after those of another; what a stage has finished is found again."""
        stages = list(dict.fromkeys(id(job.methods[-1]) for job in jobs))
        for stage in stages:
            self.one_stage([job for job in jobs if id(job.methods[-1]) == stage], together)

    def one_stage(self, jobs: list[LayerJob], together: Callable[[list[LayerJob]], list[StoredLayer]]) -> None:
        """What one stage makes, unless all of it is finished."""
        begun = time.perf_counter()
        found = [self.store.load(job.part.name, self.made_from) if self.store else None for job in jobs]
        reused = all(found)
        stored = [layer for layer in found if layer] if reused else together(jobs)
        for job, layer in zip(jobs, stored, strict=True):
            if self.store and not reused:
                self.store.save(layer, self.made_from)
            self.results.append(self.installed(job, layer, (time.perf_counter() - begun) / len(jobs), reused))
            self.tell()

    def trained(self, jobs: list[LayerJob], stats: Mapping[str, Statistics]) -> list[StoredLayer]:
        assert self.side is not None and jobs[0].trained is not None
        method, options = jobs[0].trained
        modules = [surgery.get(self.shaped.model, job.place) for job in jobs]
        dense = [dense_weight(module, job) for module, job in zip(modules, jobs, strict=True)]
        given = [stats.get(job.place, {}) for job in jobs]
        prunes = [prepared(weight_NK, job, seen, self.note).weight_NK for weight_NK, job, seen in zip(dense, jobs, given, strict=True)]
        weights = [method.start(weight_NK, job.asked_of(method), seen, options) for weight_NK, job, seen in zip(prunes, jobs, given, strict=True)]
        self.side.train(self.shaped.model, {job.place: weight for job, weight in zip(jobs, weights, strict=True)}, options)
        return [finished(module, job, dense_NK, weight.outcome()) for module, job, dense_NK, weight in zip(modules, jobs, dense, weights, strict=True)]

    def taught(self, jobs: list[LayerJob], calibration: CalibrationSet) -> list[StoredLayer]:
        """Train what one stage makes of the whole model, the other matrices in place; the dense model is the teacher."""
        assert jobs[0].taught is not None
        method, options = jobs[0].taught
        modules = [surgery.get(self.shaped.model, job.place) for job in jobs]
        dense = [dense_weight(module, job) for module, job in zip(modules, jobs, strict=True)]
        pruned = self.pruned(jobs, dense, calibration)
        weights = [method.start(weight_NK, job.asked_of(method), options) for weight_NK, job in zip(pruned, jobs, strict=True)]
        student = Student(self.shaped.model, {job.place: Learner(weight, job.scheme.activations) for job, weight in zip(jobs, weights, strict=True)})
        kept = Checkpoint(self.store.folder.parent, self.made_from, " ".join(job.part.name for job in jobs)) if self.store else None
        text, objective = calibration.ids_SL, method.objective(options)
        Training(self.dense, student, objective, options, text, self.seed, self.emit, self.should_stop, kept).run()
        return [finished(module, job, dense_NK, weight.outcome()) for module, job, dense_NK, weight in zip(modules, jobs, dense, weights, strict=True)]

    def pruned(self, jobs: list[LayerJob], dense: list[Tensor], calibration: CalibrationSet) -> list[Tensor]:
        """What the stages before the training make of each matrix; those that need statistics get those of the model as it stands."""
        requests = {job.place: set(job.needs) for job in jobs if job.needs}
        made: dict[str, Tensor] = {}

        def on_block(block: int, stats: Mapping[str, Statistics]) -> None:
            ready = [(job, weight_NK) for job, weight_NK in zip(jobs, dense, strict=True) if job.place in stats]
            made.update({job.place: prepared(weight_NK, job, stats[job.place], self.note).weight_NK for job, weight_NK in ready})

        if requests:
            walk(self.shaped.model, self.shaped.anatomy, calibration.ids_SL, requests, on_block, should_stop=self.should_stop)
        rest = [(job, weight_NK) for job, weight_NK in zip(jobs, dense, strict=True) if job.place not in made]
        made |= {job.place: prepared(weight_NK, job, {}, self.note).weight_NK for job, weight_NK in rest}
        return [made[job.place] for job in jobs]

    def drop_checkpoint(self) -> None:
        """What was trained is in the layers now."""
        if self.store:
            Checkpoint(self.store.folder.parent, self.made_from, "").remove()

    def make(self, jobs: list[LayerJob], stats: Mapping[str, Statistics]) -> None:
        """Make these matrices from the statistics of their inputs, by place."""
        for job in jobs:
            if self.should_stop():
                raise Cancelled()
            self.results.append(self.layer(job, stats.get(job.place, {})))
            self.tell()

    def layer(self, job: LayerJob, stats: Statistics) -> LayerResult:
        begun = time.perf_counter()
        stored = self.store.load(job.part.name, self.made_from) if self.store else None
        reused = stored is not None
        if stored is None:
            stored = make_layer(surgery.get(self.shaped.model, job.place), job, stats, self.note)
            if self.store:
                self.store.save(stored, self.made_from)
        return self.installed(job, stored, time.perf_counter() - begun, reused)

    def installed(self, job: LayerJob, stored: StoredLayer, seconds: float, reused: bool) -> LayerResult:
        pruned = job.scheme.sparsity is not None and not reused
        dense_NK = dense_weight(surgery.get(self.shaped.model, job.place), job).clone() if pruned and self.store else None
        kernel, reason = install(self.shaped.model, job, stored)
        if dense_NK is not None and self.store:
            module = surgery.get(self.shaped.model, job.place)
            made_NK = module.dequantize() if isinstance(module, PackedLinear) else dense_weight(module, job)
            write_mask(self.store.folder.parent, job.part.name, dense_NK, made_NK)
        return LayerResult(stored.layer, stored.method, stored.error, stored.nbytes, round(seconds, 4), kernel, reason, reused)

    def note(self, text: str) -> None:
        self.emit("note", {"level": "info", "text": text})

    def tell(self) -> None:
        self.emit("layer_done", vars(self.results[-1]).copy())
        done = sum(job.part.numel for job in self.jobs[: len(self.results)])
        left = sum(job.part.numel for job in self.jobs[len(self.results) :])
        eta = (time.perf_counter() - self.started) * left / done
        self.emit("progress", {"done": len(self.results), "total": len(self.jobs), "eta_s": round(eta, 2)})
