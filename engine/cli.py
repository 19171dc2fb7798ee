"""The command line. Knows arguments, exit codes and what goes to which stream; every piece of work is a run or a reader elsewhere.

With `--json` exactly one document goes to stdout; progress always goes to stderr. Exit codes: 0 done, 1 failed, 2 bad
input, 130 cancelled. Nothing here imports torch: work that needs it happens in a worker process.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.engine.cli_face import Force, Home, Json, Text, Tier, followed, group, print_json, short, table, told
from bitpress.engine.cli_machine import machine
from bitpress.engine.cli_plans import plans
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import failures, jobs
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import RUN_ID, Run, Store

app = group("See, measure and understand what a language model loses when it is made smaller.")
models_app = group("List the models; install or add one.", alone=True)
runs_app = group("List the runs; show, cancel or resume one.", alone=True)
app.add_typer(models_app, name="models")
app.add_typer(runs_app, name="runs")
app.add_typer(plans)
app.add_typer(machine)


def main() -> None:
    """Entry of the console script. A refusal is told in words: on stderr, and with --json as a document on stdout."""
    try:
        app(prog_name="bitpress")
    except (BitpressError, OSError) as caught:
        error = failures.explain(caught)
        if "--json" in sys.argv[1:]:
            print_json({"error": error.as_dict()})
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


# Models and methods ----------------------------------------------------------------------------------------------


@models_app.callback()
def models(context: typer.Context, as_json: Json = False, home: Home = None) -> None:
    """List the models: id, source, params, blocks, bytes, licence, ready."""
    if context.invoked_subcommand:
        return
    from bitpress.engine.model.library import list_models

    entries = list_models()
    if as_json:
        keys = ("id", "params", "blocks", "bytes", "licence", "ready")
        print_json([{"source": entry.source.label} | {key: value for key in keys if (value := getattr(entry, key)) is not None} for entry in entries])
        return
    rows = [(entry.id, entry.params, entry.blocks, entry.bytes, entry.licence, "ready" if entry.ready else "not installed") for entry in entries]
    table(rows, ("id", "params", "blocks", "bytes", "licence", "state"))


@models_app.command("install")
def install_model(model: str, as_json: Json = False, home: Home = None) -> None:
    """Fetch a bundled model or one of the Hub (owner/name), and inspect it."""
    run = followed(jobs.submit("install", {"model": model}))
    told(run.result() or {}, as_json)


@models_app.command("add")
def add_model(path: Path, name: Annotated[str | None, typer.Option("--name")] = None, as_json: Json = False, home: Home = None) -> None:
    """Add a folder of safetensors or a GGUF file, and inspect it."""
    from bitpress.engine.model.library import add_local

    entry = add_local(path, name)
    run = followed(jobs.submit("install", {"model": entry.id}))
    told(run.result() or {}, as_json)


@app.command()
def methods(as_json: Json = False, home: Home = None) -> None:
    """List the compression methods: id, family, summary, citation, needs, options."""
    from bitpress.engine.methods.catalogue import read_catalogue

    catalogue = read_catalogue()
    if catalogue is None:
        from bitpress.engine.methods.registry import write_catalogue

        catalogue = write_catalogue()
    keys = ("id", "family", "summary", "citation", "needs", "options")
    found = [{key: entry[key] for key in keys} for entry in catalogue["methods"]]
    if as_json:
        print_json(found)
    else:
        table([(entry["id"], entry["family"], entry["summary"]) for entry in found], ("id", "family", "summary"))


# Work that is a run ----------------------------------------------------------------------------------------------


@app.command()
def compress(recipe: Path, model: Annotated[str | None, typer.Option("--model", help="Model id, in place of the recipe's.")] = None,
             force: Force = False, as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Compress a model by a recipe, measure both, and keep the result as a run."""
    plan = Recipe.from_yaml(recipe)
    if model:
        plan = plan.model_copy(update={"model": model})
    _check(plan)
    digest = jobs.compress_digest(plan)
    run = Store().find_finished(digest) if digest and not force else None
    if run is None:
        run = followed(jobs.submit("compress", {}, recipe=plan))
    else:
        print(f"The finished run {run.id} has this digest; --force computes it again.", file=sys.stderr)
    _print_metrics(run, as_json)


