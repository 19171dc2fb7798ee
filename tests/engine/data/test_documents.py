"""Cutting texts into documents, and dealing documents to parts that share none."""

from hypothesis import given
from hypothesis import strategies as st

from bitpress.engine.data.documents import PASSAGE, part_of, part_text, split_documents
from bitpress.engine.data.registry import PARTS


def test_every_way_of_cutting():
    tagged = '<doc id="1" url="u" title="A">\nA\n\nfirst\n\n</doc>\n<doc id="2" title="B &amp; C">\nB\n</doc>\n<doc id="3" title="empty">\n\n</doc>'
    assert split_documents(tagged, "tagged") == ["A\n\nfirst", "B"]
    assert split_documents("one\ntwo\n\n", "lines") == ["one", "two"]
    assert split_documents("one\nstory\n\nanother\n\n\n", "blank-lines") == ["one\nstory", "another"]
    assert split_documents("once\nupon\n<|endoftext|>\nagain\n<|endoftext|>", "endoftext") == ["once\nupon", "again"]


def test_passages_hold_whole_paragraphs_and_lose_nothing():
    paragraphs = [f"paragraph {number} " + "word " * (number % 7 * 60) for number in range(100)]
    passages = split_documents("\n\n".join(paragraphs), "passages")
    assert "\n\n".join(passages).split() == " ".join(paragraphs).split()
    assert all(len(passage) >= PASSAGE - 10 for passage in passages[:-1])
    assert max(map(len, passages)) < PASSAGE + max(map(len, paragraphs)) + 10


@given(st.lists(st.text(min_size=1), max_size=60))
def test_every_document_is_in_exactly_one_part_wherever_it_stands(documents):
    marked = [f"[{number}]{document}" for number, document in enumerate(documents)]
    for document in marked:
        assert sum(document in part_text(marked, part).split("\n\n") or part_of(document) == part for part in PARTS) == 1
    assert part_text(marked[::-1], "search").count("[") == part_text(marked, "search").count("[")


def test_the_shares_are_sixty_fifteen_twentyfive():
    parts = [part_of(str(number)) for number in range(20_000)]
    shares = [parts.count(part) / len(parts) for part in PARTS]
    assert all(abs(share - wanted) < 0.015 for share, wanted in zip(shares, (0.60, 0.15, 0.25), strict=True))
