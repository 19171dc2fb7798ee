"""`make bench-quality`: every bench of quality in turn, each a program of its own; says first how long they take, and last which were skipped and why.

Minutes are estimates for two cores, not measurements. Rows that a bench keeps are found again, so that a long go can be cut short and gone on
with: `--only` names the benches to run. Exit 1 when a bench breaks a promise or fails.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bitpress.engine.errors import BitpressError
from bitpress.engine.home import home
from bitpress.engine.model.library import model_path

HERE, KEPT = Path(__file__).parent, home() / "bench" / "pruning"
PRUNING = ("--windows", "24", "--length", "256", "--sequences", "32", "--calibration-length", "256")


@dataclass(frozen=True)
class Bench:
    """A program with its arguments, what it takes and what it cannot do without. rival: the environment that some of its rows need, and how it is told."""

    title: str
    minutes: int
    command: tuple[str, ...]
    model: str = ""
    data: bool = False
    rivals: str = ""  # the argument that names the folder of all environments
    rival: tuple[str, str] = ("", "")  # an argument and the one environment whose interpreter it names

    def missing(self) -> str:
        """Why it cannot run here; empty when it can."""
        if self.data and not os.environ.get("BITPRESS_TEST_DATA"):
            return "BITPRESS_TEST_DATA names no folder of test texts"
        try:
            if self.model:
                model_path(self.model)
        except BitpressError as error:
            return f"{error.what} {error.remedy}".strip()
        return ""

    def arguments(self, rivals: Path | None) -> list[str]:
        """The command line, with the rivals that are there."""
        found = [sys.executable, str(HERE / self.command[0]), *self.command[1:]]
        if rivals and self.rivals:
            found += [self.rivals, str(rivals)]
        python = rivals / self.rival[1] / "bin" / "python" if rivals and self.rival[1] else None
        return [*found, self.rival[0], str(python)] if python and python.exists() else found


def pruning(part: str, minutes: int, *more: str, rival: tuple[str, str] = ("", "")) -> Bench:
    """A part of the bench of pruning, its rows kept."""
    return Bench(f"pruning-{part}", minutes, ("pruning.py", part, *PRUNING, *more, "--rows", str(KEPT / f"{part}.jsonl")), "smollm2-135m", True, rival=rival)


BENCHES = (
    Bench("quantisation", 240, ("quality.py",), rivals="--rivals"),
    pruning("unstructured", 25, rival=("--llmcompressor", "llmcompressor")),
    pruning("structured", 50, "--measured", "once"),
    pruning("modules", 40),
    Bench("block-reconstruction", 60, ("block_reconstruction.py", "--tune")),
    Bench("low-rank", 150, ("lowrank.py", "--model", "smollm2-135m", "--tables", "weights", "search", "cache", "sharing"), "smollm2-135m"),
    Bench("depth-speed", 3, ("depth_speed.py",), "smollm2-135m"),
    Bench("encoder", 25, ("encoder.py",), data=True),
    Bench("dual-encoder", 10, ("dual_encoder.py",)),
)


def main(asked: argparse.Namespace) -> int:
    """Say what is to come, run it, and sum it up."""
    chosen = [bench for bench in BENCHES if bench.title in asked.only]
    missing = {bench.title: bench.missing() for bench in chosen}
    for bench in chosen:
        say(f"{bench.title:22} {f'left out: {missing[bench.title]}' if missing[bench.title] else f'about {bench.minutes} min'}")
    say(f"About {sum(bench.minutes for bench in chosen if not missing[bench.title])} minutes in all; `--only NAME` runs fewer.")
    if asked.plan:
        return 0
    KEPT.mkdir(parents=True, exist_ok=True)
    ended = {bench.title: run(bench, asked.rivals) for bench in chosen if not missing[bench.title]}
    for title, why in missing.items():
        say(f"{title:22} {f'left out: {why}' if why else ended[title]}")
    return 0 if all(told.startswith("done") for told in ended.values()) else 1


def run(bench: Bench, rivals: Path | None) -> str:
    """Run one and say how it ended."""
    say(f"\n{bench.title}, about {bench.minutes} minutes")
    began = time.perf_counter()
    code = subprocess.run(bench.arguments(rivals), check=False).returncode
    return f"{'done' if code == 0 else f'ended with {code}'} after {(time.perf_counter() - began) / 60:.0f} min"


def say(line: str) -> None:
    """To stderr: stdout is the benches' rows."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the benches of quality.")
    parser.add_argument("--only", nargs="+", choices=[bench.title for bench in BENCHES], default=[bench.title for bench in BENCHES], metavar="NAME")
    parser.add_argument("--rivals", type=Path, help="folder with one virtual environment for each library to compare with")
    parser.add_argument("--plan", action="store_true", help="say what would run, and how long it takes")
    sys.exit(main(parser.parse_args()))
