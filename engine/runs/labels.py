"""What a person says of a run: star, tags, note, archived, deleted. One small file in the run's folder; knows no model and no screen.

`labels.json`: `{v, star, tags, note, archived, deleted}`. Deleting marks the run, which can be taken back; `empty_bin` removes what
was marked long enough ago.
"""

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bitpress.engine.errors import InputError
from bitpress.engine.runs.status import ACTIVE, lock_of, read_status, replace_json
from bitpress.engine.runs.store import Store

FILE = "labels.json"
VERSION = 1
MOST_NOTE, MOST_TAGS, MOST_TAG = 4000, 20, 40
BIN_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Labels:
    """What is said of one run. deleted: when it was, in seconds since the epoch; None while it is not."""

    star: bool = False
    tags: tuple[str, ...] = ()
    note: str = ""
    archived: bool = False
    deleted: float | None = None
    v: int = VERSION


KNOWN = {item.name for item in fields(Labels)}


def read_labels(folder: Path) -> Labels:
    """The labels of a run folder; none where nothing was said or the file is damaged."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf8"))
        found = Labels(**{key: value for key, value in values.items() if key in KNOWN})
        return replace(found, tags=tuple(map(str, found.tags)))
    except (OSError, ValueError, TypeError, AttributeError):
        return Labels()


def change_labels(folder: Path, **changes: Any) -> Labels:
    """Set fields, others stay. Raises InputError for a run that is gone, a note or tags that are too long."""
    if not (folder / "status.json").exists():
        raise InputError(f"The run {folder.name} is gone.", "", "Reload the list.")
    if "tags" in changes:
        changes["tags"] = tidy_tags(changes["tags"])
    if len(changes.get("note", "")) > MOST_NOTE:
        raise InputError("The note is too long.", f"It has {len(changes['note']):,} characters; the limit is {MOST_NOTE:,}.", "Shorten it.")
    with lock_of(folder):
        made = replace(read_labels(folder), **changes)
        replace_json(folder / FILE, asdict(made))
    return made


def tidy_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Trimmed, each once, in order. Raises InputError when they are too many or too long."""
    found = tuple(dict.fromkeys(tag.strip() for tag in tags if tag.strip()))
    if len(found) > MOST_TAGS or any(len(tag) > MOST_TAG for tag in found):
        raise InputError("These tags cannot be kept.", f"At most {MOST_TAGS} tags of {MOST_TAG} characters.", "Shorten them.")
    return found


def delete(folder: Path) -> Labels:
    """Mark a run as deleted. Raises InputError while it waits or works."""
    status = read_status(folder)
    if status is not None and status.state in ACTIVE:
        raise InputError(f"The run {folder.name} is {status.state}.", "A run at work is not deleted.", "Cancel it first.")
    return change_labels(folder, deleted=time.time())


def restore(folder: Path) -> Labels:
    """Take a deletion or an archiving back."""
    return change_labels(folder, deleted=None, archived=False)


def empty_bin(home: Path | None = None, older_than: float = BIN_SECONDS) -> list[str]:
    """Remove for good the runs that were deleted longer ago than this; gives their ids."""
    gone = []
    for path in Store(home).folder.glob(f"*/{FILE}"):
        deleted = read_labels(path.parent).deleted
        if deleted is not None and time.time() - deleted > older_than:
            shutil.rmtree(path.parent, ignore_errors=True)
            gone.append(path.parent.name)
    return gone
