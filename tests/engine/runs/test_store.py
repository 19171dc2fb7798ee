"""Run folders and the index beside them: the folders are right, whatever happens to the index."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs.status import Status, change_status, process_alive, process_started, read_status, write_status
from bitpress.engine.runs.store import Store

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture
def store(bitpress_home: Path) -> Store:
    return Store()


def folders(store: Store) -> list[Status]:
    """What the folders say, read one by one."""
    found = [status for path in store.folder.iterdir() if (status := read_status(path))]
    return sorted(found, key=lambda status: (status.created, status.id), reverse=True)


def test_a_new_run_keeps_what_was_asked(store: Store) -> None:
    recipe = Recipe(model="tiny-stories", seed=3)
    run = store.create("compress", {"samples": 1}, recipe, "My run", digest="abc")
    assert run.request() == {"v": 1, "kind": "compress", "args": {"samples": 1}}
    assert run.recipe() == recipe
    status = run.status()
    assert (status.state, status.title, status.model, status.digest) == ("queued", "My run", "tiny-stories", "abc")
    assert [event.kind for event in run.events()] == ["queued"]
    assert (run.metrics(), run.samples(), run.log_tail()) == (None, [], "")


def test_the_index_says_what_the_folders_say(store: Store) -> None:
    runs = [store.create("compress" if index % 2 else "inspect", {"model": f"m{index}"}) for index in range(12)]
    for index, run in enumerate(runs):
        change_status(run.path, lambda _, index=index: {"state": ["queued", "running", "finished"][index % 3]})
    assert store.list() == folders(store)
    assert store.list(kind="compress", state=("running", "finished")) == [s for s in folders(store) if s.kind == "compress" and s.state != "queued"]
    runs[3].path.joinpath("status.json").unlink()
    assert store.list() == folders(store)
    assert len(store.list()) == 11
    assert store.rebuild() == 11
    assert store.list() == folders(store)


@pytest.mark.parametrize("damage", ["absent", "noise", "other table", "a folder"])
def test_a_damaged_index_is_built_anew(store: Store, damage: str) -> None:
    store.create("inspect", {"model": "m"})
    before = store.list()
    store.index.unlink()
    if damage == "noise":
        store.index.write_bytes(os.urandom(9000))
    elif damage == "other table":
        with sqlite3.connect(store.index) as index:
            index.execute("create table run (x integer)")
    elif damage == "a folder":
        store.index.mkdir()
    assert store.list() == before == folders(store)


def test_500_runs_are_listed_fast(store: Store) -> None:
    for index in range(500):
        path = store.folder / f"20260101-{index // 60:04d}{index % 60:02d}-{index:04x}"
        path.mkdir(parents=True)
        write_status(path, Status(path.name, "compress", f"Run {index}", "m", created=float(index)))
    assert len(store.list(limit=1000)) == 500
    began = time.perf_counter()
    newest = store.list(limit=200)
    assert time.perf_counter() - began < 0.5
    assert [status.created for status in newest] == [float(index) for index in range(499, 299, -1)]


def test_the_newest_finished_run_of_a_digest_is_found(store: Store) -> None:
    runs = [store.create("compress", {}, Recipe(model="m"), digest="d") for _ in range(3)]
    assert store.find_finished("d") is None
    for run, created in zip(runs, (1.0, 3.0, 2.0), strict=True):
        change_status(run.path, lambda _, created=created: {"state": "finished", "created": created})
        (run.path / "metrics.json").write_text("{}")
    bare = store.create("compress", {}, Recipe(model="m"), digest="d")
    change_status(bare.path, lambda _: {"state": "finished", "created": 4.0})
    found = store.find_finished("d")
    assert found is not None
    assert found.id == runs[1].id
    assert store.find_finished("other") is None


def test_a_run_is_found_by_a_unique_end_of_its_id(store: Store) -> None:
    run = store.create("inspect", {})
    assert store.get(run.id).id == run.id
    assert store.get(run.id[-6:]).id == run.id
    for wrong in ("20200101-000000-ffff", "../../etc", "", "no"):
        with pytest.raises(InputError):
            store.get(wrong)


def test_a_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BitpressError, match="cannot be kept"):
        Store(tmp_path / "file").create("inspect", {})


def test_a_status_of_a_newer_version_is_read(store: Store) -> None:
    run = store.create("inspect", {})
    values = {**json.loads((run.path / "status.json").read_text()), "v": 7, "mood": "good"}
    (run.path / "status.json").write_text(json.dumps(values))
    assert run.status().state == "queued"
    assert store.list()[0].v == 7


def test_changes_from_several_processes_lose_nothing(store: Store) -> None:
    run = store.create("inspect", {})
    code = (
        "import sys\nfrom pathlib import Path\nfrom bitpress.engine.runs.status import change_status\n"
        "for _ in range(50): change_status(Path(sys.argv[1]), lambda status: {'done': status.done + 1})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(run.path)]) for _ in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    assert run.status().done == 150


def test_a_recycled_pid_is_not_the_worker() -> None:
    began = process_started(os.getpid())
    assert began is not None
    assert process_alive(os.getpid(), began)
    assert not process_alive(os.getpid(), began - 60)
    assert not process_alive(None, began)


def test_run_folders_of_version_1_stay_readable(bitpress_home: Path) -> None:
    store = Store(FIXTURES / "run_v1")
    store.index = bitpress_home / "index.sqlite"
    finished, interrupted = store.list()
    assert (finished.state, finished.kind, finished.model) == ("finished", "compress", "tiny-stories")
    assert (interrupted.state, interrupted.resumable) == ("interrupted", True)
    run = store.get(finished.id)
    recipe, metrics = run.recipe(), run.metrics()
    assert recipe is not None
    assert metrics is not None
    assert [stage.method for stage in recipe.stages] == ["rtn"]
    assert metrics["run"] == run.id
    assert set(metrics["metrics"]) == {"dense", "compressed"}
    events = run.events()
    assert [event.n for event in events] == list(range(1, len(events) + 1))
    assert events[-1].kind == "finished"
    assert {"queued", "started", "progress", "layer_done", "window", "sample", "metrics"} <= {event.kind for event in events}
    assert run.samples()[0]["tokens"][0].keys() >= {"id", "text", "logprob", "rank"}
    assert [event.n for event in store.get(interrupted.id).events()] == [1, 2, 3, 5]  # line 4 was cut by the crash


@pytest.mark.parametrize("module", ["store", "jobs", "events", "desk", "status", "orders", "machine", "failures", "task"])
def test_what_a_screen_imports_leaves_torch_out(module: str) -> None:
    code = f"import sys, bitpress.engine.runs.{module}\nprint(sorted({{'torch', 'transformers', 'safetensors'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.strip() == "[]"
