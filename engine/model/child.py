"""Run one child process that brings a file: watched, cancellable, bounded in time, its whole process group ended.

Knows processes, clocks and growing files. Refuses to know what the child fetches or how to word its failure.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bitpress.engine.model.folders import ShouldStop, check_stop, never

OnProgress = Callable[[int, int | None], None]  # bytes so far; bytes in all, or None when nobody knows
RAW_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
TICK_S = 0.1


class TooSlow(Exception):
    """The child brought nothing for too long, or was not done in time; the message is a clause that says which."""


def ignore_progress(done: int, total: int | None) -> None:
    """The callback of someone who does not watch."""


@dataclass(frozen=True)
class Watch:
    """How a child is watched: who is told, who may stop it, and for how many seconds it may run or stand still."""

    on_progress: OnProgress = ignore_progress
    should_stop: ShouldStop = never
    timeout_s: float = 1800
    stall_s: float = 120


def run_watched(command: list[str], scratch: Path, doing: str, total: int | None, watch: Watch) -> tuple[int, str]:
    """Run `command` in `scratch` to its end; returns its exit status and all it printed.

    Progress is the child's own "Progress N of M" lines where it prints them, else the bytes that lie below `scratch`
    (its temporary files land there too) of `total`. Raises FileNotFoundError when the program is absent, TooSlow, or
    Cancelled; whatever is raised, the child and its children are gone by then.
    """
    log, temporary = scratch / "log.txt", scratch / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(child, scratch, doing, total, watch)
        finally:
            _end(child)
    return child.returncode, log.read_text(encoding="utf-8", errors="replace")


def _wait(child: subprocess.Popen[bytes], scratch: Path, doing: str, total: int | None, watch: Watch) -> None:
    begun = moved = time.monotonic()
    seen = -1
    while child.poll() is None:
        check_stop(watch.should_stop, doing)
        done, of = _progress(scratch, total)
        now = time.monotonic()
        if done > seen:
            seen, moved = done, now
            watch.on_progress(min(done, of) if of else done, of)  # both tools keep a second copy for a moment
        if now - moved > watch.stall_s:
            raise TooSlow(f"no byte came for {watch.stall_s:g} s")
        if now - begun > watch.timeout_s:
            raise TooSlow(f"it was not complete after {watch.timeout_s:g} s")
        time.sleep(TICK_S)


def _progress(scratch: Path, total: int | None) -> tuple[int, int | None]:
    spoken = RAW_PROGRESS.findall((scratch / "log.txt").read_bytes())
    if spoken:
        done, of = map(int, spoken[-1])
        return done, of or total
    return size_of(scratch), total


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; files and folders that vanish while being counted count nothing."""
    total = 0
    for where, _, names in os.walk(folder):  # passes over folders that are gone, where a glob fails
        for name in names:
            with suppress(OSError):
                total += Path(where, name).stat().st_size
    return total


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop the child's whole process group, grandchildren that outlive it included: asked first, then made to."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            child.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
