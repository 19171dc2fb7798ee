"""Where Bitpress keeps things. Knows folders only; creates none and reads none."""

import os
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder of everything Bitpress keeps: `BITPRESS_HOME`, else `~/.local/share/bitpress`. Read at each call."""
    chosen = os.environ.get("BITPRESS_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".local" / "share" / "bitpress"


def models_dir() -> Path:
    """One folder a model: weights, tokenizer, `anatomy.json`, `stats/`."""
    return home() / "models"


def runs_dir() -> Path:
    """One folder a run; the truth about it."""
    return home() / "runs"


def text_dir() -> Path:
    """Corpora that were fetched, each with its checksum."""
    return home() / "text"


def sensitivity_dir() -> Path:
    """Measured sensitivities, one file a (model, text, protocol) digest."""
    return home() / "sensitivity"


def presets_dir() -> Path:
    """Models, datasets and recipes that a person may edit, shipped with the package."""
    return PACKAGE_ROOT / "presets"


def assets_dir() -> Path:
    """The tiny model, recorded runs and pictures, shipped with the package."""
    return PACKAGE_ROOT / "assets"
