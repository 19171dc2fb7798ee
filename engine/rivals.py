"""Other people's runtimes on the same machine, each in a Python of its own. Knows how to ask them; imports none of them.

A rival is asked only where its Python is named (`--rival-python llama.cpp=/path/to/python`); every answer is one JSON line
of a script under `rival_scripts/`. One that is not there or does not answer gives a row that says why, never a figure.
"""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitpress.engine.errors import InputError

SCRIPTS = Path(__file__).parent / "rival_scripts"
KERNELS = {"bitsandbytes": "bitsandbytes_gemv.py", "torchao": "torchao_gemv.py", "hqq": "hqq_gemv.py"}  # one matrix, one row
NAMES = {"llama.cpp": "llamacpp.py", **KERNELS}
SECONDS = 120


def parse(options: list[str]) -> dict[str, str]:
    """`NAME=VALUE` options as a mapping. Raises InputError for a rival that is not known or a value that is missing."""
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in NAMES or not value:
            raise InputError(f"'{option}' names no rival.", f"Rivals are {', '.join(NAMES)}.", "Write it as llama.cpp=/path/to/python.")
        found[name] = value
    return found


def ask(name: str, pythons: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """The rival's answer, or {"rival": name, "skipped": why}."""
    if name not in pythons:
        return {"rival": name, "skipped": f"no Python of its own was named (--rival-python {name}=PATH)"}
    command = [pythons[name], str(SCRIPTS / NAMES[name]), str(torch.get_num_threads()), *arguments]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        return {"rival": name, **json.loads(shown.stdout.splitlines()[-1])}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return {"rival": name, "skipped": f"it did not answer: {told[-1][:200] if told else type(error).__name__}"}
