"""Commands that find a recipe: what each layer suffers, ranks, a budget spent. Knows arguments and printing; the finding is elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bitpress.engine.cli_face import Force, Home, Json, Text, followed, group, print_json, short, table
from bitpress.engine.errors import InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.store import Run

plans = group("Find a recipe.")


@plans.command()
def sensitivity(model: str, text: Text = "auto", force: Force = False,
                kind: Annotated[list[str] | None, typer.Option("--kind", help="data_free, activation, fisher (these unless told), kl, kl_without.")] = None,
                as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Measure how much each layer suffers from each option; kept and found again."""
    from bitpress.engine.model.library import model_path
    from bitpress.engine.sensitivity_file import KINDS

    model_path(model)
    if unknown := sorted(set(kind or ()) - set(KINDS)):
        raise InputError(f"There is no sensitivity of kind '{unknown[0]}'.", "", f"Kinds are {', '.join(KINDS)}.")
    run = followed(jobs.submit("sensitivity", {"model": model, "text": text, "force": force, "kinds": kind or []}))
    report = run.result() or {}
    if as_json:
        print_json(report)
        return
    worst = sorted(report["scores"], key=lambda score: score["score"], reverse=True)[:20]
    table([(score["layer"], score["option"], f"{score['score']:.4g}") for score in worst], ("layer", "option", f"score ({report['kind']})"))


Budget = Annotated[float | None, typer.Option(min=0.0)]