def _check(plan: Recipe) -> None:
    """Refuse what can be refused before a worker is started: an unknown model, a recipe that does not fit it."""
    from bitpress.engine.methods.catalogue import problems
    from bitpress.engine.model import library
    from bitpress.engine.model.anatomy import Anatomy

    if plan.model == "any":
        raise InputError("The recipe names no model.", "Its model is 'any', as in the presets.", "Add --model ID; `bitpress models` lists them.")
    library.model_path(plan.model)
    path = library.anatomy_path(plan.model)
    if path.exists() and (found := problems(plan, Anatomy.load(path))):
        raise InputError("This recipe does not fit the model.", " ".join(map(str, found)), "Correct the named fields and try again.")


@app.command()
def measure(target: str, tier: Tier = "quick", text: Text = "auto", latency: Annotated[bool, typer.Option(help="Time it too.")] = True,
            as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Measure a model, or a finished run beside its dense model."""
    asked = {"tier": tier, "text": text, "latency": latency}
    run = followed(jobs.submit("measure", {**_target(target), "measure": asked}))
    _print_metrics(run, as_json)


@app.command()
def generate(target: str, prompt: Annotated[list[str], typer.Option("--prompt", help="Several are written at once.")],
             max_new: Annotated[int, typer.Option("--max-new", min=1)] = 64,
             temperature: Annotated[float, typer.Option(min=0.0)] = 0.0, top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
             seed: int = 0, as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Continue a prompt, or several at once, with a model or a finished run."""
    sampling, one = {"max_new": max_new, "temperature": temperature, "top_p": top_p, "seed": seed}, len(prompt) == 1

    def show(event: Event) -> None:
        if event.kind == "sample" and one and not as_json:
            print(event.data["text"], end="", flush=True)

    asked = {"prompt": prompt[0]} if one else {"prompts": prompt}
    result = followed(jobs.submit("generate", {**_target(target), **asked, "sampling": sampling}), show).result() or {}
    if as_json:
        print_json(result)
    elif one:
        print()
    else:
        print("\n\n".join(sample["prompt"] + sample["text"] for sample in result["samples"]))


def _target(target: str) -> dict[str, str]:
    """A run's id (or a unique end of it) as `{run, model}`, anything else as `{model}`."""
    if RUN_ID.fullmatch(target):
        run = Store().get(target)
        return {"run": run.id, "model": run.status().model or ""}
    from bitpress.engine.model.library import model_path

    model_path(target)
    return {"model": target}


def _print_metrics(run: Run, as_json: bool) -> None:
    found = run.metrics()
    if found is None:
        raise BitpressError(f"The run {run.id} has no metrics.", "Its metrics.json is missing.", "Run it again with --force.")
    if as_json:
        print_json(found)
        return
    sides = found["metrics"]
    keys = [key for key, value in next(reversed(sides.values())).items() if isinstance(value, int | float)]
    rows = [(key, *(short(side.get(key)) for side in sides.values())) for key in keys]
    table(rows, (f"run {run.id}", *sides))
    print(next(iter(sides.values()))["protocol"]["one_line"])


# Runs ------------------------------------------------------------------------------------------------------------


@runs_app.callback()
def runs(context: typer.Context, kind: Annotated[str | None, typer.Option("--kind")] = None, limit: int = 50, as_json: Json = False, home: Home = None) -> None:
    """List the newest runs."""
    if context.invoked_subcommand:
        return
    jobs.pump()
    found = Store().list(kind=kind, limit=limit)
    if as_json:
        print_json([_shown(status) for status in found])
        return
    rows = [(status.id, status.kind, status.model, status.state, status.phase, status.title) for status in found]
    table(rows, ("id", "kind", "model", "state", "phase", "title"))


def _shown(status: Status) -> dict[str, Any]:
    return {key: value for key, value in vars(status).items() if value is not None}


@runs_app.command("show")
def show_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """What is on record of a run, and the end of its log."""
    run = Store().get(run_id)
    shown = _shown(run.status()) | {"path": str(run.path)}
    if not as_json:
        shown["log"] = "\n" + run.log_tail(20)
    told(shown, as_json)


@runs_app.command("cancel")
def cancel_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """Stop a run; its finished layers are kept."""
    status = jobs.cancel(run_id)
    told({"id": status.id, "state": status.state}, as_json)


@runs_app.command("resume")
def resume_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """Go on with a cancelled, failed or interrupted run, and wait for it."""
    run = Store().get(run_id)
    seen = max((event.n for event in run.events()), default=0)
    jobs.resume(run.id)
    followed(run, after=seen)
    if run.metrics() is not None:
        _print_metrics(run, as_json)
    else:
        told(_shown(run.status()), as_json)


if __name__ == "__main__":
    main()
