"""The queue: who starts, who waits, who stops, and what is noticed of those that died. The workers here are plain sleepers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitpress.engine.errors import InputError
from bitpress.engine.recipe import Recipe
from bitpress.engine.runs import jobs
from bitpress.engine.runs.backends.base import Handle, Resources
from bitpress.engine.runs.backends.local import LocalBackend
from bitpress.engine.runs.status import change_status, process_started
from bitpress.engine.runs.store import Run, Store

SLEEPER = "import sys, time; open(sys.argv[1] + '/starts', 'a').write('x'); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
CHILDREN: list[int] = []


class Sleepers(LocalBackend):
    """Starts processes that do nothing, in place of workers."""

    def __init__(self, code: str = SLEEPER) -> None:
        super().__init__()
        self.code = code

    def submit(self, command: list[str], log: Path, resources: Resources) -> Handle:
        handle = super().submit([sys.executable, "-c", self.code, command[-1]], log, resources)
        CHILDREN.append(handle.pid)
        return handle


@pytest.fixture
def backend(bitpress_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleepers]:
    sleepers = Sleepers()
    monkeypatch.setattr(jobs, "BACKEND", sleepers)
    yield sleepers
    while CHILDREN:
        try:
            os.killpg(CHILDREN.pop(), signal.SIGKILL)
        except ProcessLookupError:
            continue


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Pump until something is so."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never became so"
        jobs.pump()
        time.sleep(0.02)


def state(run: Run) -> str:
    return run.status().state


def kill(run: Run) -> None:
    """SIGKILL the worker and wait until it is gone."""
    pid = run.status().pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    ends = time.monotonic() + 10
    while process_started(pid) is not None:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_one_job_runs_and_the_next_waits(backend: Sleepers) -> None:
    first, second = jobs.submit("inspect", {"model": "m"}), jobs.submit("measure", {"model": "m"})
    assert (state(first), state(second)) == ("running", "queued")
    assert [status.id for status in jobs.active()] == [first.id, second.id]
    kill(first)
    jobs.pump()
    assert (state(first), state(second)) == ("interrupted", "running")
    assert [event.kind for event in first.events()] == ["queued", "interrupted"]


def test_the_same_work_is_not_queued_twice(backend: Sleepers) -> None:
    four, three = (Recipe.from_dict({"model": "m", "schemes": [{"match": "*", "weights": {"bits": bits}}]}) for bits in (4, 3))
    first = jobs.submit_once("compress", {"model": "m"}, four)
    assert jobs.submit_once("compress", {"model": "m"}, four).id == first.id
    other = jobs.submit_once("compress", {"model": "m"}, three)
    assert other.id != first.id
    assert jobs.submit_once("measure", {"model": "m"}).id not in (first.id, other.id)
    kill(first)
    jobs.pump()
    assert jobs.submit_once("compress", {"model": "m"}, four).id != first.id, "what was interrupted is no longer at work"


def test_slots_are_set_by_the_environment(backend: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_SLOTS", "2")
    runs = [jobs.submit("inspect", {}) for _ in range(3)]
    assert [state(run) for run in runs] == ["running", "running", "queued"]


def test_desks_and_downloads_take_no_slot(backend: Sleepers) -> None:
    runs = [jobs.submit(kind, {"model": "m"}) for kind in ("desk", "install", "compress", "compress")]
    assert [state(run) for run in runs] == ["running", "running", "running", "queued"]


def test_pumps_at_once_start_a_job_exactly_once(backend: Sleepers, bitpress_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    runs = [store.create("inspect", {"model": "m"}) for _ in range(4)]
    code = (
        "import sys\nfrom bitpress.engine.runs import jobs\nfrom bitpress.engine.runs.backends.local import LocalBackend\n"
        "class Sleepers(LocalBackend):\n"
        "    def submit(self, command, log, resources):\n"
        f"        return super().submit([sys.executable, '-c', {SLEEPER!r}, command[-1]], log, resources)\n"
        "jobs.BACKEND = Sleepers()\n"
        "input()\n"
        "for _ in range(20): jobs.pump()"
    )
    environment = {**os.environ, "BITPRESS_SLOTS": "3"}
    pumps = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment) for _ in range(3)]
    for pump in pumps:
        assert pump.stdin is not None
        pump.stdin.write(b"\n")
        pump.stdin.close()
    assert [pump.wait(timeout=60) for pump in pumps] == [0, 0, 0]
    CHILDREN.extend(run.status().pid or 0 for run in runs[:3])
    monkeypatch.setenv("BITPRESS_SLOTS", "3")
    until(lambda: all((run.path / "starts").exists() for run in runs[:3]))
    assert [state(run) for run in runs] == ["running"] * 3 + ["queued"]
    assert [(run.path / "starts").read_text() for run in runs[:3]] == ["x"] * 3


def test_a_waiting_run_is_cancelled_at_once(backend: Sleepers) -> None:
    first, second = jobs.submit("inspect", {}), jobs.submit("inspect", {})
    assert jobs.cancel(second.id).state == "cancelled"
    assert [event.kind for event in second.events()] == ["queued", "cancelled"]
    kill(first)
    jobs.pump()
    assert state(second) == "cancelled"
    with pytest.raises(InputError, match="has ended"):
        jobs.cancel(second.id)


def test_a_running_one_is_asked_to_stop(backend: Sleepers) -> None:
    run = jobs.submit("inspect", {})
    assert jobs.cancel(run.id).state == "cancelling"
    until(lambda: state(run) == "cancelled")
    assert [event.kind for event in run.events()] == ["queued", "cancelled"]


def test_one_that_does_not_listen_is_ended_after_the_grace(backend: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.code = DEAF
    run = jobs.submit("inspect", {})
    until(lambda: (run.path / "starts").exists())
    jobs.cancel(run.id)
    jobs.pump()
    assert state(run) == "cancelling"
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.0)
    until(lambda: state(run) == "cancelled")


def test_resume_goes_on_in_the_same_folder(backend: Sleepers) -> None:
    run = jobs.submit("inspect", {})
    until(lambda: (run.path / "starts").exists())
    with pytest.raises(InputError, match="cannot be resumed"):
        jobs.resume(run.id)
    kill(run)
    jobs.pump()
    assert jobs.resume(run.id).state == "running"
    events = run.events()
    assert [event.kind for event in events] == ["queued", "interrupted", "queued"]
    assert [event.n for event in events] == [1, 2, 3]
    assert events[-1].data["resumed"]
    until(lambda: (run.path / "starts").read_text() == "xx")


def test_a_resumed_run_joins_the_end_of_the_queue(backend: Sleepers) -> None:
    runs = [jobs.submit("inspect", {}) for _ in range(3)]
    jobs.cancel(runs[1].id)
    jobs.resume(runs[1].id)
    assert [status.id for status in jobs.active()] == [runs[0].id, runs[2].id, runs[1].id]


def test_a_recycled_pid_does_not_pass_for_the_worker(backend: Sleepers) -> None:
    run = jobs.submit("inspect", {})
    kill(run)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
    CHILDREN.append(bystander.pid)
    change_status(run.path, lambda status: {"pid": bystander.pid, "pid_started": time.time() - 60, "state": "cancelling", "cancel_asked": 1.0})
    jobs.pump()
    assert state(run) == "cancelled"
    assert bystander.poll() is None


def test_a_silent_worker_elsewhere_is_given_up_after_its_lease(backend: Sleepers) -> None:
    run = jobs.submit("inspect", {})
    change_status(run.path, lambda status: {"host": "another-machine", "heartbeat": time.time()})
    jobs.pump()
    assert state(run) == "running"
    change_status(run.path, lambda status: {"heartbeat": time.time() - jobs.REMOTE_STALE_SECONDS - 1})
    jobs.pump()
    assert state(run) == "interrupted"


def test_a_worker_that_cannot_be_started_fails_its_run(backend: Sleepers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    run = jobs.submit("inspect", {})
    assert state(run) == "failed"
    assert run.status().error == {"what": "The worker could not be started.", "why": "No such file or directory.", "remedy": "Resume the run."}
    assert [event.kind for event in run.events()] == ["queued", "failed"]
