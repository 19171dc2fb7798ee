"""One pass over the matrices of a recipe: in which order they are made, which together, and what of an earlier start is found again.

Knows jobs, the calibration walk and the store; the mathematics is the methods'.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.engine import mixing
from bitpress.engine.after_stats import write_after
from bitpress.engine.blockwise import Reconstruction
from bitpress.engine.calibrate import Requests, walk
from bitpress.engine.calibration_set import CalibrationSet
from bitpress.engine.checkpoint import Checkpoint
from bitpress.engine.errors import Cancelled
from bitpress.engine.layer_install import install
from bitpress.engine.layer_job import LayerJob
from bitpress.engine.layer_make import dense_weight, finished, make_layer, prepared
from bitpress.engine.layer_store import LayerStore, MadeFrom, StoredLayer
from bitpress.engine.mask_stats import write_mask
from bitpress.engine.methods.base import Statistics
from bitpress.engine.model import surgery
from bitpress.engine.pace import Pace
from bitpress.engine.shape import Shaped
from bitpress.engine.statistics import BEHIND, WEIGHTED
from bitpress.engine.token_weights import token_weights
from bitpress.engine.train import Learner, Student, Training
from bitpress.kernels.packed import PackedLinear

Emit = Callable[[str, dict[str, Any]], None]
ShouldStop = Callable[[], bool]


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
class Making:
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
    pace: Pace = field(init=False)

    stage_begun: float = 0.0
    weights_under_way: int = 0

    def __post_init__(self) -> None:
        self.sizes = {job.part.name: job.part.numel for job in self.jobs}
        self.pace = Pace(sum(self.sizes.values()), self.shaped.anatomy.blocks)

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
        requests = {job.place: set(job.needs - BEHIND) for job in inside if job.needs}
        readers = mixing.readers({job.place for job in inside if job.needs & BEHIND}, self.shaped.anatomy)
        for reader in readers.values():
            requests.setdefault(reader.name, set()).add("loss_gram")
        blocks: dict[int, list[LayerJob]] = {}
        for job in inside:
            blocks.setdefault(self.shaped.anatomy.by_name[job.place].block or 0, []).append(job)
        if any(job.trained for job in inside):
            twin = surgery.twin(self.shaped.model)
            self.side = Reconstruction(twin, self.shaped.anatomy, calibration.ids_SL, self.seed, self.hear_training, self.should_stop)
        seen: dict[str, Statistics] = {}

        def on_block(block: int, stats: Mapping[str, Statistics]) -> None:
            stats = mixing.with_mixed(stats, readers, self.shaped.model, self.shaped.anatomy)
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
            dtype=torch.float32 if any(job.precise for job in inside) and not self.side else None,
            should_stop=self.should_stop,
            on_inputs=self.enter,
            weights=self.token_weights(requests, calibration),
        )

    def enter(self, block: int, hidden: list[Tensor]) -> None:
        """The walk stands before a block."""
        self.pace.enter()
        if self.side:
            self.side.enter(block, hidden)

    def token_weights(self, requests: Requests, calibration: CalibrationSet) -> dict[str, Tensor]:
        """How much each token counts for the layers whose statistics weigh tokens; one backward of the model as it stands."""
        layers = [place for place, kinds in requests.items() if kinds & WEIGHTED]
        if not layers:
            return {}
        self.note("Looking at what an error at each token does to the predictions, by one backward.")
        return token_weights(self.shaped.model, self.shaped.anatomy, calibration.ids_SL, layers, self.seed, self.should_stop)

    def by_stage(self, jobs: list[LayerJob], together: Callable[[list[LayerJob]], list[StoredLayer]]) -> None:
        """Make matrices together, those of one stage after those of another; what a stage has finished is found again."""
        stages = list(dict.fromkeys(id(job.methods[-1]) for job in jobs))
        for stage in stages:
            self.one_stage([job for job in jobs if id(job.methods[-1]) == stage], together)

    def hear_training(self, kind: str, data: dict[str, Any]) -> None:
        """Pass on what a training says, and how far the whole is by it."""
        self.emit(kind, data)
        if kind == "block_loss" and data["step"]:
            self.tell_progress(data["step"] / data["steps"] * self.weights_under_way, time.perf_counter() - self.stage_begun)

    def one_stage(self, jobs: list[LayerJob], together: Callable[[list[LayerJob]], list[StoredLayer]]) -> None:
        """What one stage makes, unless all of it is finished."""
        begun = self.stage_begun = time.perf_counter()
        self.weights_under_way = sum(job.part.numel for job in jobs)
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
        for job, weight in zip(jobs, weights, strict=True):
            for note in weight.notes:
                self.note(f"{job.part.name}: {note}.")
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
        drawn = self.store is not None and not reused and job.part.block is not None
        dense_NK = dense_weight(surgery.get(self.shaped.model, job.place), job).clone() if drawn else None
        kernel, reason = install(self.shaped.model, job, stored)
        if dense_NK is not None and self.store is not None:
            self.draw(self.store.folder.parent, job, dense_NK)
        return LayerResult(stored.layer, stored.method, stored.error, stored.nbytes, round(seconds, 4), kernel, reason, reused)

    def draw(self, folder: Path, job: LayerJob, dense_NK: Tensor) -> None:
        """Write down what screens draw of a finished matrix."""
        module = surgery.get(self.shaped.model, job.place)
        made_NK = module.dequantize() if isinstance(module, PackedLinear) else dense_weight(module, job)
        write_after(folder, job.part.name, dense_NK, made_NK.float(), job.scheme.weights.group_size if job.scheme.weights else 0)
        if job.scheme.sparsity is not None:
            write_mask(folder, job.part.name, dense_NK, made_NK)

    def note(self, text: str) -> None:
        self.emit("note", {"level": "info", "text": text})

    def tell(self) -> None:
        result = self.results[-1]
        if result.reused:
            self.pace.found(self.sizes[result.layer])
        else:
            self.pace.add(self.sizes[result.layer], result.seconds)
        self.emit("layer_done", vars(result).copy())
        self.tell_progress()

    def tell_progress(self, under_way: float = 0.0, spent: float = 0.0) -> None:
        """How many matrices are done, and the time left. under_way: weights that a training has as good as made, in `spent` seconds."""
        left = self.pace.left(under_way, spent)
        self.emit("progress", {"done": len(self.results), "total": len(self.jobs), "eta_s": None if left is None else round(left, 2)})
