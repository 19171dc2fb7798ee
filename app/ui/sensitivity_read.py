"""The kept sensitivities as the page wants them: tables by score kind and option, and how long measuring took before. Torch-free."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bitpress.app import state
from bitpress.app.ui.sensitivity_view import Table
from bitpress.engine import sensitivity_file
from bitpress.engine.errors import BitpressError
from bitpress.engine.home import sensitivity_dir
from bitpress.engine.model.anatomy import Anatomy
from bitpress.engine.sensitivity_file import SensitivityReport


@dataclass(frozen=True)
class Measured:
    """One measurement: kind -> option -> layer -> score, how long it took, and its protocol in one line."""

    tables: dict[str, Table]
    seconds: float
    protocol: str


def measured_of(anatomy: Anatomy) -> Measured | None:
    """The newest measurement of these weights, None before there is one. Scores of layers that the model has not are left out."""
    report = _found(anatomy.fingerprint, _stamps())
    if report is None:
        return None
    tables = {kind: {option: _known(scores, anatomy) for option, scores in report.table(kind).items()} for kind in report.kinds}
    tables = {kind: {option: scores for option, scores in table.items() if scores} for kind, table in tables.items()}
    tables = {kind: table for kind, table in tables.items() if table}
    return Measured(tables, report.seconds, report.protocol) if tables else None


def report_of(anatomy: Anatomy, kind: str) -> SensitivityReport | None:
    """The newest whole measurement of these weights that has this kind, read once while nothing new is kept."""
    return _found_with(anatomy.fingerprint, kind, _stamps())


def _known(scores: dict[str, float], anatomy: Anatomy) -> dict[str, float]:
    return {layer: score for layer, score in scores.items() if layer in anatomy.by_name}


def past_rates() -> list[tuple[int, float]]:
    """(weights, seconds) of the measurements that are kept here."""
    rates = []
    for report in _reports(_stamps()):
        anatomy = _anatomy(report.model)
        if anatomy is not None and report.seconds > 0:
            rates.append((anatomy.linear_params, report.seconds))
    return rates


def _anatomy(model: str) -> Anatomy | None:
    try:
        return state.anatomy_of(model)
    except BitpressError:
        return None


Stamps = tuple[tuple[str, int], ...]


def _stamps() -> Stamps:
    """What is kept now and since when: the key under which what was read stays good."""
    return tuple(sorted((str(path), path.stat().st_mtime_ns) for path in sensitivity_dir().glob("*.json")))


@lru_cache(maxsize=8)
def _found(fingerprint: str, stamps: Stamps) -> SensitivityReport | None:
    return sensitivity_file.find(fingerprint)


@lru_cache(maxsize=8)
def _found_with(fingerprint: str, kind: str, stamps: Stamps) -> SensitivityReport | None:
    return sensitivity_file.find(fingerprint, [kind])


@lru_cache(maxsize=2)
def _reports(stamps: Stamps) -> tuple[SensitivityReport, ...]:
    return tuple(report for path, _ in stamps if (report := sensitivity_file.read(Path(path))) is not None)
