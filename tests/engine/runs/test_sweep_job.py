"""Sweeps on the queue: real runs of the tiny model, a pause and its end, a search from kept scores, and workers that fail."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.labels import read_labels
from bitpress.engine.runs.status import change_status
from bitpress.engine.runs.store import Run, Store
from bitpress.engine.runs.sweep_job import Sweep
from bitpress.engine.runs.sweep_record import FILE, front_of, read_points, tag_of
from bitpress.engine.runs.task import Task

MakeRecipe = Callable[..., Recipe]


def sweep_run(base: Recipe, **asked: Any) -> Run:
    """A sweep in the store that this process has taken up."""
    args = {"model": base.model, "plan": {"base": base.to_dict(), **asked}}
    run = Store().create("sweep", args)
    change_status(run.path, lambda _: {"state": "running", "host": "here", "started": time.time(), "heartbeat": time.time()})
    return run


def done_here(run: Run, watch: Callable[[Task], None] = lambda task: None) -> None:
    """Do a sweep in this process; `watch` may tell it to stop."""
    with run.writer() as events:
        task = Task(run, events)
        watch(task)
        Sweep(task).run()


class Instead:
    """Ends runs at once in place of workers: finished with made-up figures, or failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.fails, self.done = fails, list[str]()
        monkeypatch.setattr(jobs, "_start", self.start)

    def start(self, run: Run) -> bool:
        """As a worker would leave the folder, in no time."""
        recipe = run.recipe()
        assert recipe is not None
        self.done.append(run.id)
        now = time.time()
        if self.fails:
            error = {"what": "The disk is full.", "why": "", "remedy": ""}
            change_status(run.path, lambda _: {"state": "failed", "started": now, "ended": now, "error": error})
            return False
        bits = next((line.weights.bits for line in recipe.schemes if getattr(line.weights, "bits", None)), 16)
        side = {"bytes": 1000 * bits, "bits_per_weight_linears": float(bits), "perplexity": 10.0 + 8 / bits, "kl_mean": 1 / bits**2}
        (run.path / "metrics.json").write_text(json.dumps({"run": run.id, "digest": None, "metrics": {"dense": {}, "compressed": side}}))
        change_status(run.path, lambda _: {"state": "finished", "started": now - 5, "ended": now})
        return False


@pytest.fixture
def known(tiny_home: str) -> str:
    """The tiny model with its anatomy and catalogue on record."""
    from bitpress.engine.methods.registry import write_catalogue
    from bitpress.engine.model import library
    from bitpress.engine.model.load import load

    write_catalogue()
    path = library.anatomy_path(tiny_home)
    path.parent.mkdir(parents=True, exist_ok=True)
    load(tiny_home).anatomy.save(path)
    return tiny_home


def test_a_grid_becomes_ordinary_runs_with_a_front(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    run = sweep_run(tiny_recipe(), grid={"bits": [4, 3, 2]})
    done_here(run)
    records = read_points(run)
    assert [record["state"] for record in records] == ["finished"] * 3
    assert [record["run"] for record in records] == instead.done
    assert all(tag_of(run.id) in read_labels(Store().get(record["run"]).path).tags for record in records)
    assert {status.id for status in Store().list(kind="compress", state="finished")} == set(instead.done)
    result = run.result()
    assert result is not None
    assert result["front"] == front_of(records) == [records[2]["run"], records[1]["run"], records[0]["run"]]
    kinds = [event.kind for event in run.events()]
    assert kinds.count("trial") == 3
    told = [event.data for event in run.events() if event.kind == "progress"]
    assert told[-1]["done"] == told[-1]["total"] == 3


def test_a_finished_run_of_the_same_digest_is_taken(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    done_here(sweep_run(tiny_recipe(), grid={"bits": [4, 3]}))
    first = list(instead.done)
    second = sweep_run(tiny_recipe(), grid={"bits": [4, 2]})
    done_here(second)
    assert len(instead.done) == 3
    assert read_points(second)[0]["run"] == first[0]


def test_an_unfit_point_is_told_and_left_out(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    run = sweep_run(tiny_recipe(), grid={"group_size": [4096, 32]})
    done_here(run)
    assert [record["state"] for record in read_points(run)] == ["unfit", "finished"]
    assert "4096" in read_points(run)[0]["wrong"]
    assert len(instead.done) == 1


def test_a_sweep_of_failures_gives_up_and_says_why(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    Instead(monkeypatch, fails=True)
    with pytest.raises(Exception, match=r"first 3 recipes of the sweep all failed.*disk is full"):
        done_here(sweep_run(tiny_recipe(), grid={"bits": [4, 3, 2, 8]}))


def test_pausing_cancels_what_is_under_way_and_resuming_goes_on_with_it(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep_run(tiny_recipe(), grid={"bits": [4, 3]})
    asked: list[Task] = []
    with monkeypatch.context() as patched, pytest.raises(Cancelled):
        patched.setattr(jobs, "_start", lambda run: False)  # nothing is ever taken up: the first point stays queued
        patched.setattr(time, "sleep", lambda seconds: asked[0].stop())
        done_here(run, asked.append)
    (record,) = read_points(run)
    assert record["state"] == "open"
    assert Store().get(record["run"]).status().state == "cancelled"
    instead = Instead(monkeypatch)
    done_here(run)
    assert instead.done[0] == record["run"], "the run that was under way is resumed, not made anew"
    assert [one["state"] for one in read_points(run)] == ["finished"] * 2


def test_a_search_starts_from_kept_scores_and_follows_what_it_measures(known: str, tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.engine.model.load import load
    from bitpress.engine.sensitivity import measure_on_text

    base = tiny_recipe()
    measure_on_text(load(known), base.measure.text)
    instead = Instead(monkeypatch)
    run = sweep_run(base, search={"trials": 5, "low": 3.6, "high": 6.0, "methods": ["rtn", "gptq"]})
    done_here(run)
    records = read_points(run)
    assert len({record["digest"] for record in records}) == len(instead.done) > 2
    assert all(record["predicted"] > 0 and record["given"]["linear_bits"] <= 6.0 for record in records)
    assert run.result()["front"]


def test_a_wrong_plan_fails_before_any_run_is_made(known: str, tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="grid or a search"):
        done_here(sweep_run(tiny_recipe()))
    with pytest.raises(InputError, match="does not round"):
        done_here(sweep_run(tiny_recipe(), search={"methods": ["wanda"]}))
    assert {status.kind for status in Store().list()} == {"sweep"}


def test_a_damaged_record_is_no_record(known: str, tiny_recipe: MakeRecipe) -> None:
    run = sweep_run(tiny_recipe(), grid={"bits": [4]})
    (run.path / FILE).write_text("{")
    assert read_points(run) == []
