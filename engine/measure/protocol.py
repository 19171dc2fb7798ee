"""The conditions under which a number holds. Knows names and counts only; holds no text, no model, and imports no torch.

Two numbers with different protocols are two quantities: they never share an axis. Conventions: non-overlapping windows,
mean of window means, the first token of a window never scored (the loop of GPTQ, AWQ, SparseGPT and Wanda).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from bitpress.engine.errors import InputError


@dataclass(frozen=True)
class Tier:
    """How much text is looked at: `windows` pieces of `window` tokens; None means all that the text has."""

    window: int
    windows: int | None


TIERS = {"quick": Tier(256, 8), "standard": Tier(2048, 16), "full": Tier(2048, None)}


def tier_named(name: str) -> Tier:
    """The tier of that name. Raises InputError for a name that no tier has."""
    if name not in TIERS:
        raise InputError(f"There is no tier {name!r}.", "A tier says how much text is measured.", f"Choose one of {', '.join(TIERS)}.")
    return TIERS[name]


def window_for(tier: str, context: int) -> int:
    """Tokens a window has under a tier in a model that reads `context` tokens at most."""
    return min(tier_named(tier).window, context)


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a perplexity besides the weights.

    text, part, sha256: the corpus, which part of it, and the checksum of the characters that were tokenised.
    join: how rows of the corpus became one text. bos: how a beginning-of-sequence token enters.
    window, stride, windows: tokens a window, tokens between window starts, windows measured.
    asked_window: the tier's window, larger than `window` where the model's context cut it.
    """

    text: str
    sha256: str
    part: str
    join: str
    window: int
    stride: int
    windows: int
    tokenizer: str
    bos: str
    dtype: str
    device: str
    threads: int
    asked_window: int
    first_token_scored: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a metrics file, with the digest."""
        return {**asdict(self), "digest": self.digest()}

    def digest(self) -> str:
        """Stable hash over every field; 16 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def one_line(self) -> str:
        """What stands beside the number on screen."""
        overlap = "non-overlapping" if self.stride == self.window else f"stride {self.stride:,}"
        cut = f" (cut from {self.asked_window:,} to the model's context)" if self.asked_window > self.window else ""
        parts = [self.text, self.part, f"join {self.join}", f"{self.windows:,} windows of {self.window:,}{cut}", overlap, f"BOS {self.bos}"]
        parts += [f"tokenizer {self.tokenizer}", "first token not scored", f"{self.dtype} on {self.device}, {self.threads} threads"]
        return " · ".join(parts)
