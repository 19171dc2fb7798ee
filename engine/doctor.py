"""What this machine offers Bitpress, and what is missing: one line a check. Looks, never repairs."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Any
from urllib.parse import urlsplit

from bitpress.engine.home import home
from bitpress.engine.runs import machine

GIB = 1 << 30
HUB_SECONDS = 3.0
WANTED_MEMORY = 4 * GIB
WANTED_DISK = 2 * GIB


@dataclass(frozen=True)
class Check:
    """One finding. `needed` says whether Bitpress works at all without it."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    needed: bool = True


def examine() -> dict[str, Any]:
    """All checks and the machine: `{ok, machine, versions, checks: [{name, ok, found, remedy, needed}]}`. Takes about 3 s without a network."""
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(_hub)  # the only one that may have to wait
        checks = [check() for check in CHECKS] + [*_torch_checks(), hub.result()]
    return {"ok": all(check.ok for check in checks if check.needed), "machine": machine.describe(), "versions": machine.versions(),
            "checks": [asdict(check) for check in checks]}  # fmt: skip


def _python() -> Check:
    return Check("python", True, machine.versions()["python"])


def _home() -> Check:
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("home", True, f"{folder} can be written")
    except OSError as error:
        return Check("home", False, f"{folder}: {error.strerror or error}", "Choose another folder with --home or BITPRESS_HOME.")


def _memory() -> Check:
    total, free = machine.memory_total(), machine.memory_available()
    return Check("memory", free >= WANTED_MEMORY, f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", "A small model needs about 4 GiB.", False)


def _disk() -> Check:
    folder = next(path for path in (home(), *home().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return Check("disk", free >= WANTED_DISK, f"{free / GIB:.1f} GiB free under {folder}", "Free some space, or choose another home folder.", False)


def _processor() -> Check:
    flags = machine.cpu_flags()
    named = f"{machine.cpu_name()}, {machine.cores()} cores, {' '.join(sorted(flags & set(machine.SPEED_FLAGS))) or 'no vector features known'}"
    return Check("processor", bool(flags & {"avx2", "asimd"}), named, "Without AVX2 or NEON everything works, slowly.", False)


def _chromium() -> Check:
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    return Check("chromium", found is not None, found or "not found", "Only the browser tests need it: apt install chromium.", False)


CHECKS: list[Callable[[], Check]] = [_python, _home, _memory, _disk, _processor, _chromium]


def _torch_checks() -> Iterator[Check]:
    """torch is imported here, so that every other command stays quick."""
    if util.find_spec("torch") is None:
        yield Check("torch", False, "not installed", "Run `make app`, or pip install torch.")
        return
    import torch

    yield Check("torch", True, f"{metadata.version('torch')}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count()
    yield Check("gpu", count > 0, torch.cuda.get_device_name(0) if count else "none", "Bitpress works without one.", False)
    from bitpress.engine.model.load import compute_dtype

    fast = compute_dtype() == torch.bfloat16
    note = "bf16 products are as fast as they get here" if fast else "this processor has no AVX512_BF16 or AMX, so forwards of many tokens run in float32"
    yield Check("bf16", fast, note, "Only speed differs; decoding token by token is fast either way.", False)


def _hub() -> Check:
    """Whether the Hub takes a connection within three seconds; a name that does not resolve can hang longer than any time-out."""
    place = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    pool = ThreadPoolExecutor(1)
    began = time.monotonic()
    try:
        pool.submit(_knock, place.hostname or "", place.port or (80 if place.scheme == "http" else 443)).result(HUB_SECONDS)
        return Check("hub", True, f"{place.hostname} answers after {time.monotonic() - began:.1f} s", needed=False)
    except (OSError, TimeoutError) as error:
        found = f"{place.hostname} does not answer ({type(error).__name__})"
        return Check("hub", False, found, "The bundled models and texts need no Hub.", False)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _knock(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=HUB_SECONDS).close()


def as_lines(report: dict[str, Any]) -> list[str]:
    """The report for a terminal: a mark, the check, what was found, and the remedy where one is wanted."""
    marks = {(True, True): "ok  ", (True, False): "ok  ", (False, True): "FAIL", (False, False): "note"}
    lines = []
    for check in report["checks"]:
        lines.append(f"{marks[check['ok'], check['needed']]}  {check['name']:<10} {check['found']}")
        if not check["ok"] and check["remedy"]:
            lines.append(f"{'':<17}{check['remedy']}")
    return lines
