"""Kept sensitivity measurements: the record and the file of one. Knows JSON; measures nothing and imports no torch.

`sensitivity/<model>-<digest>.json`, version 1: `{v, digest, model, fingerprint, kinds, text, tokens_sha256, protocol,
options: [{id, scheme}], seconds, scores: [{layer, option, kind, score}]}`. A score is a harm: 0 is none, and both kinds
are squared errors relative to what was there.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitpress.engine.home import sensitivity_dir
from bitpress.engine.recipe import Scheme, SparsityScheme, WeightScheme

VERSION = 1
DATA_FREE, ACTIVATION = "data_free", "activation"
KINDS = (DATA_FREE, ACTIVATION)


class Option(BaseModel):
    """One thing that may be done to a layer; `id` is what a person reads."""

    model_config = ConfigDict(frozen=True)

    id: str
    scheme: Scheme


OPTIONS = (
    *(Option(id=f"{bits}-bit", scheme=Scheme(weights=WeightScheme(bits=bits, group_size=64))) for bits in (8, 4, 3, 2)),
    Option(id="50%", scheme=Scheme(sparsity=SparsityScheme(ratio=0.5))),
)


class Score(BaseModel):
    """The harm of one option to one layer, by one kind of measure."""

    model_config = ConfigDict(frozen=True)

    layer: str
    option: str
    kind: str
    score: float


class SensitivityReport(BaseModel):
    """One measurement of a whole model. `protocol` says in one line how it was made."""

    v: int = VERSION
    digest: str
    model: str
    fingerprint: str
    kinds: tuple[str, ...]
    text: str
    tokens_sha256: str
    protocol: str
    options: tuple[Option, ...]
    seconds: float = 0.0
    scores: list[Score] = []

    @property
    def path(self) -> Path:
        """Where the finished measurement is kept."""
        return sensitivity_dir() / f"{self.model.replace('/', '--')}-{self.digest}.json"

    @property
    def kind(self) -> str:
        """The kind to rank by: the one that looked at text, where it was measured."""
        return ACTIVATION if ACTIVATION in self.kinds else self.kinds[0]

    def table(self, kind: str | None = None) -> dict[str, dict[str, float]]:
        """Option -> layer -> score, of one kind."""
        wanted = kind or self.kind
        found: dict[str, dict[str, float]] = {option.id: {} for option in self.options}
        for score in self.scores:
            if score.kind == wanted:
                found[score.option][score.layer] = score.score
        return found

    def to_dict(self) -> dict[str, Any]:
        """The document of the command line: `scores` are of `kind`, the rest stand in `other_kinds`."""
        by_kind = {kind: [score.model_dump(exclude={"kind"}) for score in self.scores if score.kind == kind] for kind in self.kinds}
        main = {"digest": self.digest, "kind": self.kind, "seconds": round(self.seconds, 2), "scores": by_kind.pop(self.kind)}
        return {**main, "other_kinds": by_kind, "model": self.model, "protocol": self.protocol}

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
