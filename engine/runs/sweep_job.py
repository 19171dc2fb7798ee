"""A sweep at work: its points go to the queue as ordinary runs, and what came of each is written down. Knows runs and plans; computes nothing, torch-free.

A finished run of the same digest is taken instead of a new one. Stopping a sweep cancels its runs under way, and their
finished layers are kept; a resumed sweep resumes them.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

from bitpress.engine import sensitivity_file
from bitpress.engine.allocate_model import anatomy_of
from bitpress.engine.choices import choices_of
from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.methods.catalogue import read_catalogue
from bitpress.engine.model import library
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.runs import jobs, labels
from bitpress.engine.runs.status import Status
from bitpress.engine.runs.store import Store
from bitpress.engine.runs.sweep_record import CANCELLED, FAILED, FILE, FINISHED, OPEN, UNFIT, VERSION, Record, front_of, read_points, tag_of
from bitpress.engine.runs.task import Task
from bitpress.engine.sweep import Point, SweepPlan, grid_points
from bitpress.engine.sweep_search import Proposer, Tried, check_methods

POLL_SECONDS, PUMP_SECONDS = 0.2, 1.0
PHASE = "trying recipes"
HOPELESS = 3  # failures one after the other, before anything worked
FIGURES = ("bytes", "bits_per_weight_linears", "perplexity", "kl_mean", "same_top1", "decode_tokens_per_s")


class Source(Protocol):
    """Where points come from."""

    total: int

    def next(self, records: list[Record]) -> Point | None:
        """The next point, None when there is none left."""


class GridSource:
    """The points of a grid in their order."""

    def __init__(self, plan: SweepPlan, anatomy: Anatomy) -> None:
        self.points = grid_points(plan, anatomy)
        self.total = len(self.points)

    def next(self, records: list[Record]) -> Point | None:
        """The first one that is not on record."""
        return self.points[len(records)] if len(records) < self.total else None


class SearchSource:
    """Proposals of a search, each from what was measured so far."""

    def __init__(self, plan: SweepPlan, anatomy: Anatomy) -> None:
        assert plan.search is not None
        report = sensitivity_file.find(anatomy.fingerprint, [sensitivity_file.FISHER])
        if report is None:
            raise BitpressError("The search has no sensitivities to start from.", "Measuring them did not keep any.", "Measure the sensitivity, then resume.")
        self.total = plan.search.trials
        bits = plan.base.embedding.bits if plan.base.embedding else 16
        self.proposer = Proposer(choices_of(anatomy, report, report.spent_by, embedding_bits=bits), plan.search, plan.base)

    def next(self, records: list[Record]) -> Point | None:
        """A proposal that takes into account what came of the others."""
        if len(records) >= self.total:
            return None
        tried = [
            Tried(record["given"], record["figures"]["bytes"], record["figures"]["kl_mean"], record["predicted"])
            for record in records
            if record["state"] == FINISHED and {"bytes", "kl_mean"} <= record["figures"].keys()
        ]
        under_way = [self.proposer.point(record["given"], record["number"]) for record in records if record["state"] == OPEN]
        return self.proposer.next(tried, under_way, len(records))


class Sweep:
    """One sweep under way. The record on disk is all that it knows of its past."""

    def __init__(self, task: Task) -> None:
        self.task, self.store = task, Store(task.run.path.parent.parent)
        self.plan = SweepPlan.of(task.args["plan"])
        self.tag = tag_of(task.run.id)
        self.records = read_points(task.run)
        self._pumped = 0.0

    def run(self) -> None:
        """Try every point. Raises Cancelled when told to stop, and what the points fail with when nothing works."""
        source = self._source()
        self.task.phase(PHASE, source.total)
        with self._stopping():
            self._wake()
            while self._step(source):
                time.sleep(POLL_SECONDS)
        self.task.write("result.json", {"plan": self.plan.model_dump(mode="json", exclude_none=True), "points": self.records, "front": front_of(self.records)})

    def _source(self) -> Source:
        model = self.plan.base.model
        library.model_path(model)
        if read_catalogue() is None or not library.anatomy_path(model).exists():
            self._through("inspect", {"model": model}, "inspecting")
        anatomy = anatomy_of(model)
        if self.plan.search is None:
            return GridSource(self.plan, anatomy)
        check_methods(self.plan.search)
        if sensitivity_file.find(anatomy.fingerprint, [sensitivity_file.FISHER]) is None:
            self._through("sensitivity", {"model": model}, "measuring sensitivity")
        return SearchSource(self.plan, anatomy)

    def _through(self, kind: str, args: dict[str, Any], phase: str) -> None:
        """Have a run done that the sweep itself needs."""
        self.task.phase(phase)
        run = jobs.submit_once(kind, args, home=self.store.home)
        while (status := run.status()).active:
            self._pump()
            if self.task.should_stop():
                with contextlib.suppress(InputError):
                    jobs.cancel(run.id, self.store.home)
            self.task.check()
            time.sleep(POLL_SECONDS)
        if status.state != FINISHED:
            error = status.error or {}
            raise BitpressError(f"{phase.capitalize()} did not end well.", error.get("what", f"Its run {run.id} is {status.state}."), "Resume the sweep.")

    # One step ---------------------------------------------------------------------------------------------------------

    def _step(self, source: Source) -> bool:
        """Look after the runs under way and start what there is room for; False when all is done."""
        self.task.check()
        self._pump()
        for record in self._open():
            self._look(record)
        while len(self._open()) < jobs.slots() and (point := source.next(self.records)) is not None:
            self._begin(point)
        self.task.progress(len(self.records) - len(self._open()), source.total, self._left(source.total))
        return bool(self._open())

    def _open(self) -> list[Record]:
        return [record for record in self.records if record["state"] == OPEN]

    def _begin(self, point: Point) -> None:
        """Give a point to the queue, or take the run that has done it already."""
        record: Record = {"number": point.number, "name": point.name, "given": point.given, "predicted": point.predicted, "wrong": point.wrong,
                          "digest": None, "run": None, "state": UNFIT if point.wrong else OPEN, "figures": {}, "seconds": 0.0}  # fmt: skip
        self.records.append(record)
        if not point.wrong:
            record["digest"] = jobs.compress_digest(point.recipe)
            known = self.store.find_finished(record["digest"]) if record["digest"] else None
            args = {"model": point.recipe.model, "samples": 0, "sweep": self.task.run.id}
            run = known or self.store.create("compress", args, point.recipe, point.name, record["digest"])
            record["run"] = run.id
            labels.change_labels(run.path, tags=[*labels.read_labels(run.path).tags, self.tag])
        self._keep()
        jobs.pump(self.store.home)

    def _look(self, record: Record) -> None:
        """Take down how a run ended."""
        status = self._status(record)
        if status is not None and status.active:
            return
        ended = status.state if status is not None else CANCELLED
        record["state"] = ended if ended in (FINISHED, CANCELLED) else FAILED
        if status is not None and ended == FINISHED:
            sides = (self.store.get(record["run"]).metrics() or {}).get("metrics", {})
            record["figures"] = {name: sides["compressed"][name] for name in FIGURES if name in sides.get("compressed", {})}
            record["seconds"] = status.seconds if record["run"] > self.task.run.id else 0.0  # an older run took nothing of this sweep's time
        elif status is not None:
            record["wrong"] = (status.error or {}).get("what", f"It was {ended}.")
        self._keep()
        self.task.emit("trial", {key: record[key] for key in ("number", "name", "run", "state", "figures", "predicted")})
        self._judge()

    def _status(self, record: Record) -> Status | None:
        try:
            return self.store.get(record["run"]).status()
        except BitpressError:
            return None  # its folder was removed

    def _judge(self) -> None:
        """Raise when all that was tried failed, so that a wrong base recipe does not fail five hundred times."""
        ends = [record for record in self.records if record["state"] in (FINISHED, FAILED)]
        if len(ends) >= HOPELESS and all(record["state"] == FAILED for record in ends):
            raise BitpressError(f"The first {len(ends)} recipes of the sweep all failed.", ends[-1]["wrong"], "Mend the base recipe and start again.")

    def _left(self, total: int) -> float | None:
        """Seconds left, by what the points so far took."""
        took = [record["seconds"] for record in self.records if record["seconds"]]
        if not took:
            return None
        mean = sum(took) / len(took)
        begun = sum(min(mean, (status.seconds or 0.0) if (status := self._status(record)) else 0.0) for record in self._open())
        return max(0.0, mean * (total - len(self.records) + len(self._open())) - begun) / jobs.slots()

    def _keep(self) -> None:
        self.task.write(FILE, {"v": VERSION, "tag": self.tag, "points": self.records})

    def _pump(self) -> None:
        if time.monotonic() - self._pumped > PUMP_SECONDS:
            jobs.pump(self.store.home)
            self._pumped = time.monotonic()

    # Stopping and going on --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """However the sweep ends, nothing of it stays in the queue."""
        try:
            yield
        finally:
            for record in self._open():
                with contextlib.suppress(BitpressError):
                    jobs.cancel(record["run"], self.store.home)

    def _wake(self) -> None:
        """Resume the runs that were under way when the sweep stopped; one that is still on its way out is waited for."""
        for record in self._open():
            while (status := self._status(record)) is not None and status.state == "cancelling":
                self.task.check()
                self._pump()
                time.sleep(POLL_SECONDS)
            if status is not None and status.state in ("cancelled", "interrupted"):
                jobs.resume(record["run"], self.store.home)

