"""Commands about this machine: what it offers, how fast it is, its worker, its dashboard. Knows arguments and printing."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.engine.cli_face import Home, Json, group, print_json, short, table
from bitpress.engine.errors import InputError
from bitpress.engine.home import PACKAGE_ROOT

machine = group("This machine.")


@machine.command()
def doctor(as_json: Json = False, home: Home = None) -> None:
    """What this machine offers, and what is missing."""
    from bitpress.engine.doctor import as_lines, examine

    report = examine()
    if as_json:
        print_json(report)
    else:
        print("\n".join(as_lines(report)))
    if not report["ok"]:
        raise typer.Exit(1)


@machine.command()
def bench(what: Annotated[str, typer.Argument(help="kernels, decode or prefill")],
          model: Annotated[str | None, typer.Option("--model", help="For decode and prefill.")] = None,
          quick: Annotated[bool, typer.Option("--quick", help="Fewer sides and rounds.")] = False,
          rival_python: Annotated[list[str] | None, typer.Option("--rival-python", help="NAME=PYTHON of a rival, such as llama.cpp=/path/to/python.")] = None,
          rival_file: Annotated[str | None, typer.Option("--rival-file", help="A GGUF file of the same weights; without it one of 4 bits is written.")] = None,
          batch: Annotated[int, typer.Option("--batch", min=1, max=64, help="For decode: sequences written at once.")] = 1,
          as_json: Json = False, home: Home = None) -> None:  # fmt: skip
    """Time the kernels, or how a model decodes and reads a prompt, on this machine; 1 when figures cannot be true."""
    from bitpress.engine import rivals

    pythons = rivals.parse(rival_python or [])
    if batch > 1 and (what != "decode" or pythons or rival_file):
        why = "Kernels, prompts and llama.cpp are timed without it."
        raise InputError(f"A batch of {batch} is for our own decoding.", why, "Leave out --batch, or the rest.")
    report = _bench_report(what, model, quick, batch)
    if what == "kernels" and pythons:
        report["rivals"] = [{"shape": [4096, 4096], **rivals.ask(name, pythons, "4096", "4096")} for name in rivals.KERNELS]
    if what != "kernels" and (pythons or rival_file):
        from bitpress.engine.decode_bench import with_rival

        report = with_rival(report, pythons, rival_file)
    if as_json:
        print_json(report)
    else:
        keys = [key for key, value in report["rows"][0].items() if not isinstance(value, dict)]
        table([tuple(short(row.get(key)) for key in keys) for row in report["rows"]], tuple(keys))
        for rival in report.get("rivals", ()):
            print(", ".join(f"{key} {value}" for key, value in rival.items()))
    if report.get("problems"):
        typer.echo("\n".join(report["problems"]), err=True)
        raise typer.Exit(1)


def _bench_report(what: str, model: str | None, quick: bool, batch: int) -> dict[str, Any]:
    if what == "kernels":
        from bitpress.kernels.bench import kernel_table

        return kernel_table(quick)
    if what in ("decode", "prefill"):
        from bitpress.engine.decode_bench import decode_table, prefill_table

        return decode_table(model, quick, batch=batch) if what == "decode" else prefill_table(model, quick)
    raise InputError(f"There is no bench '{what}'.", "", "There are `bench kernels`, `bench decode` and `bench prefill`.")


@machine.command()
def worker(run_dir: Path, home: Home = None) -> None:
    """Do the run in this folder, in this process."""
    from bitpress.engine.runs.worker import main as work

    if not (run_dir / "request.json").exists():
        raise InputError(f"{run_dir} is no run folder.", "It holds no request.json.", "Give a folder under runs/ of the home folder.")
    raise typer.Exit(work(run_dir))


@machine.command("app")
def open_app(port: Annotated[int, typer.Option(min=1, max=65535)] = 8501, home: Home = None) -> None:
    """Open the dashboard in a browser."""
    os.chdir(PACKAGE_ROOT)  # where .streamlit/config.toml lies
    options = ["--server.port", str(port), "--server.showEmailPrompt", "false"]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(PACKAGE_ROOT / "app" / "main.py"), *options])
