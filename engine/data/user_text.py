"""A person's own text file, read carefully. Knows .txt, .jsonl and .parquet, a size limit; `model.local` knows the folders it may read from."""

import json
from pathlib import Path

from bitpress.engine.data.documents import split_documents
from bitpress.engine.errors import InputError
from bitpress.engine.model.local import confined

MAX_BYTES = 256 * 1024 * 1024
SUFFIXES = (".txt", ".jsonl", ".parquet")


def is_path(text_id: str) -> bool:
    """True when a text id means a file of the person's own."""
    return text_id.lower().endswith(SUFFIXES)


def stamped(text_id: str) -> str:
    """A text id that names the content too: a file of the person's own gets its size and time of change, so that an edited one is another text."""
    if not is_path(text_id):
        return text_id
    try:
        found = Path(text_id).expanduser().stat()
    except OSError:
        return text_id
    return f"{text_id}#{found.st_size}-{found.st_mtime_ns}"


def read_documents(path: Path) -> list[str]:
    """The documents of the file: passages of a .txt, the `text` field of each row of a .jsonl or .parquet.

    Raises InputError when the file may not be read, is too large, or is not what its name says.
    """
    real = confined(path)
    if not real.is_file():
        raise InputError(f"{path} is no file.", "", "Give the path of the file itself.")
    if real.stat().st_size > MAX_BYTES:
        raise InputError(f"{path.name} is too large.", f"It has {real.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}.", "Cut it.")
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if real.suffix.lower() not in readers:
        raise InputError(f"{path.name} is not a text that can be read.", "", f"Give a file of type {', '.join(SUFFIXES)}.")
    return readers[real.suffix.lower()](real)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text.", f"{error.reason} at byte {error.start:,}.", "Save it as UTF-8.") from None


def _read_txt(path: Path) -> list[str]:
    return split_documents(_decoded(path).replace("\r\n", "\n"), "passages")


def _read_jsonl(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"Line {number} of {path.name} is not JSON.", f"{error}.", 'Write one object a line: {"text": "..."}.') from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f"Line {number} of {path.name} has no `text`.", "", 'Write one object a line: {"text": "..."}.')
        found.append(row["text"].strip())
    return [document for document in found if document]


def _read_parquet(path: Path) -> list[str]:
    import pandas

    try:
        column = pandas.read_parquet(path, columns=["text"])["text"]
    except Exception as error:  # a damaged file can fail anywhere in the reader
        why = f"{type(error).__name__}: {error}"[:300]
        raise InputError(f"{path.name} cannot be read.", why, "Give a parquet file with a column `text` of strings.") from None
    return [str(value).strip() for value in column.dropna() if str(value).strip()]
