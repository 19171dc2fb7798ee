"""The command line. Knows arguments, exit codes and what goes to which stream; every piece of work is a run or a reader elsewhere.

With `--json` exactly one document goes to stdout; progress always goes to stderr. Exit codes: 0 done, 1 failed, 2 bad
input, 130 cancelled. Nothing here imports torch: work that needs it happens in a worker process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.home import PACKAGE_ROOT
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import failures, jobs
from bitpress.engine.runs.events import Event, finite
from bitpress.engine.runs.follow import follow
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import RUN_ID, Run, Store


def _set_home(path: Path | None) -> Path | None:
    if path is not None:
        os.environ["BITPRESS_HOME"] = str(path.expanduser().resolve())
    return path


Home = Annotated[Path | None, typer.Option("--home", callback=_set_home, is_eager=True, help="Where everything is kept (default: BITPRESS_HOME).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Compute again even when a finished run has the same digest.")]
Tier = Annotated[str, typer.Option("--tier", help="quick, standard or full.")]
Text = Annotated[str, typer.Option("--text", help="Text to measure on: an id, a file, or auto.")]


def _group(about: str, alone: bool = False) -> typer.Typer:
    """A group of commands that tells errors in plain words; `alone`: it may be called without one of them."""
    return typer.Typer(help=about, no_args_is_help=not alone, invoke_without_command=alone, pretty_exceptions_enable=False, add_completion=False,
                       rich_markup_mode=None)  # fmt: skip


app = _group("See, measure and understand what a language model loses when it is made smaller.")
models_app = _group("List the models; install or add one.", alone=True)
runs_app = _group("List the runs; show, cancel or resume one.", alone=True)
app.add_typer(models_app, name="models")
app.add_typer(runs_app, name="runs")


def main() -> None:
    """Entry of the console script. A refusal is told in words: on stderr, and with --json as a document on stdout."""
    try:
        app(prog_name="bitpress")
    except (BitpressError, OSError) as caught:
        error = failures.explain(caught)
        if "--json" in sys.argv[1:]:
            _print_json({"error": error.as_dict()})
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _print_json(document: Any) -> None:
    print(json.dumps(finite(document), indent=1, ensure_ascii=False))


def _table(rows: list[tuple[Any, ...]], heads: tuple[str, ...]) -> None:
    lines = [heads, *(tuple("" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


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
        _print_json([{"source": entry.source.label} | {key: value for key in keys if (value := getattr(entry, key)) is not None} for entry in entries])
        return
    rows = [(entry.id, entry.params, entry.blocks, entry.bytes, entry.licence, "ready" if entry.ready else "not installed") for entry in entries]
    _table(rows, ("id", "params", "blocks", "bytes", "licence", "state"))


@models_app.command("install")
def install_model(model: str, as_json: Json = False, home: Home = None) -> None:
    """Fetch a bundled model or one of the Hub (owner/name), and inspect it."""
    run = _followed(jobs.submit("install", {"model": model}))
    _told(run.result() or {}, as_json)


@models_app.command("add")
def add_model(path: Path, name: Annotated[str | None, typer.Option("--name")] = None, as_json: Json = False, home: Home = None) -> None:
    """Add a folder of safetensors or a GGUF file, and inspect it."""
    from bitpress.engine.model.library import add_local

    entry = add_local(path, name)
    run = _followed(jobs.submit("install", {"model": entry.id}))
    _told(run.result() or {}, as_json)


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
        _print_json(found)
    else:
        _table([(entry["id"], entry["family"], entry["summary"]) for entry in found], ("id", "family", "summary"))


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
        run = _followed(jobs.submit("compress", {}, recipe=plan))
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
    run = _followed(jobs.submit("measure", {**_target(target), "measure": asked}))
    _print_metrics(run, as_json)


@app.command()
def sensitivity(model: str, text: Text = "auto", force: Force = False,
                kind: Annotated[list[str] | None, typer.Option("--kind", help="data_free, activation, fisher (these unless told), kl, kl_without.")] = None,
                as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Measure how much each layer suffers from each option; kept and found again."""
    from bitpress.engine.model.library import model_path
    from bitpress.engine.sensitivity_file import KINDS

    model_path(model)
    if unknown := sorted(set(kind or ()) - set(KINDS)):
        raise InputError(f"There is no sensitivity of kind '{unknown[0]}'.", "", f"Kinds are {', '.join(KINDS)}.")
    run = _followed(jobs.submit("sensitivity", {"model": model, "text": text, "force": force, "kinds": kind or []}))
    report = run.result() or {}
    if as_json:
        _print_json(report)
        return
    worst = sorted(report["scores"], key=lambda score: score["score"], reverse=True)[:20]
    _table([(score["layer"], score["option"], f"{score['score']:.4g}") for score in worst], ("layer", "option", f"score ({report['kind']})"))


