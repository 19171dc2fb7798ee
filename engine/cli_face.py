"""What all commands share: options, groups, printing, and following a run to its end. Knows streams; no command."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bitpress.engine.runs.events import finite
from bitpress.engine.runs.follow import follow
from bitpress.engine.runs.store import Run


def _set_home(path: Path | None) -> Path | None:
    if path is not None:
        os.environ["BITPRESS_HOME"] = str(path.expanduser().resolve())
    return path


Home = Annotated[Path | None, typer.Option("--home", callback=_set_home, is_eager=True, help="Where everything is kept (default: BITPRESS_HOME).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Compute again even when a finished run has the same digest.")]
Tier = Annotated[str, typer.Option("--tier", help="quick, standard or full.")]
Text = Annotated[str, typer.Option("--text", help="Text to measure on: an id, a file, or auto.")]


def group(about: str, alone: bool = False) -> typer.Typer:
    """A group of commands that tells errors in plain words; `alone`: it may be called without one of them."""
    return typer.Typer(help=about, no_args_is_help=not alone, invoke_without_command=alone, pretty_exceptions_enable=False, add_completion=False,
                       rich_markup_mode=None)  # fmt: skip


def print_json(document: Any) -> None:
    """One document on stdout."""
    print(json.dumps(finite(document), indent=1, ensure_ascii=False))


def table(rows: list[tuple[Any, ...]], heads: tuple[str, ...]) -> None:
    """Rows under their heads, in columns."""
    lines = [heads, *(tuple("" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def followed(run: Run, show: Any = lambda _: None, after: int = 0) -> Run:
    """The run once it has ended; its progress goes to stderr meanwhile. Raises what ended it otherwise."""
    print(f"Run {run.id}", file=sys.stderr)
    follow(run, show, after=after)
    return run


def told(values: dict[str, Any], as_json: bool) -> None:
    """A line a value, or one document."""
    if as_json:
        print_json(values)
        return
    for key, value in values.items():
        print(f"{key}: {value}")


def short(value: Any) -> str | None:
    """A number with its separators or four digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None if value is None else str(value)
