"""Folders that appear whole or not at all, one maker at a time.

Knows locks, partial folders, fsync and rename. Refuses to know what is in the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bitpress.engine.errors import BitpressError, Cancelled

ShouldStop = Callable[[], bool]
KEPT = "Nothing was left half installed."


def never() -> bool:
    return False


def check_stop(should_stop: ShouldStop, doing: str) -> None:
    """Raise Cancelled when the person has asked for a stop."""
    if should_stop():
        raise Cancelled(what=f"{doing} was cancelled.", why="You asked for it to stop.", remedy=KEPT)


@contextmanager
def locked(folder: Path, should_stop: ShouldStop = never) -> Iterator[None]:
    """Hold the machine-wide lock of `folder` (a file beside it); waits while another process holds it.

    Raises Cancelled when `should_stop` says so during the wait. The system drops the lock of a process that dies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        while not _try_lock(handle.fileno()):
            check_stop(should_stop, f"Waiting for another process that is installing {folder.name}")
            time.sleep(0.05)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield an empty partial folder that becomes `folder` when the block ends well and vanishes when it does not.

    Call it under `locked(folder)`: leavings of makers that were killed are swept first. An older `folder` is replaced.
    Raises BitpressError when the disk is full.
    """
    for leaving in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leaving, ignore_errors=True)
    partial = folder.parent / f"{folder.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        yield partial
        _settle(partial)
        _swap(partial, folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise full_disk(folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def full_disk(folder: Path, needed: int = 0) -> BitpressError:
    """The refusal for a disk with too little room, in whole megabytes."""
    free = shutil.disk_usage(_existing(folder)).free // 1_000_000
    need = f"about {needed // 1_000_000:,} MB are needed and " if needed else ""
    remedy = f"Free some space, or choose another place with BITPRESS_HOME. {KEPT}"
    return BitpressError(what=f"{folder.name} cannot be installed.", why=f"{need}{free:,} MB are free.", remedy=remedy)


def check_room(folder: Path, needed: int) -> None:
    """Raise BitpressError when the disk of `folder` has less than `needed` bytes free."""
    if shutil.disk_usage(_existing(folder)).free < needed:
        raise full_disk(folder, needed)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _settle(folder: Path) -> None:
    """Push every file of the folder to the disk, so that a power cut cannot leave a named, empty file."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, folder: Path) -> None:
    """Put `partial` in place; a folder cannot be renamed onto a full one, so an older one steps aside first."""
    if not folder.exists():
        partial.replace(folder)
        return
    aside = folder.parent / f"{folder.name}.partial-old-{os.getpid()}"
    folder.replace(aside)
    partial.replace(folder)
    shutil.rmtree(aside, ignore_errors=True)
