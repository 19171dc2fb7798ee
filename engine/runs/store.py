"""Runs on disk: one folder a run, the truth about it; an SQLite index beside them that can be deleted at any time.

Knows files only. The index remembers of each folder which `status.json` it has read (inode, time, size); a listing looks
at every folder and reads again only what changed, so the index cannot be stale and is never required.
"""

import json
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitpress.engine.chosen import decided_recipe
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.home import home as default_home
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.events import Event, EventWriter, read_events
from bitpress.engine.runs.status import KNOWN, Status, read_status, replace_json, write_status

Statuses = list[Status]  # `Store.list` hides the builtin inside its class
Names = list[str]
Rows = list[Any]
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
REQUEST_VERSION = 1
SCHEMA = """create table if not exists run (id text primary key, stamp text not null, kind text, state text, model text, digest text,
            created real, status text not null)"""


class Run:
    """One run folder. Holds no open file; every call reads what stands on disk now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    def __repr__(self) -> str:
        return f"Run({self.id})"

    def status(self) -> Status:
        """How the run stands. Raises BitpressError when the folder is gone or its record cannot be read."""
        status = read_status(self.path)
        if status is None:
            raise BitpressError(f"The run {self.id} cannot be read.", "Its folder is gone or its status.json is damaged.", "Start the run again.")
        return status

    def request(self) -> dict[str, Any]:
        """What was asked: `{v, kind, args}`."""
        return _read_json(self.path / "request.json") or {}

    def events(self, after: int = 0) -> list[Event]:
        """The events numbered above `after`, in order; keep the last one's `n` for the next call."""
        return read_events(self.path / "events.jsonl", after)

    def writer(self) -> EventWriter:
        """To append events; only for the one process that may (see EventWriter)."""
        return EventWriter(self.path / "events.jsonl")

    def metrics(self) -> dict[str, Any] | None:
        """`{run, digest, metrics: {dense, compressed}}`, or None before they are measured."""
        return _read_json(self.path / "metrics.json")

    def result(self) -> dict[str, Any] | None:
        """What a run of another kind than compress and measure has to hand over, None before its end."""
        return _read_json(self.path / "result.json")

    def env(self) -> dict[str, Any] | None:
        """Versions, processor, threads and dtype of the worker, None before it began."""
        return _read_json(self.path / "env.json")

    def samples(self) -> list[dict[str, Any]]:
        """The finished generations: `{prompt, side, tokens: [...], tokens_per_s}` each."""
        return list(_json_lines(self.path / "samples.jsonl"))

    def recipe(self) -> Recipe | None:
        """The recipe of a compress run, None for runs that have none."""
        path = self.path / "recipe.yaml"
        return Recipe.from_yaml(path) if path.exists() else None

    def decided_recipe(self) -> Recipe | None:
        """The recipe with what the run's stages have chosen to remove."""
        recipe = self.recipe()
        return decided_recipe(self.path, recipe) if recipe else None

    def log_tail(self, lines: int = 40) -> str:
        """The last lines that the worker printed."""
        try:
            with (self.path / "log.txt").open(encoding="utf8", errors="replace") as file:
                return "".join(deque(file, lines))
        except FileNotFoundError:
            return ""


