"""Where two generations part and how far they agree after that. Knows token ids; no screen and no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

SAME, FIRST, OTHER = "same", "first", "other"


@dataclass(frozen=True)
class Alignment:
    """One mark a token on either side: `same`, `first` (the first divergence) or `other` (differs later on).

    first: position of the first divergence, None when none of the tokens there are differs. agreeing: tokens on the
    right that also stand on the left.
    """

    first: int | None
    left: tuple[str, ...]
    right: tuple[str, ...]

    @property
    def agreeing(self) -> int:
        """Tokens of the right side that the left side has too, in the same order."""
        return self.right.count(SAME)


def align(left: Sequence[int], right: Sequence[int], ended: bool = True) -> Alignment:
    """Compare two sequences of token ids: position by position up to the first difference, by longest common runs after it.

    Both sides share their seed and prompt, so up to the first difference a position means the same on both. After it
    the contexts differ and only runs of equal tokens can be told. While a side is still being written (`ended` False)
    one that is merely longer does not count as different.
    """
    common = min(len(left), len(right))
    first = next((index for index in range(common) if left[index] != right[index]), None)
    if first is None and (not ended or len(left) == len(right)):
        return Alignment(None, (SAME,) * len(left), (SAME,) * len(right))
    first = common if first is None else first
    rest = _rest(left[first:], right[first:])
    marks = [[SAME] * first + side for side in rest]
    for side in marks:
        if len(side) > first:
            side[first] = FIRST
    return Alignment(first, tuple(marks[0]), tuple(marks[1]))


def _rest(left: Sequence[int], right: Sequence[int]) -> tuple[list[str], list[str]]:
    """Marks after the divergence, by difflib's opcodes."""
    marks = [OTHER] * len(left), [OTHER] * len(right)
    for code, start, end, start_right, end_right in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if code == "equal":
            marks[0][start:end] = [SAME] * (end - start)
            marks[1][start_right:end_right] = [SAME] * (end_right - start_right)
    return marks
