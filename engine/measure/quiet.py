"""Whether the machine was quiet enough to time something. Knows the machine's load; not what is timed, and imports no torch.

On a busy machine a step waits for a pre-empted thread and the median is that of the scheduler. So timings take a
machine-wide lock, and what disturbed them is written beside them.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from filelock import FileLock, Timeout

from bitpress.engine.home import home

LOCK_SECONDS = 60.0
SPARE_CORES = 0.25  # what a desktop's own housekeeping may take


@dataclass
class Noise:
    """What else went on while something was timed; `reasons` is empty when the figures can be trusted."""

    reasons: list[str] = field(default_factory=list)
    other_cores: float = 0.0
    load_average: float = 0.0


@contextmanager
def quiet_machine(threads: int, lock_seconds: float = LOCK_SECONDS) -> Iterator[Noise]:
    """Hold the lock that all timings of this machine's user share, and watch the other processes meanwhile.

    threads: threads the timed work uses. A lock that is not free in time, and other processes that leave fewer cores than
    that, are reasons in the yielded Noise, which is complete when the block ends.
    """
    noise = Noise()
    lock = _lock(noise, lock_seconds)
    began, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    try:
        yield noise
    finally:
        wall = max(time.perf_counter() - began, 1e-9)
        noise.other_cores = max(0.0, (_busy_seconds() - busy - (_own_seconds() - own)) / wall)
        noise.load_average = os.getloadavg()[0]
        if noise.other_cores + threads > (os.cpu_count() or 1) + SPARE_CORES:
            noise.reasons.append(f"other processes used {noise.other_cores:.1f} of {os.cpu_count()} cores")
        if lock:
            lock.release()


def _lock(noise: Noise, seconds: float) -> FileLock | None:
    home().mkdir(parents=True, exist_ok=True)
    lock = FileLock(home() / "timing.lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        noise.reasons.append(f"another timing held the machine for more than {seconds:g} s")
        return None
    return lock


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system