class Store:
    """All runs under a home folder (default: `home()`)."""

    def __init__(self, home: Path | str | None = None) -> None:
        self.home = Path(home) if home else default_home()
        self.folder = self.home / "runs"
        self.index = self.home / "index.sqlite"

    def create(self, kind: str, args: dict[str, Any], recipe: Recipe | None = None, title: str | None = None, digest: str | None = None) -> Run:
        """A new folder in state queued; nothing is started. Raises BitpressError when the home cannot be written."""
        model = args.get("model") or (recipe.model if recipe else None)
        now = time.time()
        status = Status("", kind, title or _title(kind, model), model, created=now, queued=now, digest=digest)
        try:
            run = Run(self._new_folder())
            try:
                _fill(run, args, recipe, status)
            except OSError:
                shutil.rmtree(run.path, ignore_errors=True)
                raise
        except OSError as error:
            why = f"{error.strerror or error}."
            raise BitpressError(f"A run cannot be kept in {self.folder}.", why, "Free some space or choose another home folder.") from error
        return run

    def _new_folder(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue

    def get(self, run_id: str) -> Run:
        """A run by id, or by the unique beginning or end of one. Raises InputError when there is none or more than one."""
        if RUN_ID.fullmatch(run_id) and (self.folder / run_id / "status.json").exists():
            return Run(self.folder / run_id)
        close = [name for name in self._folders() if re.fullmatch(r"[\w-]{4,}", run_id) and (name.startswith(run_id) or name.endswith(run_id))]
        if len(close) == 1:
            return Run(self.folder / close[0])
        why = f"{len(close)} runs match it." if close else f"Nothing under {self.folder} has that id."
        raise InputError(f"There is no run '{run_id}'.", why, "`bitpress runs` lists them.")

    def list(self, kind: str | None = None, state: str | Iterable[str] | None = None, limit: int = 200) -> Statuses:
        """The newest runs first; of one kind, of one or several states."""
        states = [state] if isinstance(state, str) else [*state] if state else []
        where = ["kind = ?"] * bool(kind) + [f"state in ({','.join('?' * len(states))})"] * bool(states)
        query = "select status from run" + (" where " + " and ".join(where) if where else "") + " order by created desc, id desc limit ?"
        rows = self._query(query, [*([kind] if kind else []), *states, limit])
        return [_status_of(text) for (text,) in rows]

    def find_finished(self, digest: str, kind: str = "compress") -> Run | None:
        """The newest finished run with this digest that has its metrics, None when there is none."""
        rows = self._query("select id from run where digest = ? and kind = ? and state = 'finished' order by created desc", [digest, kind])
        runs = (Run(self.folder / run_id) for (run_id,) in rows)
        return next((run for run in runs if (run.path / "metrics.json").exists()), None)

    def rebuild(self) -> int:
        """Throw the index away and read every folder again; gives the number of runs."""
        self._forget()
        return int(self._query("select count(*) from run", [])[0][0])

    def _forget(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self.index.with_name(self.index.name + suffix).unlink(missing_ok=True)

    def _folders(self) -> Names:
        try:
            return [entry.name for entry in os.scandir(self.folder) if RUN_ID.fullmatch(entry.name)]
        except FileNotFoundError:
            return []

    def _query(self, query: str, values: Rows) -> Rows:
        """Bring the index up to date, then ask it. A damaged index is built anew; where none can be written one is kept in memory."""
        for attempt in ("as it is", "built anew", "in memory"):
            try:
                with closing(self._connect(attempt)) as index:
                    self._refresh(index)
                    return index.execute(query, values).fetchall()
            except (sqlite3.Error, OSError):
                if attempt == "in memory":
                    raise
        raise AssertionError("unreachable")

    def _connect(self, attempt: str) -> sqlite3.Connection:
        if attempt == "in memory" or not self.home.exists():
            index = sqlite3.connect(":memory:")
        else:
            if attempt == "built anew":
                self._forget()
            index = sqlite3.connect(self.index, timeout=5.0)
            index.execute("pragma journal_mode = wal")
            index.execute("pragma synchronous = off")  # the folders are the truth
        index.execute(SCHEMA)
        return index

    def _refresh(self, index: sqlite3.Connection) -> None:
        known = dict(index.execute("select id, stamp from run").fetchall())
        stamps = {name: stamp for name in self._folders() if (stamp := _stamp(self.folder / name))}
        changed = [name for name, stamp in stamps.items() if known.get(name) != stamp]
        rows = [(stamps[name], status) for name in changed if (status := read_status(self.folder / name))]
        gone = [(name,) for name in known.keys() - stamps.keys()]
        if rows or gone:
            with index:
                index.executemany("insert or replace into run values (?, ?, ?, ?, ?, ?, ?, ?)", [_row(stamp, status) for stamp, status in rows])
                index.executemany("delete from run where id = ?", gone)


def _fill(run: Run, args: dict[str, Any], recipe: Recipe | None, status: Status) -> None:
    """Write all that a new folder holds; the status comes last, because it is what makes the folder a run."""
    replace_json(run.path / "request.json", {"v": REQUEST_VERSION, "kind": status.kind, "args": args})
    if recipe is not None:
        (run.path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf8")
    with run.writer() as events:
        events.write("queued", {"kind": status.kind, "model": status.model})
    write_status(run.path, replace(status, id=run.id))


def _stamp(folder: Path) -> str | None:
    """What tells one written record from the next: a replaced file has another inode, time or size."""
    try:
        found = (folder / "status.json").stat()
        return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
    except OSError:
        return None


def _row(stamp: str, status: Status) -> tuple[Any, ...]:
    return status.id, stamp, status.kind, status.state, status.model, status.digest, status.created, json.dumps(asdict(status))


def _status_of(text: str) -> Status:
    return Status(**{key: value for key, value in json.loads(text).items() if key in KNOWN})


def _title(kind: str, model: str | None) -> str:
    return f"{kind.capitalize()} {model}" if model else kind.capitalize()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a torn one is skipped."""
    try:
        with path.open(encoding="utf8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
    except FileNotFoundError:
        return
