"""What this machine is: processor, cores, memory, versions. Reads the system; measures nothing and imports no torch."""

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("bitpress", "torch", "transformers", "safetensors", "tokenizers", "numpy", "streamlit")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
CGROUP_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))
SPEED_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_flags() -> set[str]:
    """Feature flags of the first processor; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_total() -> int:
    """Bytes of memory, a container's limit counted."""
    return min([psutil.virtual_memory().total, *_numbers(CGROUP_LIMITS)])


def memory_available() -> int:
    """Bytes that a new process could take without swapping, a container's limit counted."""
    limits, used = _numbers(CGROUP_LIMITS), _numbers(CGROUP_USED)
    left = [max(0, limits[0] - used[0])] if limits and used else []
    return min([psutil.virtual_memory().available, *left])


def _numbers(paths: tuple[Path, ...]) -> list[int]:
    """The first of these files that holds a number below a petabyte (the old way of writing 'no limit' is larger)."""
    for path in paths:
        try:
            number = int(path.read_text())
        except (OSError, ValueError):
            continue
        return [number] if number < 1 << 50 else []
    return []


def peak_rss() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """The machine in a few plain values, for `env.json` and the bench tables."""
    return {"host": platform.node(), "system": platform.platform(), "cpu": cpu_name(), "cores": cores(), "memory_bytes": memory_total(),
            "cpu_features": sorted(cpu_flags() & set(SPEED_FLAGS))}  # fmt: skip