@plans.command()
def ranks(model: str, removed: Annotated[float, typer.Option(min=0.01, max=0.8, help="Share of the block linears' parameters to take away.")],
          search: Annotated[str, typer.Option(help="5x1: a ratio a role; 5x4: one a role and quarter of the depth.")] = "5x1",
          evaluations: Annotated[int, typer.Option(min=2, max=1000)] = 50, text: Text = "auto", seed: int = 0,
          as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Look for the ranks that lose least at one size, by Bayesian optimisation; prints a recipe for `compress`."""
    from bitpress.engine.model.library import model_path

    model_path(model)
    if search not in ("5x1", "5x4"):
        raise InputError(f"There is no search '{search}'.", "", "Choose 5x1 or 5x4.")
    run = followed(jobs.submit("ranks", {"model": model, "removed": removed, "search": search, "evaluations": evaluations, "text": text, "seed": seed}))
    found = run.result() or {}
    if as_json:
        print_json(found)
        return
    print(Recipe.from_dict(found["recipe"]).to_yaml())
    print(f"# best of {len(found['trials'])}: {short(min(trial['objective'] for trial in found['trials']))} nats a token (perplexity and reverse KL)")


@plans.command("kv-ranks")
def kv_ranks(model: str, keep: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the cache's width to keep.")] = 0.6,
             heads: Annotated[str, typer.Option(help="joint, or each head by itself.")] = "joint",
             as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Ranks of a latent KV cache from condition numbers; prints the recipe's `kv_cache`."""
    from bitpress.engine.kv_ranks import cache_of
    from bitpress.engine.model import library
    from bitpress.engine.model.anatomy import Anatomy

    library.model_path(model)
    if heads not in ("joint", "each"):
        raise InputError(f"There is no '{heads}' of heads.", "", "Choose joint or each.")
    path = library.anatomy_path(model)
    if not path.exists() or not library.stats_dir(model).is_dir():
        followed(jobs.submit("inspect", {"model": model}))
    found = cache_of(Anatomy.load(path), library.stats_dir(model), keep, heads).model_dump(exclude_none=True, mode="json")  # type: ignore[arg-type]
    if as_json:
        print_json({"kv_cache": found})
    else:
        print(yaml.safe_dump({"kv_cache": found, "stages": [{"method": "lorc"}]}, sort_keys=False, width=100))


@plans.command()
def allocate(model: str, linear_bits: Budget = None, model_bits: Budget = None, bytes_: Annotated[float | None, typer.Option("--bytes")] = None,
             perplexity_ratio: Annotated[float | None, typer.Option(help="Predicted perplexity over dense, such as 1.1.")] = None,
             latency_s: Annotated[float | None, typer.Option(help="Predicted seconds a token, by the kept kernel bench.")] = None,
             flops: Annotated[float | None, typer.Option(help="Operations a token; blocks are dropped to meet it.")] = None,
             kv_bytes: Annotated[float | None, typer.Option(help="Bytes of the KV cache a token, over a full context.")] = None,
             drops: Annotated[bool, typer.Option("--drops", help="Whole blocks may go as well.")] = False,
             kind: Annotated[str | None, typer.Option("--kind", help="Which sensitivity to spend by.")] = None,
             tie: Annotated[list[str] | None, typer.Option("--tie", help="qkv or gate_up: the same option for all of them.")] = None,
             lock: Annotated[list[str] | None, typer.Option("--lock", help="PATTERN=OPTION, such as role:v=8-bit.")] = None,
             embedding_bits: Annotated[int, typer.Option(help="Width of embedding and head; 0 lets the budget decide.")] = 8,
             text: Text = "auto", as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """The best recipe within one or two budgets, from kept sensitivities; they are measured first where there are none."""
    from bitpress.engine.allocate_model import allocate_model

    asked = {"linear_bits": linear_bits, "model_bits": model_bits, "bytes": bytes_, "perplexity_ratio": perplexity_ratio, "latency_s": latency_s,
             "flops": flops, "kv_bytes": kv_bytes}  # fmt: skip
    budgets = {name: value for name, value in asked.items() if value is not None}
    if not budgets:
        raise InputError("No budget was given.", "", "Add one, such as --linear-bits 3.5; `bitpress allocate --help` lists them.")
    measure = lambda: followed(jobs.submit("sensitivity", {"model": model, "text": text}))  # noqa: E731
    found = allocate_model(model, budgets, kind, tie or [], _locks(lock or []), embedding_bits or None, measure, drops=drops)
    if as_json:
        print_json(found.to_dict())
        return
    print(found.recipe.to_yaml())
    print("\n".join(f"# {name}: {short(value)}" for name, value in found.predicted.items()))


def _locks(written: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in written:
        pattern, equals, option = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"'{text}' is no lock.", "", "Write PATTERN=OPTION, such as role:v=8-bit.")
        if found.setdefault(pattern, option) != option:
            raise InputError(f"'{pattern}' is locked twice.", f"Once to {found[pattern]}, once to {option}.", "Keep one of them.")
    return found


# Many recipes ------------------------------------------------------------------------------------------------------


@plans.command()
def sweep(recipe: Path, model: Annotated[str | None, typer.Option("--model", help="Model id, in place of the recipe's.")] = None,
          grid: Annotated[list[str] | None, typer.Option("--grid", help="AXIS=VALUE,VALUE, such as bits=3,4 or method=rtn,gptq; more axes multiply.")] = None,
          search: Annotated[int | None, typer.Option("--search", min=2, help="Try so many recipes, chosen by what is foretold and measured.")] = None,
          bits: Annotated[str, typer.Option("--bits", help="LOW,HIGH bits of a linear weight, for a search.")] = "2.5,6",
          methods: Annotated[str, typer.Option("--methods", help="Methods of rounding that a search tries.")] = "rtn",
          as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Compress by many recipes around one, each a run of its own; Ctrl-C pauses, `runs resume` goes on."""
    from bitpress.engine.model.library import model_path
    from bitpress.engine.sweep import SweepPlan

    base = Recipe.from_yaml(recipe)
    base = base.model_copy(update={"model": model}) if model else base
    model_path(base.model)
    asked: dict[str, Any] = {"grid": dict(map(_axis, grid))} if grid else {}
    if search is not None:
        asked["search"] = {"trials": search, **_range(bits), "methods": [name.strip() for name in methods.split(",")]}
    plan = SweepPlan.of({"base": base.to_dict(), **asked})
    args = {"model": base.model, "plan": plan.model_dump(mode="json", exclude_none=True)}
    told_sweep(followed(jobs.submit("sweep", args, title=f"Sweep {base.model}")), as_json)


def _axis(written: str) -> tuple[str, list[Any]]:
    axis, equals, values = written.partition("=")
    if not equals or not axis.strip():
        raise InputError(f"'{written}' is no axis.", "", "Write AXIS=VALUE,VALUE, such as bits=3,4.")
    return axis.strip(), [piece.strip() if ":" in piece else yaml.safe_load(piece) for piece in values.split(",") if piece.strip()]


def _range(bits: str) -> dict[str, float]:
    try:
        low, high = map(float, bits.split(","))
    except ValueError:
        raise InputError(f"'{bits}' is no range of bits.", "", "Write LOW,HIGH, such as 2.5,6.") from None
    return {"low": low, "high": high}


def told_sweep(run: Run, as_json: bool) -> None:
    """What came of a sweep: a line a point, those on the front marked."""
    found = run.result() or {}
    if as_json:
        print_json({"run": run.id, **found})
        return
    rows = [
        ("*" if point["run"] in found["front"] else "", point["run"] or "", point["name"], point["state"],
         *(short(point["figures"].get(name)) or point["wrong"] for name in ("bytes", "kl_mean", "perplexity")))
        for point in found["points"]
    ]  # fmt: skip
    table(rows, ("front", "run", "recipe", "state", "bytes", "divergence", "perplexity"))
