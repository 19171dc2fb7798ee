"""Cut a text into whole documents, and deal them to calibration, search and evaluation. Knows strings only.

A document's own hash decides its part, so the parts never share one (nor an exact duplicate of one), whatever file or
order it comes in.
"""

import hashlib
import re
from collections.abc import Callable

from bitpress.engine.data.registry import PARTS, Part

SHARES = {"calibration": 60, "search": 15, "evaluation": 25}  # percent
PASSAGE = 4000  # characters: about a page, so that a passage still has context of its own
BLANK_LINE = re.compile(r"\n[ \t]*\n")
TAGGED = re.compile(r"<doc [^>]*>\n?(.*?)</doc>", re.DOTALL)


def split_documents(text: str, how: str) -> list[str]:
    """The documents of a text, stripped, empty ones left out. `how`: a way of presets/datasets.yaml."""
    return [document.strip() for document in CUTS[how](text) if document.strip()]


def _passages(text: str) -> list[str]:
    """Paragraphs gathered until a passage has PASSAGE characters; a paragraph is never cut."""
    passages: list[str] = []
    size = PASSAGE
    for paragraph in BLANK_LINE.split(text):
        if size >= PASSAGE:
            passages.append(paragraph)
            size = len(paragraph)
        else:
            passages[-1] += "\n\n" + paragraph
            size += len(paragraph)
    return passages


CUTS: dict[str, Callable[[str], list[str]]] = {
    "tagged": TAGGED.findall,
    "lines": lambda whole: whole.split("\n"),
    "endoftext": lambda whole: whole.split("<|endoftext|>"),
    "blank-lines": BLANK_LINE.split,
    "passages": _passages,
}


def part_of(document: str) -> Part:
    """The part a document belongs to: its sha256 falls into one of three ranges of 60, 15 and 25%."""
    place = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) * 100 >> 32
    for part in PARTS:
        place -= SHARES[part]
        if place < 0:
            return part
    raise AssertionError("the shares sum to 100")


def part_text(documents: list[str], part: Part) -> str:
    """The documents of one part in their order, a blank line between them."""
    return "\n\n".join(document for document in documents if part_of(document) == part)
