"""WikiText-2's test split in its two forms: the file itself, and the join that papers use. Knows rows and lines.

The `datasets` rows are the file's lines with blank ones emptied; the file says " \\n" there. Both forms are rebuilt from
either, and a checksum decides whether a rebuilt file may carry the name.
"""

import hashlib
from pathlib import Path

from bitpress.engine.data.hub import require_hub
from bitpress.engine.data.registry import TextEntry
from bitpress.engine.errors import BitpressError

BLANK = " \n"


def file_of(rows: list[str]) -> str:
    """The original file from the rows of the `datasets` loader."""
    return "".join(row if row.strip() else BLANK for row in rows)


def papers_join(file_text: str) -> str:
    """A blank line between all rows, as GPTQ's evaluation loop joins them (Frantar et al. 2023, official code)."""
    lines = [line + "\n" for line in file_text.split("\n")[:-1]]
    return "\n\n".join(line if line.strip() else "" for line in lines)


def fetch(entry: TextEntry, path: Path) -> None:
    """Download the rows, rebuild the file at `path`. Raises BitpressError when the Hub does not answer or its loader fails."""
    offline = "Connect and try again, set BITPRESS_TEST_DATA to a folder with text/wikitext2-raw-test.txt, or measure on `wiki`."
    require_hub(f"The text {entry.id}", offline)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(file_of(_rows(entry, offline)).encode())
    partial.replace(path)


def _rows(entry: TextEntry, remedy: str) -> list[str]:
    from datasets import load_dataset

    assert entry.hub is not None
    try:
        return list(load_dataset(entry.hub.repo, entry.hub.name, split=entry.hub.split)["text"])
    except Exception as error:  # the loader fails in as many ways as the network and the Hub's formats do
        raise BitpressError(f"The text {entry.id} could not be loaded from the Hub.", f"{type(error).__name__}: {error}"[:400], remedy) from error


def named(entry: TextEntry, text: str) -> str:
    """The id that this text may carry: the entry's own where the checksum is right, else one with its own checksum in it."""
    found = hashlib.sha256(text.encode()).hexdigest()
    return entry.id if found == entry.sha256 else f"{entry.id}-{found[:8]}"
