"""What went wrong, in words a person can act on: {what, why, remedy}. Knows kinds of errors; decides nothing.

The traceback goes to the log; what stands here is what a screen and the command line show.
"""

import errno

from bitpress.engine.errors import BitpressError, Cancelled
from bitpress.engine.runs import machine

GIB = 1 << 30
HEADROOM = int(1.5 * GIB)  # what a run needs beside its weights: logits in slices, one block at work, the process itself
NO_SPACE = ("no space left", "os error 28", "disk quota", "database or disk is full")
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate", "cannot allocate", "failed to allocate", "bad_alloc")


def explain(error: BaseException, had_bytes: int | None = None) -> BitpressError:
    """The error as a refusal with a remedy. `had_bytes` is the memory that was free when the run began."""
    if isinstance(error, BitpressError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Cancelled()
    if is_disk_full(error):
        return BitpressError("The disk is full.", "The run's folder could not take more data.", "Free some space and resume the run: finished layers are kept.")
    if is_out_of_memory(error):
        return _out_of_memory(had_bytes)
    said = " ".join(str(error).split())[:300]
    why = f"{type(error).__name__}: {said}" if said else f"{type(error).__name__}."
    return BitpressError("The run stopped on an unexpected error.", why, "The log has the details; resuming goes on from the last finished layer.")


def is_disk_full(error: BaseException) -> bool:
    """Whether any error in the chain says that a disk or quota is full; safetensors says so in words only."""
    return any(getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _says(link, NO_SPACE) for link in _chain(error))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or the system could not allocate."""
    return any(isinstance(link, MemoryError) or (isinstance(link, RuntimeError | OSError) and _says(link, NO_MEMORY)) for link in _chain(error))


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _out_of_memory(had_bytes: int | None) -> BitpressError:
    had = had_bytes if had_bytes is not None else machine.memory_available()
    held = machine.peak_rss()
    fits = max(0, had - HEADROOM)
    why = f"The run held {held / GIB:.1f} GiB at its peak; {had / GIB:.1f} GiB of memory were free when it began."
    fitting = f"A model of up to about {fits / GIB:.1f} GiB of dense weights fits here" if fits > GIB // 10 else "No model fits in so little memory"
    return BitpressError("There is not enough memory for this run.", why, f"{fitting}; close other programs or choose a smaller model or the quick tier.")
