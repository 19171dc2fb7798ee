"""Builds the C++ kernels on first use and keeps the library. Knows compilers and a cache folder; knows no format.

Having no compiler is never an error: `library()` then returns None and `why_not()` says the reason that the screens show.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SOURCES = ("lowbit", "table", "binary", "sparse", "panel", "step", "token", "stream", "cache", "outer", "attention", "compare", "round")
_HEADERS = ("bf16", "rows", "lanes", "panel", "lowbit", "meeting", "attend", "step", "cache", "cache_rows", "cache_codes", "cache_panel")
SOURCES = tuple(Path(__file__).with_name(f"cpu_{name}.cpp") for name in _SOURCES)
HEADERS = tuple(Path(__file__).with_name(f"cpu_{name}.h") for name in _HEADERS)
FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-std=c++17", "-fPIC")
BUILD_SECONDS = 180
PANEL_ROWS = 24  # from here on making a weight bfloat16 once costs less than multiplying its code for every row
_reason = ""
_building = threading.Lock()


def why_not() -> str:
    """Why there is no compiled library on this machine; empty while there is one."""
    return _reason


def library() -> ctypes.CDLL | None:
    """The compiled kernels, built when the cache has none for this source, compiler and processor; None when that fails.

    A build takes some ten seconds, once a machine; other threads that ask meanwhile wait for it.
    """
    with _building:
        return _library()


def panels(rows: int, dtype: object) -> bool:
    """Whether so many rows of inputs of a torch type are to meet bfloat16 panels of weights (`cpu_panel.cpp`) rather than codes."""
    lib = library() if rows >= PANEL_ROWS and str(dtype) == "torch.bfloat16" else None
    return lib is not None and bool(lib.bitpress_has_panels())


@functools.cache
def _library() -> ctypes.CDLL | None:
    global _reason
    try:
        return _declare(ctypes.CDLL(str(_built())))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        _reason = f"the C++ kernels are not available: {' '.join(str(detail).split())[:200]}"
        return None


def _built() -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if os.environ.get("BITPRESS_NO_COMPILER") or compiler is None:
        raise OSError("no C++ compiler was found (install g++ to get them)")
    target = cache_dir() / f"cpu-{_digest(compiler)}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:  # one build at a time, in whatever process
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, target)
    return target


def cache_dir() -> Path:
    """Where compiled kernels and what was measured of them are kept."""
    home = os.environ.get("BITPRESS_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".local" / "share" / "bitpress") / "kernels"


def _digest(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor's features, so that a copied home is never run on another machine."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    features = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1] if Path("/proc/cpuinfo").exists() else []
    parts = (*(path.read_text() for path in SOURCES + HEADERS), *FLAGS, version, platform.machine(), *features)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> None:
    """Write the library whole or not at all. Every source is compiled by a process of its own, as many at once as there are cores."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        commands = [[*FLAGS, "-c", "-o", str(made), str(source)] for made, source in zip(objects, SOURCES, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: _run(compiler, command), commands))
        whole = Path(folder) / target.name
        _run(compiler, [*FLAGS, "-shared", "-o", str(whole), *map(str, objects)])
        whole.replace(target)


def _run(compiler: str, arguments: list[str]) -> None:
    subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS, check=True)


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    lib.bitpress_linear.argtypes = [address, address, *[number] * 7, address, address, address, number, address, number]
    lib.bitpress_two_four_codes.argtypes = [address, address, *[number] * 6, *[address] * 4, number]
    lib.bitpress_linear.restype = lib.bitpress_two_four_codes.restype = number
    lib.bitpress_binary.restype = number
    rows: list[Any] = [address, address, *[number] * 4]  # x, y, is_bf16, rows, inputs, outputs
    lib.bitpress_table.argtypes = [*rows, number, address, address, address, number]
    lib.bitpress_binary.argtypes = [*rows, number, number, address, address, number]
    lib.bitpress_bitmap.argtypes = [*rows, address, address, address, number]
    lib.bitpress_two_four.argtypes = [*rows, address, address, number]
    lib.bitpress_has_panels.restype = number
    if lib.bitpress_has_panels():
        panel: list[Any] = [address, address, *[number] * 3]  # x, y, rows, inputs, outputs
        lib.bitpress_panel_linear.argtypes = [*panel, number, number, address, address, address, number, number]
        lib.bitpress_panel_table.argtypes = [*panel, number, address, address, address, number]
        lib.bitpress_panel_binary.argtypes = [*panel, number, number, address, address, number]
        lib.bitpress_attend_back.argtypes = [*[address] * 5, *[number] * 6, real, number]
        lib.bitpress_attend_back.restype = None
        lib.bitpress_outer.argtypes, lib.bitpress_outer.restype = [address, address, *[number] * 4, address, number], None
        lib.bitpress_panel_linear.restype = number
        lib.bitpress_panel_table.restype = lib.bitpress_panel_binary.restype = None
    size = ctypes.c_size_t
    lib.bitpress_read.argtypes, lib.bitpress_read.restype = [address, size, number], ctypes.c_uint64
    lib.bitpress_copy.argtypes, lib.bitpress_copy.restype = [address, address, size, number], None
    lib.bitpress_rms_norm.argtypes = [*[address] * 3, number, number, real, number, number]
    lib.bitpress_turn_rows.argtypes, lib.bitpress_turn_rows.restype = [*[address] * 4, number, ctypes.c_int64, *[number] * 4], None
    lib.bitpress_attend_one.argtypes = [*[address] * 5, *[number] * 5, real, number]
    lib.bitpress_attend_cache.argtypes, lib.bitpress_attend_cache.restype = [*[address] * 7, *[number] * 3, real, number], None
    lib.bitpress_compare.argtypes, lib.bitpress_compare.restype = [address, address, *[number] * 3, address, address, number], None
    lib.bitpress_turn_rounded.argtypes, lib.bitpress_turn_rounded.restype = [*[address] * 4, *[number] * 5], None
    lib.bitpress_gated_silu.argtypes = [*[address] * 3, number, number, ctypes.c_int64, number, number]
    lib.bitpress_round_groups.argtypes, lib.bitpress_round_groups.restype = [address, *[number] * 4, *[address] * 3, number], None
    lib.bitpress_widen_codes.argtypes, lib.bitpress_widen_codes.restype = [*[address] * 3, *[number] * 3, address, number], None
    lib.bitpress_token.argtypes = [address, number, address, number, *[address] * 6, *[number] * 5, real, number, number, number]
    lib.bitpress_token.restype = None
    for silent in (lib.bitpress_table, lib.bitpress_bitmap, lib.bitpress_two_four, lib.bitpress_rms_norm, lib.bitpress_attend_one, lib.bitpress_gated_silu):
        silent.restype = None
    return lib
