"""What each kind of run does, one small function a kind. Knows which engine functions to call in which order; computes nothing itself.

Every function gets the run's Task: what was asked, a voice, progress, the wish to stop. It leaves its result in files.
torch comes in where a kind first needs it: a download needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bitpress.engine import similarity_file
from bitpress.engine.data.texts import fetch_text, resolve_text
from bitpress.engine.errors import InputError
from bitpress.engine.home import models_dir
from bitpress.engine.model import library
from bitpress.engine.recipe import CACHED, Calibration, Measure, Recipe
from bitpress.engine.runs import machine
from bitpress.engine.runs.jobs import digest_of
from bitpress.engine.runs.store import Store
from bitpress.engine.runs.task import Task

if TYPE_CHECKING:
    from torch import nn

    from bitpress.engine.model.load import Loaded

DENSE = "dense"
PROMPTS = 3
NEW_TOKENS = 48


def compress(task: Task) -> None:
    """Load, compress, measure both models, write samples. Args: `samples` (starter prompts, default 3)."""
    from bitpress.engine import compress as engine
    from bitpress.engine.layer_store import LayerStore

    recipe = task.run.recipe()
    if recipe is None:
        raise InputError("This run has no recipe.", "Its recipe.yaml is missing.", "Start it again from a recipe.")
    entry = library.find(recipe.model)
    loaded = _loaded(task, recipe.model)
    digest = digest_of(recipe, loaded.anatomy.fingerprint, resolve_text(recipe.measure.text, entry, "evaluation")[0])
    task.record(digest=digest)
    _ready_kernels(task)
    made = engine.compress(loaded, recipe, task.emit, LayerStore(task.run.path), task.should_stop)
    _measured(task, loaded, entry, recipe.measure, digest, made.model, made.recipe, early_stop=True)
    _write_similarity(task, loaded, made.model, entry, recipe.measure)
    _write_samples(task, loaded, made.model, entry)


def _write_similarity(task: Task, loaded: Loaded, compressed: nn.Module, entry: library.ModelEntry, asked: Measure) -> None:
    """How alike the tokens of both models are, on the first window of the text they were measured on."""
    from bitpress.engine.measure.measure import windows_for
    from bitpress.engine.similarity import similarity

    if not (task.run.path / similarity_file.FILE).exists():
        task.write(similarity_file.FILE, similarity(loaded.model, compressed, windows_for(loaded, entry, asked).ids_NT))


def _loaded(task: Task, model_id: str) -> Loaded:
    """The dense model; its anatomy is kept for the screens if no inspection has written it yet."""
    from bitpress.engine.methods.registry import write_catalogue
    from bitpress.engine.model import load

    task.phase("loading")
    write_catalogue()
    loaded = load.load(model_id)
    _keep_environment(task, loaded)
    path = library.anatomy_path(model_id)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        loaded.anatomy.save(path)
    return loaded


def _ready_kernels(task: Task) -> None:
    """Build the C++ kernels where this machine has none yet, so that no layer's time and no estimate pays for it."""
    from bitpress.kernels import cpu_build

    task.phase("preparing kernels")
    cpu_build.library()


def _keep_environment(task: Task, loaded: Loaded) -> None:
    import torch

    from bitpress.engine.model.load import compute_dtype

    weight = next(loaded.model.parameters())
    types = {"dtype": compute_dtype(weight.device.type), "stored_dtype": weight.dtype}
    conditions = {"threads": torch.get_num_threads(), "device": weight.device.type, **{key: str(value).removeprefix("torch.") for key, value in types.items()}}
    task.write("env.json", {**machine.describe(), "versions": machine.versions(), **conditions})


def _measured(task: Task, loaded: Loaded, entry: library.ModelEntry, asked: Measure, digest: str, compressed: nn.Module | None = None,
              recipe: Recipe | None = None, early_stop: bool = False) -> None:  # fmt: skip
    """Measure and keep `metrics.json`; a resumed run that has it already does not measure again."""
    from bitpress.engine.measure.measure import measure as measure_sides
    from bitpress.engine.model.load import compute_dtype
    from bitpress.engine.runs.resident import compute_in

    compute_in(compute_dtype(), loaded.model, *([compressed] if compressed is not None else []))
    kept = task.run.metrics()
    if kept is None or kept.get("digest") != digest:
        task.phase("measuring quality")
        found = measure_sides(loaded, entry, asked, compressed, recipe, _without_metrics(task), task.should_stop, early_stop)
        kept = {"run": task.run.id, "digest": digest, "metrics": found}
        task.write("metrics.json", kept)
    task.emit("metrics", kept["metrics"])