Budget = Annotated[float | None, typer.Option(min=0.0)]


@app.command()
def ranks(model: str, removed: Annotated[float, typer.Option(min=0.01, max=0.8, help="Share of the block linears' parameters to take away.")],
          search: Annotated[str, typer.Option(help="5x1: a ratio a role; 5x4: one a role and quarter of the depth.")] = "5x1",
          evaluations: Annotated[int, typer.Option(min=2, max=1000)] = 50, text: Text = "auto", seed: int = 0,
          as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Look for the ranks that lose least at one size, by Bayesian optimisation; prints a recipe for `compress`."""
    from bitpress.engine.model.library import model_path

    model_path(model)
    if search not in ("5x1", "5x4"):
        raise InputError(f"There is no search '{search}'.", "", "Choose 5x1 or 5x4.")
    run = _followed(jobs.submit("ranks", {"model": model, "removed": removed, "search": search, "evaluations": evaluations, "text": text, "seed": seed}))
    found = run.result() or {}
    if as_json:
        _print_json(found)
        return
    print(Recipe.from_dict(found["recipe"]).to_yaml())
    print(f"# best of {len(found['trials'])}: {_short(min(trial['objective'] for trial in found['trials']))} nats a token (perplexity and reverse KL)")


@app.command("kv-ranks")
def kv_ranks(model: str, keep: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the cache's width to keep.")] = 0.6,
             heads: Annotated[str, typer.Option(help="joint, or each head by itself.")] = "joint",
             as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Ranks of a latent KV cache from condition numbers; prints the recipe's `kv_cache`."""
    import yaml

    from bitpress.engine.kv_ranks import cache_of
    from bitpress.engine.model import library
    from bitpress.engine.model.anatomy import Anatomy

    library.model_path(model)
    if heads not in ("joint", "each"):
        raise InputError(f"There is no '{heads}' of heads.", "", "Choose joint or each.")
    path = library.anatomy_path(model)
    if not path.exists():
        _followed(jobs.submit("inspect", {"model": model}))
    found = cache_of(Anatomy.load(path), library.stats_dir(model), keep, heads).model_dump(exclude_none=True, mode="json")  # type: ignore[arg-type]
    if as_json:
        _print_json({"kv_cache": found})
    else:
        print(yaml.safe_dump({"kv_cache": found, "stages": [{"method": "lorc"}]}, sort_keys=False, width=100))


@app.command()
def allocate(model: str, linear_bits: Budget = None, model_bits: Budget = None, bytes_: Annotated[float | None, typer.Option("--bytes")] = None,
             perplexity_ratio: Annotated[float | None, typer.Option(help="Predicted perplexity over dense, such as 1.1.")] = None,
             latency_s: Annotated[float | None, typer.Option(help="Predicted seconds a token, by the kept kernel bench.")] = None,
             kind: Annotated[str | None, typer.Option("--kind", help="Which sensitivity to spend by.")] = None,
             tie: Annotated[list[str] | None, typer.Option("--tie", help="qkv or gate_up: the same option for all of them.")] = None,
             lock: Annotated[list[str] | None, typer.Option("--lock", help="PATTERN=OPTION, such as role:v=8-bit.")] = None,
             embedding_bits: Annotated[int, typer.Option(help="Width of embedding and head; 0 lets the budget decide.")] = 8,
             text: Text = "auto", as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """The best recipe within one or two budgets, from kept sensitivities; they are measured first where there are none."""
    from bitpress.engine.allocate_model import allocate_model

    asked = {"linear_bits": linear_bits, "model_bits": model_bits, "bytes": bytes_, "perplexity_ratio": perplexity_ratio, "latency_s": latency_s}
    budgets = {name: value for name, value in asked.items() if value is not None}
    if not budgets:
        raise InputError("No budget was given.", "", "Add one, such as --linear-bits 3.5; `bitpress allocate --help` lists them.")
    measure = lambda: _followed(jobs.submit("sensitivity", {"model": model, "text": text}))  # noqa: E731
    found = allocate_model(model, budgets, kind, tie or [], _locks(lock or []), embedding_bits or None, measure)
    if as_json:
        _print_json(found.to_dict())
        return
    print(found.recipe.to_yaml())
    print("\n".join(f"# {name}: {_short(value)}" for name, value in found.predicted.items()))


def _locks(written: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in written:
        pattern, equals, option = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"'{text}' is no lock.", "", "Write PATTERN=OPTION, such as role:v=8-bit.")
        if found.setdefault(pattern, option) != option:
            raise InputError(f"'{pattern}' is locked twice.", f"Once to {found[pattern]}, once to {option}.", "Keep one of them.")
    return found


@app.command()
def generate(target: str, prompt: Annotated[str, typer.Option("--prompt")], max_new: Annotated[int, typer.Option("--max-new", min=1)] = 64,
             temperature: Annotated[float, typer.Option(min=0.0)] = 0.0, top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
             seed: int = 0, as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Continue a prompt with a model or a finished run."""
    sampling = {"max_new": max_new, "temperature": temperature, "top_p": top_p, "seed": seed}

    def show(event: Event) -> None:
        if event.kind == "sample" and not as_json:
            print(event.data["text"], end="", flush=True)

    run = _followed(jobs.submit("generate", {**_target(target), "prompt": prompt, "sampling": sampling}), show)
    if as_json:
        _print_json(run.result())
    else:
        print()


def _target(target: str) -> dict[str, str]:
    """A run's id (or a unique end of it) as `{run, model}`, anything else as `{model}`."""
    if RUN_ID.fullmatch(target):
        run = Store().get(target)
        return {"run": run.id, "model": run.status().model or ""}
    from bitpress.engine.model.library import model_path

    model_path(target)
    return {"model": target}


def _followed(run: Run, show: Any = lambda _: None, after: int = 0) -> Run:
    print(f"Run {run.id}", file=sys.stderr)
    follow(run, show, after=after)
    return run


def _told(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(values)
        return
    for key, value in values.items():
        print(f"{key}: {value}")


def _print_metrics(run: Run, as_json: bool) -> None:
    found = run.metrics()
    if found is None:
        raise BitpressError(f"The run {run.id} has no metrics.", "Its metrics.json is missing.", "Run it again with --force.")
    if as_json:
        _print_json(found)
        return
    sides = found["metrics"]
    keys = [key for key, value in next(reversed(sides.values())).items() if isinstance(value, int | float)]
    rows = [(key, *(_short(side.get(key)) for side in sides.values())) for key in keys]
    _table(rows, (f"run {run.id}", *sides))
    print(next(iter(sides.values()))["protocol"]["one_line"])


def _short(value: Any) -> str | None:
    """A number with its separators or four digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None if value is None else str(value)


# Runs ------------------------------------------------------------------------------------------------------------


@runs_app.callback()
def runs(context: typer.Context, kind: Annotated[str | None, typer.Option("--kind")] = None, limit: int = 50, as_json: Json = False, home: Home = None) -> None:
    """List the newest runs."""
    if context.invoked_subcommand:
        return
    jobs.pump()
    found = Store().list(kind=kind, limit=limit)
    if as_json:
        _print_json([_shown(status) for status in found])
        return
    rows = [(status.id, status.kind, status.model, status.state, status.phase, status.title) for status in found]
    _table(rows, ("id", "kind", "model", "state", "phase", "title"))


def _shown(status: Status) -> dict[str, Any]:
    return {key: value for key, value in vars(status).items() if value is not None}


@runs_app.command("show")
def show_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """What is on record of a run, and the end of its log."""
    run = Store().get(run_id)
    shown = _shown(run.status()) | {"path": str(run.path)}
    if not as_json:
        shown["log"] = "\n" + run.log_tail(20)
    _told(shown, as_json)


@runs_app.command("cancel")
def cancel_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """Stop a run; its finished layers are kept."""
    status = jobs.cancel(run_id)
    _told({"id": status.id, "state": status.state}, as_json)


@runs_app.command("resume")
def resume_run(run_id: str, as_json: Json = False, home: Home = None) -> None:
    """Go on with a cancelled, failed or interrupted run, and wait for it."""
    run = Store().get(run_id)
    seen = max((event.n for event in run.events()), default=0)
    jobs.resume(run.id)
    _followed(run, after=seen)
    if run.metrics() is not None:
        _print_metrics(run, as_json)
    else:
        _told(_shown(run.status()), as_json)


# The machine and the screens -------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Json = False, home: Home = None) -> None:
    """What this machine offers, and what is missing."""
    from bitpress.engine.doctor import as_lines, examine

    report = examine()
    if as_json:
        _print_json(report)
    else:
        print("\n".join(as_lines(report)))
    if not report["ok"]:
        raise typer.Exit(1)


@app.command()
def bench(what: Annotated[str, typer.Argument(help="kernels, decode or prefill")],
          model: Annotated[str | None, typer.Option("--model", help="For decode and prefill.")] = None,
          quick: Annotated[bool, typer.Option("--quick", help="Under 45 s.")] = False,
          rival_python: Annotated[list[str] | None, typer.Option("--rival-python", help="NAME=PYTHON of a rival, such as llama.cpp=/path/to/python.")] = None,
          rival_file: Annotated[str | None, typer.Option("--rival-file", help="A GGUF file of the same weights, for llama.cpp.")] = None,
          as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Time the kernels, or how a model decodes and reads a prompt, on this machine; 1 when figures cannot be true."""
    from bitpress.engine import rivals

    pythons, report = rivals.parse(rival_python or []), _bench_report(what, model, quick)
    if what == "kernels" and pythons:
        report["rivals"] = [{"shape": [4096, 4096], **rivals.ask("bitsandbytes", pythons, "4096", "4096")}]
    if what != "kernels" and (pythons or rival_file):
        from bitpress.engine.decode_bench import with_rival

        report = with_rival(report, pythons, rival_file)
    if as_json:
        _print_json(report)
    else:
        keys = [key for key, value in report["rows"][0].items() if not isinstance(value, dict)]
        _table([tuple(_short(row.get(key)) for key in keys) for row in report["rows"]], tuple(keys))
    if report.get("problems"):
        typer.echo("\n".join(report["problems"]), err=True)
        raise typer.Exit(1)


def _bench_report(what: str, model: str | None, quick: bool) -> dict[str, Any]:
    if what == "kernels":
        from bitpress.kernels.bench import kernel_table

        return kernel_table(quick)
    if what in ("decode", "prefill"):
        from bitpress.engine.decode_bench import decode_table, prefill_table

        return decode_table(model, quick) if what == "decode" else prefill_table(model, quick)
    raise InputError(f"There is no bench '{what}'.", "", "There are `bench kernels`, `bench decode` and `bench prefill`.")


@app.command()
def worker(run_dir: Path, home: Home = None) -> None:
    """Do the run in this folder, in this process."""
    from bitpress.engine.runs.worker import main as work

    if not (run_dir / "request.json").exists():
        raise InputError(f"{run_dir} is no run folder.", "It holds no request.json.", "Give a folder under runs/ of the home folder.")
    raise typer.Exit(work(run_dir))


@app.command("app")
def open_app(port: Annotated[int, typer.Option(min=1, max=65535)] = 8501, home: Home = None) -> None:
    """Open the dashboard in a browser."""
    os.chdir(PACKAGE_ROOT)  # where .streamlit/config.toml lies
    options = ["--server.port", str(port), "--server.showEmailPrompt", "false"]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(PACKAGE_ROOT / "app" / "main.py"), *options])


if __name__ == "__main__":
    main()
