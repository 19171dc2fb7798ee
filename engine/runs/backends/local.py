"""Workers as processes of this machine: one process group each, which outlives whoever started it."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from bitpress.engine.runs.backends.base import Handle, Resources
from bitpress.engine.runs.status import process_alive, process_started


class LocalBackend:
    """The default backend."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def submit(self, command: list[str], log: Path, resources: Resources) -> Handle:
        """Start the command in a session of its own, so that closing the parent's terminal does not end it."""
        with log.open("ab") as output:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self._children[child.pid] = child
        return Handle(child.pid, process_started(child.pid))

    def alive(self, handle: Handle) -> bool:
        """Whether the process runs; a child of ours that ended is also taken off the process table."""
        child = self._children.get(handle.pid)
        if child is not None and child.poll() is not None:
            del self._children[handle.pid]
        return process_alive(handle.pid, handle.began)

    def cancel(self, handle: Handle, force: bool = False) -> None:
        """SIGTERM, or with force SIGKILL, to the whole group; never to a process that only shares the number."""
        if not process_alive(handle.pid, handle.began):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(handle.pid, signal.SIGKILL if force else signal.SIGTERM)

    def tail(self, log: Path, offset: int = 0) -> tuple[str, int]:
        """Text from `offset` on; an absent file is empty."""
        try:
            with log.open("rb") as file:
                file.seek(offset)
                read = file.read()
        except FileNotFoundError:
            return "", offset
        return read.decode("utf8", "replace"), offset + len(read)
