"""Where a worker runs: the small face that the job engine knows of it. Knows commands and handles; nothing of runs.

A worker writes files only, so the same command runs as a local process or on a cluster that sees the same folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Resources:
    """What a command asks for."""

    gpus: int = 0


@dataclass(frozen=True)
class Handle:
    """A command that was started: the leader of its process group, and when that began (a pid alone may be recycled)."""

    pid: int
    began: float | None


class Backend(Protocol):
    """Starts commands and stops them. No call blocks for longer than starting a process takes."""

    def submit(self, command: list[str], log: Path, resources: Resources) -> Handle:
        """Start the command, its output appended to `log`. Raises OSError when it cannot be started."""

    def alive(self, handle: Handle) -> bool:
        """Whether that very command still runs."""

    def cancel(self, handle: Handle, force: bool = False) -> None:
        """Ask the command and its children to stop, or (force) end them. A command that is gone is no error."""

    def tail(self, log: Path, offset: int = 0) -> tuple[str, int]:
        """The output from a byte offset on, and the offset to go on from."""
