"""Make what the first visit shows before anything was computed: the tiny model's anatomy and statistics, and recorded runs.

    python assets/make_recorded.py [PRESET ...]

Each run is a real one, made by a real worker in a home of its own; only its weights are left behind. Knows no figures.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
MODEL, PRESETS = "tiny-stories", ("uniform-4bit", "uniform-2bit")
KEPT = ("recipe.yaml", "request.json", "status.json", "events.jsonl", "metrics.json", "samples.jsonl", "env.json")


def inspect() -> None:
    """Write anatomy.json and stats/ beside the tiny model's weights."""
    from bitpress.engine.model.inspect import write_inspection
    from bitpress.engine.model.load import load

    shutil.rmtree(ASSETS / "tiny" / "stats", ignore_errors=True)
    write_inspection(load(MODEL), ASSETS / "tiny")


def record(preset: str) -> Path:
    """Compress the tiny model with a preset and keep the run's folder without its weights; returns the folder."""
    from bitpress.engine.recipe_presets import find_preset, for_model
    from bitpress.engine.runs import jobs
    from bitpress.engine.runs.follow import follow

    run = jobs.submit("compress", {}, for_model(find_preset(preset), MODEL))
    follow(run)
    target = ASSETS / "recorded" / f"{MODEL}-{preset}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in KEPT:
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, target / name)
    _forget_machine(target / "status.json")
    return target


def _forget_machine(path: Path) -> None:
    """A recording says what processor it was made on (env.json), not on whose computer."""
    status = json.loads(path.read_text())
    path.write_text(json.dumps(status | {"host": "recorded", "pid": None}))


def main(presets: list[str]) -> None:
    """Make all of it, or the named recordings only."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["BITPRESS_HOME"] = home
        if not presets:
            inspect()
        for preset in presets or PRESETS:
            print(record(preset))


if __name__ == "__main__":
    main(sys.argv[1:])
