"""The process that does one run: reads the request, runs its kind, keeps the record. Knows folders and signals; the work is in `kinds`.

`python -m bitpress.engine.runs.worker RUN_DIR`. It writes files only, so it runs the same as a local process or on a
cluster. It lives on when whoever started it is gone, and at its end it starts what waits in the queue.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
from filelock import Timeout

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.runs import failures, jobs, machine
from bitpress.engine.runs.events import EventWriter
from bitpress.engine.runs.orders import has_waiting
from bitpress.engine.runs.status import Status, change_status, process_started, replace_json, worker_lock
from bitpress.engine.runs.store import Run
from bitpress.engine.runs.task import Task

BEAT_SECONDS = 2.0
HANDOVER_SECONDS = 3.0  # for the folder's last worker to be gone
RESERVE_BYTES = 1 << 16  # given back when the disk is full, so that the record can say so


class Heartbeat(threading.Thread):
    """Every two seconds: the record's heartbeat, progress and pid, one `resources` event, and a look for a cancel in the record."""

    def __init__(self, task: Task) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.task = task
        self._ended = threading.Event()
        self._process = psutil.Process()
        self._process.cpu_percent()

    def run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, Timeout):  # a full disk or a busy lock must not end the heartbeat
                self.beat()

    def beat(self) -> None:
        """One beat."""
        asked = change_status(self.task.run.path, self._alive)
        if asked is not None and asked.state == "cancelling":
            self.task.stop()
        self.task.emit("resources", resources(self._process))

    def _alive(self, _: Status) -> dict[str, Any]:
        return {**self.task.standing(), **whereabouts(), "heartbeat": time.time()}

    def end(self) -> None:
        """Stop after the beat under way."""
        self._ended.set()
        self.join()


def resources(process: psutil.Process) -> dict[str, Any]:
    """Memory in bytes and CPU in percent of one core; the GPU's memory only where this process uses one."""
    used: dict[str, Any] = {"rss": process.memory_info().rss, "cpu": process.cpu_percent()}
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        used["gpu"] = cuda.memory_reserved()
    return used


def whereabouts() -> dict[str, Any]:
    """Where this process is found: host, pid and the pid's start time."""
    return {"pid": os.getpid(), "pid_started": process_started(os.getpid()), "host": socket.gethostname()}


def main(folder: Path) -> int:
    """Do the run in this folder; gives the exit code 0, 1, 2 or 130. A folder that another worker holds is left to it."""
    run = Run(folder.resolve())
    os.environ["BITPRESS_HOME"] = str(run.path.parent.parent)
    faulthandler.enable()
    try:
        with worker_lock(run.path, HANDOVER_SECONDS):
            code = _work(run) if _claim(run) else 0
    except Timeout:
        return 0
    if run.request().get("kind") == "desk" and code == 0 and has_waiting(run.path):
        with contextlib.suppress(InputError):  # an order came while this worker ended; whoever gave it may have resumed the desk
            jobs.resume(run.id)
    jobs.pump()
    return code


def _claim(run: Run) -> bool:
    """Put this process on record; False when the run is no longer wanted."""

    def ours(status: Status) -> dict[str, Any] | None:
        if status.state not in ("queued", "running"):
            return None
        now = time.time()
        return {**whereabouts(), "state": "running", "phase": "starting", "started": now, "heartbeat": now, "ended": None, "error": None}

    if change_status(run.path, ours) is not None:
        return True
    if run.status().state == "cancelling":
        with run.writer() as events:
            _end(run, events, Cancelled())
    return False


def _work(run: Run) -> int:
    """Run the kind between the events `started` and one of finished, cancelled, failed."""
    with run.writer() as events:
        task = Task(run, events)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: task.stop())
        heartbeat, error = Heartbeat(task), None
        heartbeat.start()
        free = machine.memory_available()
        try:
            _prepare(task)
            task.do()
        except BaseException as caught:
            error = failures.explain(caught, free)
            _log(run)
        heartbeat.end()
        _end(run, events, error)
    return error.exit_code if error else 0


def _prepare(task: Task) -> None:
    (task.run.path / ".reserve").write_bytes(b"\0" * RESERVE_BYTES)
    replace_json(task.run.path / "env.json", {**machine.describe(), "versions": machine.versions()})
    task.emit("started", {"pid": os.getpid(), "host": socket.gethostname()})


def _log(run: Run) -> None:
    """The traceback of the error being handled, in the log and nowhere else."""
    with contextlib.suppress(OSError), (run.path / "log.txt").open("a", encoding="utf8") as log:
        log.write(traceback.format_exc())


def _end(run: Run, events: EventWriter, error: BitpressError | None) -> None:
    """The last event and the last state. The reserve is freed first, so that both can be written on a full disk."""
    (run.path / ".reserve").unlink(missing_ok=True)
    state = "finished" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
    said = {} if error is None else error.as_dict()
    with contextlib.suppress(OSError):
        events.write(state, {**said, "exit_code": error.exit_code} if error else {})
    change_status(run.path, lambda _: {"state": state, "ended": time.time(), "eta_s": None, "error": said if state == "failed" else None})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