def _without_metrics(task: Task) -> Callable[[str, dict[str, Any]], None]:
    """A voice that leaves the event `metrics` for when the file is there, so that a reader of the event finds it."""

    def emit(kind: str, data: dict[str, Any]) -> None:
        if kind != "metrics":
            task.emit(kind, data)

    return emit


def _write_samples(task: Task, loaded: Loaded, compressed: nn.Module, entry: library.ModelEntry) -> None:
    """Both models on the starter prompts, greedily; prompts that an earlier start has finished are not written again."""
    from bitpress.engine.runs import samples

    kept = {sample["prompt"] for sample in task.run.samples()}
    prompts = [prompt for prompt in entry.prompts[: task.args.get("samples", PROMPTS)] if prompt not in kept]
    task.phase("writing samples", len(prompts))
    sampling = samples.Sampling(max_new=min(NEW_TOKENS, loaded.anatomy.context // 2))
    for done, prompt in enumerate(prompts, start=1):
        ids = samples.prompt_ids(loaded.tokenizer, prompt, entry.needs_bos)
        chorus = samples.Chorus(loaded.tokenizer, loaded.model, {DENSE: loaded.model, "compressed": compressed}, ids, sampling)
        samples.keep(task, samples.perform(task, chorus, prompt))
        task.progress(done)


def measure(task: Task) -> None:
    """Measure a model, or a finished run beside it. Args: `model`, `run` (optional), `measure` {tier, text, latency}."""
    from bitpress.engine.runs.resident import Resident

    asked, model_id, run_id = Measure(**task.args.get("measure", {})), task.args["model"], task.args.get("run")
    task.phase("loading")
    resident = Resident(model_id)
    _keep_environment(task, resident.loaded)
    compressed = resident.side(run_id) if run_id else None
    recipe = Store().get(run_id).decided_recipe() if run_id else None
    text = resolve_text(asked.text, resident.entry, "evaluation")[0]
    digest = digest_of((recipe or Recipe(model=model_id)).model_copy(update={"measure": asked}), resident.loaded.anatomy.fingerprint, text)
    task.record(digest=digest)
    _measured(task, resident.loaded, resident.entry, asked, digest, compressed, recipe)


def sensitivity(task: Task) -> None:
    """Score every layer under every option. Args: `model`, `text` (default auto), `force`, `kinds` (default the quick ones)."""
    from bitpress.engine import sensitivity as engine

    loaded = _loaded(task, task.args["model"])
    kinds, force = tuple(task.args.get("kinds") or engine.QUICK_KINDS), bool(task.args.get("force"))
    if set(kinds) & set(engine.NEED_TEXT):
        report = engine.measure_on_text(loaded, task.args.get("text") or "auto", force, task.emit, task.should_stop, kinds)
    else:
        report = engine.measure_sensitivity(loaded, None, kinds=kinds, emit=task.emit, should_stop=task.should_stop, force=force)
    task.record(digest=report.digest)
    task.write("result.json", report.to_dict())


def ranks(task: Task) -> None:
    """Look for ranks. Args: `model`, `removed` (share of the parameters), `search` (5x1, 5x4), `evaluations`, `seed`, `text`. Says `trial` after each."""
    from bitpress.engine.rank_search import search_recipe

    loaded, asked = _loaded(task, task.args["model"]), task.args
    plan = Recipe.from_dict({"model": asked["model"], "calibration": {"text": asked.get("text") or "auto"}, "seed": asked.get("seed", 0)})
    found, trials = search_recipe(loaded, plan, asked["removed"], asked.get("search", "5x1"), asked.get("evaluations", 50), task.emit, task.should_stop)
    task.write("result.json", {"recipe": found.to_dict(), "trials": trials})


def caches(task: Task) -> None:
    """Measure the forms that a KV cache can have, side by side. Args: `model`, `contexts` (tokens; powers of four up to the model's own)."""
    from bitpress.engine.cache_bench import measure_caches
    from bitpress.engine.cache_forms import forms
    from bitpress.engine.calibration_set import calibration_set
    from bitpress.engine.kv_ranks import keep_losses, kept_losses
    from bitpress.engine.measure.measure import windows_for
    from bitpress.engine.mixing import value_losses

    entry, loaded = library.find(task.args["model"]), _loaded(task, task.args["model"])
    longest = loaded.anatomy.context
    contexts = task.args.get("contexts") or sorted({*(length for length in (512, 2048, 8192) if length < longest), min(longest, 8192)})
    ids_NT = windows_for(loaded, entry, Measure(tier="quick")).ids_NT
    stats = library.stats_dir(task.args["model"])
    if loaded.anatomy.architecture in CACHED and kept_losses(stats, loaded.anatomy) is None:
        task.phase("looking at what attention mixes")
        text = Calibration(sequences=32, length=min(256, longest))
        keep_losses(stats, value_losses(loaded, calibration_set(loaded, text).ids_SL, task.should_stop))
    plans = forms(loaded.anatomy, stats)
    task.write("result.json", measure_caches(loaded, plans, ids_NT, contexts, task.emit, task.should_stop))


def sweep(task: Task) -> None:
    """Try many recipes, each a run of its own in the queue. Args: `plan` (see `sweep.SweepPlan`), `model`. Says `trial` after each."""
    from bitpress.engine.runs.sweep_job import Sweep

    Sweep(task).run()


def inspection(task: Task) -> None:
    """Write `anatomy.json`, `stats/` and the method catalogue. Args: `model`."""
    loaded = _loaded(task, task.args["model"])
    _inspected(task, loaded)
    _ready_kernels(task)  # the first visit inspects a model: by the first run they are there


def _inspected(task: Task, loaded: Loaded) -> None:
    from bitpress.engine.model import inspect

    task.phase("inspecting", len(loaded.anatomy.linears))
    folder = models_dir() / library.find(loaded.model_id).id

    def progress(done: int, total: int) -> None:
        task.check()
        task.progress(done, total)

    inspect.write_inspection(loaded, folder, progress)
    task.write("result.json", {"model": loaded.anatomy.model, "anatomy": str(folder / "anatomy.json")})


def installation(task: Task) -> None:
    """Fetch a model and inspect it, or fetch a text. Args: `model` or `text`."""
    task.phase("fetching")

    def progress(done: int, total: int | None) -> None:
        task.progress(done, total)

    if text := task.args.get("text"):
        task.write("result.json", {"text": text, "path": str(fetch_text(text, progress, task.should_stop))})
        return
    from bitpress.engine.model import install

    path = install.install(task.args["model"], progress, task.should_stop)
    entry = library.find(task.args["model"])
    loaded = _loaded(task, entry.id)
    _inspected(task, loaded)
    task.write("result.json", {"model": entry.id, "path": str(path)})


def generation(task: Task) -> None:
    """Continue a prompt, or several at once. Args: `model`, `run` (optional), `prompt` or `prompts`, `sampling`."""
    from bitpress.engine.runs import samples
    from bitpress.engine.runs.resident import Resident

    sampling, side = samples.parse_sampling(task.args.get("sampling") or {}), task.args.get("run") or DENSE
    task.phase("loading")
    resident = Resident(task.args["model"])
    _keep_environment(task, resident.loaded)
    named = {"run": task.run.id, "model": resident.entry.id}
    if "prompts" in task.args:
        from bitpress.engine.runs.samples_batch import write_at_once

        task.write("result.json", {**named, **write_at_once(task, resident, side, sampling)})
        return
    prompt = task.args["prompt"]
    ids = samples.prompt_ids(resident.loaded.tokenizer, prompt, resident.entry.needs_bos)
    chorus = samples.Chorus(resident.loaded.tokenizer, resident.loaded.model, {side: resident.side(side)}, ids, sampling)
    task.phase("generating")
    (sample,) = samples.perform(task, chorus, prompt)
    samples.keep(task, [sample])
    task.write("result.json", {**named, **sample})


def desk(task: Task) -> None:
    """Keep a model at hand and answer orders until nobody asks. Args: `model`, `sides` to load at once."""
    from bitpress.engine.runs.desk_worker import serve
    from bitpress.engine.runs.resident import Resident

    task.phase("loading")
    resident = Resident(task.args["model"])
    _keep_environment(task, resident.loaded)
    for side in task.args.get("sides", []):
        resident.side(side)
    serve(task, resident)


KINDS: dict[str, Callable[[Task], None]] = {
    "compress": compress, "measure": measure, "sensitivity": sensitivity, "ranks": ranks, "inspect": inspection, "install": installation,
    "generate": generation, "desk": desk, "sweep": sweep, "caches": caches,
}  # fmt: skip

