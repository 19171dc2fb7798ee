"""Kept sensitivity measurements: the record and the file of one. Knows JSON; measures nothing and imports no torch.

`sensitivity/<model>-<digest>.json`, version 2: `{v, digest, model, fingerprint, kinds, text, tokens_sha256, protocol,
options: [{id, scheme}], seconds_of, scores: [{layer, option, kind, score}]}`; a kind that is measured later joins the same file.
A score is a harm: 0 is none. `data_free` and `activation` are squared errors relative to what was there; `fisher`, `kl` and
`kl_without` are nats of KL divergence a token, `loss` is `fisher` but for layers
that it cannot tell: of those the rise of the text's own loss over the best of their options, other layers changed as well.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitpress.engine.home import sensitivity_dir
from bitpress.engine.recipe import Scheme, SparsityScheme, WeightScheme

VERSION = 2
DATA_FREE, ACTIVATION, FISHER, LOSS, KL, KL_WITHOUT = "data_free", "activation", "fisher", "loss", "kl", "kl_without"
KINDS = (DATA_FREE, ACTIVATION, FISHER, LOSS, KL, KL_WITHOUT)
QUICK_KINDS = (DATA_FREE, ACTIVATION, FISHER, LOSS)
NATS = (FISHER, LOSS, KL, KL_WITHOUT)  # kinds whose scores are nats a token: KL divergence, or rise of the loss
NEED_TEXT = (ACTIVATION, *NATS)
DROP = "drop"  # what is done to a whole block; its layer is the block's name


class Option(BaseModel):
    """One thing that may be done to a layer; `id` is what a person reads."""

    model_config = ConfigDict(frozen=True)

    id: str
    scheme: Scheme


OPTIONS = (
    *(Option(id=f"{bits}-bit", scheme=Scheme(weights=WeightScheme(bits=bits, group_size=64))) for bits in (8, 4, 3, 2)),
    Option(id="50%", scheme=Scheme(sparsity=SparsityScheme(ratio=0.5))),
    Option(id="2:4", scheme=Scheme(sparsity=SparsityScheme(ratio=0.5, pattern="2:4"))),
)
EMBEDDING_BITS = (8, 4)  # widths at which the embedding and its tied head are scored
CACHE_BITS = (8, 4, 3, 2)  # widths at which the keys and values of each block are scored, the widest first


def cache_layer(block: int) -> str:
    """The name under which the KV cache of a block is scored."""
    return f"kv_cache.{block}"


class Score(BaseModel):
    """The harm of one option to one layer, by one kind of measure."""

    model_config = ConfigDict(frozen=True)

    layer: str
    option: str
    kind: str
    score: float


class SensitivityReport(BaseModel):
    """The measurements of a whole model on one text. `kinds` are those that are complete; `protocol` says in one line how they were made."""

    v: int = VERSION
    digest: str
    model: str
    fingerprint: str
    kinds: tuple[str, ...] = ()
    text: str
    tokens_sha256: str
    protocol: str
    options: tuple[Option, ...]
    seconds_of: dict[str, float] = {}
    scores: list[Score] = []

    @property
    def seconds(self) -> float:
        """What all of it took."""
        return sum(self.seconds_of.values())

    @property
    def path(self) -> Path:
        """Where the finished measurement is kept."""
        return sensitivity_dir() / f"{self.model.replace('/', '--')}-{self.digest}.json"

    @property
    def kind(self) -> str:
        """The kind to rank by: the truth where it was measured, else the nearest to it."""
        return next(kind for kind in (KL, FISHER, ACTIVATION, DATA_FREE, KL_WITHOUT) if kind in self.kinds)

    @property
    def spent_by(self) -> str:
        """The kind to spend a budget by."""
        return LOSS if LOSS in self.kinds else self.kind

    def table(self, kind: str | None = None) -> dict[str, dict[str, float]]:
        """Option -> layer -> score, of one kind. Whole blocks stand under `drop`."""
        wanted = kind or self.kind
        found: dict[str, dict[str, float]] = {option.id: {} for option in self.options}
        for score in self.scores:
            if score.kind == wanted:
                found.setdefault(score.option, {})[score.layer] = score.score
        return found

    def to_dict(self) -> dict[str, Any]:
        """The document of the command line: `scores` are of `kind`, the rest stand in `other_kinds`."""
        by_kind = {kind: [score.model_dump(exclude={"kind"}) for score in self.scores if score.kind == kind] for kind in self.kinds}
        main = {"digest": self.digest, "kind": self.kind, "seconds": round(self.seconds, 2), "scores": by_kind.pop(self.kind)}
        rest = {"model": self.model, "protocol": self.protocol, "seconds_of": {kind: round(spent, 2) for kind, spent in self.seconds_of.items()}}
        return {**main, "other_kinds": by_kind, **rest}

    def save(self, path: Path | None = None) -> Path:
        """Write the file whole or not at all."""
        target = path or self.path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_text(self.model_dump_json(), encoding="utf8")
        partial.replace(target)
        return target


def read(path: Path) -> SensitivityReport | None:
    """A kept measurement; None where there is none, or one of another version or damaged."""
    try:
        report = SensitivityReport.model_validate_json(path.read_text(encoding="utf8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return report if report.v == VERSION else None


def find(model_fingerprint: str, kinds: Sequence[str] = ()) -> SensitivityReport | None:
    """The newest finished measurement of these weights that has all of `kinds`; None before there is one."""
    files = sorted(sensitivity_dir().glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    reports = (report for path in files if (report := read(path)) is not None)
    return next((report for report in reports if report.fingerprint == model_fingerprint and set(kinds) <= set(report.kinds)), None)
